"""What rank 0's watcher does for all: it hears of every rank, finds who hangs or failed first, and ends the others.

To a watcher it says: alive; dump (send stacks); calm (rank 0 has left); end, and why; over. From one it hears: token, where the
rank is and since when, error, gone, stacks, collectives, left, unwatched.

Standard library only, as `pretrain.watcher`.
"""

import json
import selectors
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pretrain import crash
from pretrain.crash import Facts, Rank
from pretrain.hosts import suspect

Message = dict[str, Any]
_START_S = 60.0
"""For the ranks' watchers to come, before the hub may end without them."""
WORD_S = 3.0
"""For a rank to say that it goes on when its watcher is gone; rank 0's proves it by the hub's socket, which it holds open."""


class Lines:
    """Messages over a socket, one JSON object a line. A peer that takes nothing for 5 s is lost."""

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
        self.refused_s = 5.0
        """So much longer where all that has come is a refusal of what the user asked for: a slow node's is no crash."""
        self.orphan_s = limit_s
        """For a rank whose torchrun is gone to save and leave."""
        self.silence_s = max(limit_s, 5.0)
        """Without a word a watcher is taken for lost."""
        self.write_s = 10.0
        """For the report to be written, once the ranks have been told to end; a scheduler may leave it less."""


class Ticks:
    """How long this process has run (seconds). What took far longer than a tick was a stop of its own: others had no chance."""

    def __init__(self, tick_s: float):
        self._most_s, self._last = 3 * tick_s, time.monotonic()

    def since_last(self) -> float:
        """From the last call to this one."""
        last, self._last = self._last, time.monotonic()
        return min(self._last - last, self._most_s)


class Hub(threading.Thread):
    """Hears of all ranks and gives the verdict."""

    def __init__(self, listener: socket.socket, world_size: int, token: str, timing: Timing, facts: Facts):
        super().__init__(daemon=True, name="hub")
        self.ranks = [Rank(number, unwatched=True) for number in range(world_size)]
        self._token, self._timing, self._facts = token, timing, facts
        self._peers: dict[int, Lines] = {}
        self._ticks = Ticks(timing.tick_s)
        self._silent_s: dict[int, float] = {}
        self._lost_s: dict[int, float] = {}
        self._all_may_be_here = time.monotonic() + _START_S
        self._said_alive = 0.0
        self._report: threading.Thread | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._listener = listener

    def run(self) -> None:
        """Until all have left, or one has failed and everybody has been told."""
        while not all(self._is_out(rank) for rank in self.ranks):
            self._listen(self._timing.tick_s)
            if any(rank.ended_at_s is not None for rank in self.ranks):
                self._listen_for(self._timing.collect_s, lambda rank: rank.ended_at_s is not None)
                if not self._crashed():
                    self._listen_for(
                        self._timing.refused_s, lambda rank: rank.ended_at_s is not None or self._crashed()
                    )
            elif not crash.overdue(self.ranks):
                continue
            if all(rank.refused for rank in self.ranks):  # all found the same, and each has said it
                break
            self._verdict()
            break
        self._tell({"over": True})
        if self._report is not None:
            self._report.join(self._timing.write_s)

    def _crashed(self) -> bool:
        """Whether a rank has ended by more than a refusal."""
        return any(rank.ended_at_s is not None and not rank.refused for rank in self.ranks)

    def _is_out(self, rank: Rank) -> bool:
        """Whether nothing more is to be heard of it."""
        return rank.left or (rank.unwatched and time.monotonic() > self._all_may_be_here)

    def _verdict(self) -> None:
        if crash.first_cause(self.ranks).kind == "hangs":
            self._tell({"dump": True})
            self._listen_for(self._timing.stacks_s, lambda rank: bool(rank.stacks or rank.ended_at_s))
            if not crash.first_cause(self.ranks).ranks:  # it is inside a collective
                answered = self._timing.stacks_s / 2
                self._listen_for(answered, lambda rank: rank.collectives is not None or rank.ended_at_s is not None)
        cause = crash.first_cause(self.ranks)
        self._report = write_report(cause, self.ranks, self._facts)
        self._report.join(self._timing.end_s)
        self._tell({"end": f"{cause.line}; see {self._facts.run_dir}/{crash.REPORT}"})

    def _tell(self, message: Message) -> None:
        for peer in self._peers.values():
            if not peer.lost:
                peer.send(message)

    def _listen_for(self, seconds: float, done: Any) -> None:
        while seconds > 0 and not all(self._is_out(rank) or done(rank) for rank in self.ranks):
            seconds -= self._listen(min(self._timing.tick_s, 0.1))
        self._listen(0.0)  # what had come while this process could not look

    def _listen(self, seconds: float) -> float:
        """Take what comes within so many seconds; tell everybody that the hub is alive; note who is silent or gone.

        Returns the seconds that it took, of which a stop of this process does not count.
        """
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                guest = Lines(self._listener.accept()[0])
                self._selector.register(guest.socket, selectors.EVENT_READ, guest)
            else:
                self._take(key.data)
        now, passed_s = time.monotonic(), self._ticks.since_last()
        for number, peer in self._peers.items():
            rank = self.ranks[number]
            self._silent_s[number] += passed_s
            silent = self._silent_s[number] > self._timing.silence_s
            if peer.lost:
                self._lost_s[number] = self._lost_s[number] + passed_s if number in self._lost_s else 0.0
            lost = peer.lost and self._lost_s[number] > WORD_S
            if (lost or silent) and not rank.left and rank.ended_at_s is None:
                what = "nothing is heard of its watcher" if silent else "the connection to its watcher ended"
                rank.gone, rank.ended_at_s = f"{what}: its host, or all of the job on it, was ended", now
        if now - self._said_alive >= self._timing.tick_s:
            self._said_alive = now
            self._tell({"alive": True})
        return passed_s

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
            self._silent_s[number] = 0.0
            crash.from_message(self.ranks[number], message, time.monotonic())
            if number == 0 and message.get("left"):
                self._tell({"calm": True})  # from now on it is no alarm when this process is gone
        if guest.lost:
            self._selector.unregister(guest.socket)
            guest.socket.close()


def write_report(cause: crash.Cause, ranks: list[Rank], facts: Facts) -> threading.Thread:
    """Put the page and the stacks into the run's folder, on standard error where that cannot be; by a thread, which it returns.

    For the file system may be what hangs.
    """

    def write() -> None:
        text = crash.page(cause, ranks, facts)
        if cause.machine and cause.ranks[0].host != crash.UNKNOWN_HOST:
            suspect(cause.ranks[0].host)
        try:
            crash.publish(Path(facts.run_dir), crash.STACKS, crash.all_stacks(ranks))
            crash.publish(Path(facts.run_dir), crash.REPORT, text)
        except OSError as error:
            print(f"{text}\n({crash.REPORT} could not be written: {error})", file=sys.stderr, flush=True)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread
