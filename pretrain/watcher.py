"""The process beside each rank that watches it: python -S -m pretrain.watcher '{"rank": ...}'. Standard library only.

    rank's shared memory ─> Watcher: how long has it been there? ── every tick ──> Hub, in rank 0's watcher
    rank's exception, death, stop ─>   │                                            │ who is overdue, who is gone?
                                       │ <──────────────────────────── "dump" ──────┤
      stacks, by a signal ─────────────┼──────────────────────────────────────────> │ crash.first_cause, crash-report.txt
                                       │ <──────────────────────────── "end" ───────┘
      the rank exits with 86, or is killed

Ages are counted by the watcher of the same host in its own ticks, so that no clock must agree with another one, and a
machine that was suspended raises no alarm. When the hub is lost, with rank 0's host, each watcher ends its rank. A watcher that
cannot come or is killed ends nothing: its rank goes on unwatched, and says so.
"""

import json
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from mmap import mmap
from pathlib import Path
from typing import Any

from pretrain import crash, processes
from pretrain.crash import Facts, Rank

EXIT_STATUS = 86
"""Of a rank that the watchdog ended: it hung, or another one hung, failed or died."""
STACK_SIGNAL = signal.SIGUSR2
"""Makes a rank write its stacks; also by hand."""
CELL = struct.Struct("<QQdq")
"""Beats, signs of life, the limit of this place (seconds), the step or -1; the place's name follows."""
CELL_BYTES = 256

Message = dict[str, Any]
_START_S = 60.0
"""For the ranks' watchers to come, before the hub may end without them."""
_WORD_S = 3.0
"""For a rank to say that it goes on when its watcher is gone; rank 0's proves it by the hub's socket, which it holds open."""


class Lines:
    """Messages over a socket, one JSON object a line. Never waits: what does not fit the socket's buffer is a lost peer."""

    def __init__(self, peer: socket.socket):
        self.socket = peer
        self._rest = b""
        self.lost = False
        peer.settimeout(5)

    def send(self, message: Message) -> None:
        """Send, or note that the peer is lost."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.lost = True

    def receive(self) -> list[Message]:
        """What has come; call it when there is something to read. Sets `lost` at the end."""
        try:
            data = self.socket.recv(2**20)
        except OSError:
            data = b""
        self.lost = self.lost or not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines if line]
        except ValueError:
            messages = [None]
        if len(self._rest) > 2**22 or not all(isinstance(message, dict) for message in messages):
            self.lost = True  # a stranger, such as a scanner of ports
            return []
        return messages


class Timing:
    """How long things take, from the limit (seconds)."""

    def __init__(self, limit_s: float):
        self.tick_s = min(1.0, max(0.05, limit_s / 20))
        self.stacks_s = min(5.0, max(0.3, limit_s / 8))
        """For all stacks to come in."""
        self.end_s = min(2.0, max(0.2, limit_s / 10))
        """For a rank to end by itself when it is told to."""
        self.collect_s = 1.0
        """From the first failure to the verdict: the other ranks' follow at once."""
        self.orphan_s = limit_s
        """For a rank whose torchrun is gone to save and leave."""
        self.silence_s = max(limit_s, 5.0)
        """Without a word a watcher is taken for lost."""


# --- the one beside rank 0 -------------------------------------------------------------------------------------------


class Hub(threading.Thread):
    """Hears of all ranks and gives the verdict."""

    def __init__(self, listener: socket.socket, world_size: int, token: str, timing: Timing, facts: Facts):
        super().__init__(daemon=True, name="hub")
        self.ranks = [Rank(number, unwatched=True) for number in range(world_size)]
        self._token, self._timing, self._facts = token, timing, facts
        self._peers: dict[int, Lines] = {}
        self._heard: dict[int, float] = {}
        self._lost: dict[int, float] = {}
        self._all_may_be_here = time.monotonic() + _START_S
        self._said_alive = 0.0
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._listener = listener

    def run(self) -> None:
        """Until all have left, or one has failed and everybody has been told."""
        while not all(self._is_out(rank) for rank in self.ranks):
            self._listen(self._timing.tick_s)
            if any(rank.ended_at_s is not None for rank in self.ranks):
                self._listen_for(self._timing.collect_s, lambda rank: rank.ended_at_s is not None)
            elif not crash.overdue(self.ranks):
                continue
            if all(rank.refused for rank in self.ranks):  # all found the same, and each has said it
                break
            self._verdict()
            break
        self._tell({"over": True})

    def _is_out(self, rank: Rank) -> bool:
        """Whether nothing more is to be heard of it."""
        return rank.left or (rank.unwatched and time.monotonic() > self._all_may_be_here)

    def _verdict(self) -> None:
        if crash.first_cause(self.ranks).kind == "hangs":
            self._tell({"dump": True})
            self._listen_for(self._timing.stacks_s, lambda rank: bool(rank.stacks or rank.ended_at_s))
        cause = crash.first_cause(self.ranks)
        written = threading.Thread(target=write_report, args=(cause, self.ranks, self._facts), daemon=True)
        written.start()  # the file system may be what hangs
        written.join(self._timing.end_s)
        self._tell({"end": f"{cause.line}; see {self._facts.run_dir}/{crash.REPORT}"})

    def _tell(self, message: Message) -> None:
        for peer in self._peers.values():
            if not peer.lost:
                peer.send(message)

    def _listen_for(self, seconds: float, done: Any) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not all(self._is_out(rank) or done(rank) for rank in self.ranks):
            self._listen(min(self._timing.tick_s, 0.1))

    def _listen(self, seconds: float) -> None:
        """Take what comes within a tick; tell everybody that the hub is alive; note who is silent or gone."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                guest = Lines(self._listener.accept()[0])
                self._selector.register(guest.socket, selectors.EVENT_READ, guest)
            else:
                self._take(key.data)
        now = time.monotonic()
        for number, peer in self._peers.items():
            rank = self.ranks[number]
            silent = now - self._heard[number] > self._timing.silence_s
            lost = peer.lost and now - self._lost.setdefault(number, now) > _WORD_S
            if (lost or silent) and not rank.left and rank.ended_at_s is None:
                what = "nothing is heard of its watcher" if silent else "the connection to its watcher ended"
                rank.gone, rank.ended_at_s = f"{what}: its host, or all of the job on it, was ended", now
        if now - self._said_alive >= self._timing.tick_s:
            self._said_alive = now
            self._tell({"alive": True})

    def _take(self, guest: Lines) -> None:
        for message in guest.receive():
            if message.get("token") == self._token:
                rank = self.ranks[message["rank"]]
                rank.unwatched = message.get("unwatched", False)
                self._peers[rank.number] = guest
                if rank.unwatched:  # the rank itself says so
                    del self._peers[rank.number]
            number = next((n for n, peer in self._peers.items() if peer is guest), None)
            if number is None:
                guest.lost = True  # a stranger, or one that has said all
                break
            self._heard[number] = time.monotonic()
            crash.from_message(self.ranks[number], message, time.monotonic())
            if number == 0 and message.get("left"):
                self._tell({"calm": True})  # from now on it is no alarm when this process is gone
        if guest.lost:
            self._selector.unregister(guest.socket)
            guest.socket.close()


def write_report(cause: crash.Cause, ranks: list[Rank], facts: Facts) -> None:
    """Put the page and the stacks into the run's folder; on standard error where that cannot be."""
    text = crash.page(cause, ranks, facts)
    try:
        crash.publish(Path(facts.run_dir), crash.STACKS, crash.all_stacks(ranks))
        crash.publish(Path(facts.run_dir), crash.REPORT, text)
    except OSError as error:
        print(f"{text}\n({crash.REPORT} could not be written: {error})", file=sys.stderr, flush=True)


# --- the one beside each rank ----------------------------------------------------------------------------------------


class Watcher:
    """Watches the process that started it."""

    def __init__(self, about: Message):
        # As the rank says it: who asks for its own parent when that is dead already gets process 1, with all its descendants.
        self._rank, self._parent = about["rank"], about["pid"]
        self._alone = about["world_size"] == 1
        self._agent, self._agent_seen = about["agent"], time.monotonic()
        self._facts = Facts(**about["facts"])
        self._timing = Timing(about["limit_s"])
        self._cell = mmap(about["memory"], CELL_BYTES)
        self._stacks = about["stacks"]
        self._seen = b""
        self._age_s, self._ticked = 0.0, time.monotonic()
        self._control = Lines(socket.socket(fileno=about["control"]))
        host, port, token = about["address"]
        self._address = (host, port)
        self._hub = Lines(_connect(host, port, about["connect_s"], self._parent))
        self._hub_heard = time.monotonic()
        self._calm = False
        self._failed = self._left = self._said = False
        self._hub.send({"token": token, "rank": self._rank, "host": socket.gethostname(), "pid": self._parent})
        self._selector = selectors.DefaultSelector()
        for lines in (self._control, self._hub):
            self._selector.register(lines.socket, selectors.EVENT_READ, lines)
        with suppress(OSError, AttributeError):  # where there is none, the next tick sees that it is dead
            self._selector.register(os.pidfd_open(self._parent), selectors.EVENT_READ)

    def run(self) -> None:
        """Until the run is over."""
        while True:
            events = self._selector.select(self._timing.tick_s)
            for key, _ in events:
                if key.data is None:
                    self._selector.unregister(key.fileobj)  # the rank is dead; `_look` finds out, and once is enough
                elif not key.data.lost:
                    for message in key.data.receive():
                        if self._answer(message):
                            return
            if self._left and self._calm:
                return
            if not (self._failed or self._left or self._said):
                self._look()
            if self._hub.lost or time.monotonic() - self._hub_heard > self._timing.silence_s:
                if not self._calm:
                    self._without_hub()
                return

    def _answer(self, message: Message) -> bool:
        """Do what the rank or the hub says; True: it is over."""
        if "alive" in message:
            self._hub_heard = time.monotonic()
        elif "error" in message:
            self._failed = True
            self._hub.send({**self._where(), **message, "ago_s": time.monotonic() - message["failed_at_s"]})
        elif "left" in message and not self._failed:
            self._left = True
            self._hub.send({"left": True})
        elif "calm" in message:
            self._calm = True
        elif "dump" in message:
            where = self._where()
            self._said = True  # a stopped rank goes on for its stack: that is no new place
            patience_s = self._timing.stacks_s / 4
            stacks = processes.stacks(self._parent, self._stacks, STACK_SIGNAL, patience_s)
            self._hub.send({**where, "stacks": stacks})
        elif "end" in message:
            self._end(message["end"])
            return True
        return "over" in message

    def _look(self) -> None:
        """One look at the rank: its place and age go to the hub."""
        if os.getppid() != self._parent:
            self._failed = True
            self._hub.send(
                {**self._where(), "gone": "it died without a word", "ago_s": 0.0, "stacks": self._read_stacks()}
            )
            return
        now = time.monotonic()
        beats = self._cell[: CELL.size]
        # A tick that took far too long says that this process did not run, not that the rank did nothing.
        self._age_s = 0.0 if beats != self._seen else self._age_s + min(now - self._ticked, 3 * self._timing.tick_s)
        self._seen, self._ticked = beats, now
        if self._alone and processes.stat(self._parent)[:1] == ["T"]:
            self._age_s = 0.0  # Ctrl-Z on a terminal: nobody waits for it
        self._hub.send(self._where())
        if processes.stat(self._parent)[1:2] in ([], [str(self._agent)]) or not self._agent:
            self._agent_seen = now
        if now - self._agent_seen > self._timing.orphan_s:  # it was asked to stop by `scheduler.Stop`, and does not
            self._said = True
            self._hub.send({"gone": "the torchrun that had started it is gone", "ago_s": 0.0})

    def _where(self) -> Message:
        beats, _, limit_s, step = CELL.unpack_from(self._cell)
        place = self._cell[CELL.size :].rstrip(b"\0").decode(errors="replace")
        state = "".join(processes.stat(self._parent)[:1])
        where = {"beats": beats, "limit_s": limit_s, "place": place, "age_s": self._age_s, "state": state}
        return {**where, "step": None if step < 0 else step}

    def _read_stacks(self) -> str:
        """What a crash in C code left."""
        return os.pread(self._stacks, 50_000, 0).decode(errors="replace")

    def _without_hub(self) -> None:
        """Rank 0's watcher is gone without a word; if its rank and host are too, nobody else will say so."""
        time.sleep(_WORD_S)
        if not self._left and _answers(*self._address):
            go_on_unwatched(self._rank, "rank 0's watcher is gone")
            with suppress(OSError):
                self._control.socket.sendall(b"u")
            return
        rank = Rank(
            0, place="unknown", gone="nothing is heard of its watcher: its host, or all of the job on it, was ended"
        )
        rank.ended_at_s = time.monotonic()
        me = Rank(self._rank)
        crash.from_message(me, {**self._where(), "host": socket.gethostname(), "pid": self._parent}, time.monotonic())
        cause = crash.first_cause([rank, me])
        threading.Thread(target=write_report, args=(cause, [rank, me], self._facts), daemon=True).start()
        self._end(cause.line)

    def _end(self, line: str) -> None:
        """End the rank: by its own hand with our status; if it does not, by force."""
        if self._failed:
            with suppress(OSError):
                self._control.socket.sendall(b"v")  # it prints its exception and goes
            if not self._alone:  # and what it leaves running does not hold it
                self._wait_for_death(8.0)
                processes.kill([self._parent] if os.getppid() == self._parent else [])
            return
        print(f"watchdog: {line}. This is rank {self._rank}: it exits with {EXIT_STATUS}", file=sys.stderr, flush=True)
        family = processes.descendants(self._parent) if os.getppid() == self._parent else []
        with suppress(OSError):
            self._control.socket.sendall(b"x")
        self._wait_for_death(self._timing.end_s)
        processes.kill([*family, *([self._parent] if os.getppid() == self._parent else [])])

    def _wait_for_death(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while os.getppid() == self._parent and time.monotonic() < until:
            time.sleep(0.02)


def _connect(host: str, port: int, patience_s: float, parent: int) -> socket.socket:
    """Rank 0's watcher may not be there yet, its socket is: it was open before anybody heard of it.

    Raises OSError, which names the address, after `patience_s` of trying, or when the rank has ended.
    """
    until = time.monotonic() + patience_s
    while True:
        try:
            return socket.create_connection((host, port), timeout=30)
        except OSError as error:
            if time.monotonic() > until or os.getppid() != parent:
                raise OSError(f"its watcher cannot reach rank 0's at {host}:{port} ({error})") from None
        time.sleep(1)


def _answers(host: str, port: int) -> bool:
    """Whether there is still a process with the hub's socket: rank 0."""
    with suppress(OSError):
        socket.create_connection((host, port), timeout=5).close()
        return True
    return False


def go_on_unwatched(rank: int, why: str) -> None:
    """Say it in the log."""
    line = f"watchdog: rank {rank} goes on UNWATCHED: {why}; --watchdog.limit_s 0 does without watchers"
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """Started by `pretrain.watchdog`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the rank decides what they mean
    about = json.loads(argv[0])
    hub = None
    if "listener" in about:
        listener = socket.socket(fileno=about["listener"])
        facts = Facts(**about["facts"])
        hub = Hub(listener, about["world_size"], about["address"][2], Timing(about["limit_s"]), facts)
        hub.start()
    try:
        watcher = Watcher(about)
    except OSError as error:
        if os.getppid() == about["pid"]:
            go_on_unwatched(about["rank"], str(error))
            socket.socket(fileno=about["control"]).sendall(b"u")
        return 1
    watcher.run()
    if hub is not None:
        hub.join(15)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
