"""The hub and the watchers, without ranks: who is heard, who is lost, who is only late (see test_watchdog.py for the runs)."""

import json
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import until

from pretrain import crash, watchdog, watcher
from pretrain.crash import Facts, Rank
from pretrain.hub import Hub, Timing
from pretrain.watcher import Watcher


def test_a_stranger_on_the_port_does_no_harm() -> None:
    """A scanner of ports, or another job: it is not heard, and the hub goes on."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    hub = Hub(listener, 1, "secret", Timing(5.0), Facts("nowhere", 1, 1))
    hub.start()
    for word in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"[1]\n",
        b'{"rank": 0, "error": "x"}\n',
        b'{"token": "guessed", "rank": 0}\n',
    ):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(word)
            while stranger.recv(100):  # the hub hangs up
                pass
    with socket.create_connection(("127.0.0.1", port)) as rank:
        rank.sendall(b'{"token": "secret", "rank": 0, "host": "here"}\n{"left": true}\n')
        hub.join(300)
    assert not hub.is_alive()
    assert (hub.ranks[0].host, hub.ranks[0].error, hub.ranks[0].left) == ("here", None, True)


def test_a_watcher_that_does_not_come_or_is_killed_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Rank 1's never comes, rank 2's is killed and its rank says that it goes on; rank 3 is gone with its watcher."""
    monkeypatch.setattr("pretrain.hub._START_S", 0.0)
    monkeypatch.setattr("pretrain.hub.WORD_S", 0.5)
    listener = socket.create_server(("127.0.0.1", 0))
    address = ("127.0.0.1", listener.getsockname()[1])
    hub = Hub(listener, 4, "secret", Timing(100.0), Facts(str(tmp_path), 1, 1))

    def come(rank: int) -> socket.socket:
        peer = socket.create_connection(address)
        peer.sendall(b'{"token": "secret", "rank": %d, "limit_s": 100}\n' % rank)
        return peer

    zero, two = come(0), come(2)
    until(lambda: hub._listen(0.1) < 0 or not hub.ranks[2].unwatched)
    two.close()
    control, theirs = socket.socketpair()
    theirs.close()
    watchdog._obey(control, threading.Event(), threading.Event(), 2, (*address, "secret"))
    assert "rank 2 goes on UNWATCHED: its watcher was killed" in capsys.readouterr().err
    until(lambda: hub._listen(0.1) < 0 or hub.ranks[2].unwatched)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        hub._listen(0.1)
    assert [rank.ended_at_s for rank in hub.ranks] == [None] * 4
    assert [rank.unwatched for rank in hub.ranks] == [False, True, True, True]
    assert crash.first_cause(hub.ranks).ranks == [hub.ranks[0]], "only of rank 0 anything is known"

    come(3).close()
    until(lambda: hub._listen(0.1) < 0 or hub.ranks[3].ended_at_s is not None)
    assert "the connection to its watcher ended" in str(hub.ranks[3].gone)
    hub.ranks[3].ended_at_s, hub.ranks[3].left = None, True
    hub.start()
    zero.sendall(b'{"left": true}\n')
    hub.join(300)
    assert not hub.is_alive()
    assert not (tmp_path / crash.REPORT).exists()


class Clock:
    """In the place of the hub's `time`: it goes `pace_s` (seconds) with every look, and jumps when told to."""

    def __init__(self, pace_s: float):
        self.now, self.pace_s = 0.0, pace_s

    def monotonic(self) -> float:
        self.now += self.pace_s
        return self.now


def test_a_job_that_was_suspended_is_not_taken_for_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by `scontrol suspend`: hours later all go on, and who looks first has not heard of the others yet."""
    clock = Clock(0.0)
    monkeypatch.setattr("pretrain.hub.time", clock)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as peer:
        timing = Timing(10.0)
        hub = Hub(listener, 1, "secret", timing, Facts("nowhere", 1, 1))
        peer.connect(listener.getsockname())
        peer.sendall(b'{"token": "secret", "rank": 0, "limit_s": 10}\n')
        until(lambda: hub._listen(0.1) < 0 or not hub.ranks[0].unwatched)
        clock.now += 10_000
        hub._listen(0.0)
        assert hub.ranks[0].ended_at_s is None
        ticks = 0
        while hub.ranks[0].ended_at_s is None:
            clock.now += timing.tick_s
            hub._listen(0.0)
            ticks += 1
        assert 17 <= ticks <= 20, "silent for 10 s of the hub's own, three ticks of them its stop"


def test_a_watcher_that_was_suspended_does_not_miss_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, missed = Clock(0.05), []
    monkeypatch.setattr("pretrain.hub.time", clock)
    monkeypatch.setattr(Watcher, "_without_hub", lambda self: missed.append(clock.now))
    control, theirs = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as hub, tempfile.TemporaryFile() as memory:
        memory.truncate(watcher.CELL_BYTES)
        about = {"rank": 1, "world_size": 2, "address": [*hub.getsockname(), "token"], "pid": os.getppid(), "agent": 0}
        about |= {"limit_s": 1.0, "connect_s": 5.0, "facts": asdict(Facts("nowhere", 1, 2))}
        mine = Watcher(about | {"memory": memory.fileno(), "stacks": memory.fileno(), "control": theirs.detach()})
        monkeypatch.setattr(mine._timing, "tick_s", 0.001)
        clock.now += 10_000
        mine.run()
    control.close()
    assert missed == [pytest.approx(10_000 + mine._timing.silence_s, abs=0.2)]


def test_a_watcher_that_comes_after_its_rank_has_died_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parent is process 1 then, and everything descends from that."""
    ended: list[int] = []
    monkeypatch.setattr(watcher.processes, "kill", ended.extend)
    monkeypatch.setattr(watcher.signal, "signal", lambda number, handler: None)
    dead = subprocess.Popen(["true"])
    dead.wait()
    hub, (control, theirs) = socket.create_server(("127.0.0.1", 0)), socket.socketpair()
    memory, stacks = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
    memory.truncate(watcher.CELL_BYTES)
    about = {"rank": 1, "world_size": 2, "address": [*hub.getsockname(), "token"], "pid": dead.pid, "agent": 0}
    about |= {"limit_s": 1.0, "connect_s": 5.0, "facts": asdict(Facts("nowhere", 1, 2))}
    about |= {"memory": memory.fileno(), "stacks": stacks.fileno(), "control": theirs.detach()}

    def end_all() -> None:
        with hub.accept()[0] as connection:
            connection.sendall(b'{"end": "a test"}\n')
            while connection.recv(10_000):
                pass

    threading.Thread(target=end_all, daemon=True).start()
    monkeypatch.setenv(watcher.ABOUT, json.dumps(about))
    watcher.main()
    assert control.recv(1) in (b"x", b"v"), "it did not come to end its rank"
    assert ended == []
    control.close()


def test_a_hub_that_cannot_be_reached_is_named_and_one_of_a_living_rank_0_is_told_from_a_lost_host() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert watcher._answers("127.0.0.1", port)
    assert not watcher._answers("127.0.0.1", port)
    with pytest.raises(OSError, match=f"cannot reach rank 0's at 127.0.0.1:{port} "):
        watcher._connect("127.0.0.1", port, 0.0, os.getppid())


@pytest.mark.parametrize(
    ("second", "reported"),
    [
        (b'{"error": "ValueError: no such file", "refused": true, "ago_s": 0.0}\n', False),
        (b'{"gone": "it died without a word", "ago_s": 0.0}\n', True),
    ],
    ids=["refusal", "death"],
)
def test_a_refusal_that_comes_late_from_one_node_is_no_crash_and_a_death_among_refusals_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: bytes, reported: bool
) -> None:
    """Rank 0 has refused. While the hub waits for the others' refusals rank 1's comes, or its death, and nothing of rank 2."""
    timing = Timing(100.0)
    timing.collect_s, timing.refused_s = 0.0, 1000.0
    listen_for, count = Hub._listen_for, 3 if reported else 2

    def late(hub: Hub, seconds: float, done: Callable[[Rank], bool]) -> None:
        if seconds == timing.refused_s:
            peers[1].sendall(second)
        listen_for(hub, seconds, done)

    monkeypatch.setattr(Hub, "_listen_for", late)
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as connections:
        hub = Hub(listener, count, "secret", timing, Facts(str(tmp_path), 1, 1))
        address = listener.getsockname()
        peers = [connections.enter_context(socket.create_connection(address)) for _ in range(count)]
        for rank, peer in enumerate(peers):
            peer.sendall(b'{"token": "secret", "rank": %d, "limit_s": 100}\n' % rank)
        until(lambda: hub._listen(0.1) >= 0 and not any(rank.unwatched for rank in hub.ranks))
        peers[0].sendall(b'{"error": "ValueError: no such file", "refused": true, "ago_s": 0.0}\n')
        hub.start()
        hub.join(60)
        assert not hub.is_alive()
    assert (tmp_path / crash.REPORT).exists() == reported


def test_a_report_that_takes_its_time_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow file system; the ranks are told to end meanwhile."""
    publish = crash.publish

    def slow(*arguments: object) -> None:
        time.sleep(0.5)
        publish(*arguments)

    monkeypatch.setattr(crash, "publish", slow)
    timing = Timing(100.0)
    timing.collect_s, timing.end_s, timing.write_s = 0.0, 0.0, 300.0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hub = Hub(listener, 1, "secret", timing, Facts(str(tmp_path), 1, 1))
        with socket.create_connection(listener.getsockname()) as peer:
            peer.sendall(b'{"token": "secret", "rank": 0, "limit_s": 100}\n{"gone": "it died", "ago_s": 0.0}\n')
            hub.start()
            hub.join(300)
    assert "it died" in (tmp_path / crash.REPORT).read_text()
