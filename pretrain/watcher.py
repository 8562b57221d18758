"""The process beside each rank that watches it: CRIA_WATCHER='{"rank": ...}' python -S -m pretrain.watcher. Standard library
only.

    rank's shared memory ─> Watcher: how long has it been there? ── every tick ──> Hub, in rank 0's watcher
    rank's exception, death, stop ─>   │                                            │ who is overdue, who is gone?
                                       │ <──────────────────────────── "dump" ──────┤
      stacks, by a signal ─────────────┼──────────────────────────────────────────> │ crash.first_cause, crash-report.txt
                                       │ <──────────────────────────── "end" ───────┘
      the rank exits with 86, or is killed

Ages and silences are counted in the ticks of the process that waits, so that no clock must agree with another one, and a job
or a machine that was suspended raises no alarm. When the hub is lost, with rank 0's host, each watcher ends its rank. A watcher
that cannot come or is killed ends nothing: its rank goes on unwatched, and says so.
"""

import json
import os
import selectors
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from mmap import mmap

from pretrain import crash, processes
from pretrain.crash import Facts, Rank
from pretrain.hosts import this_host
from pretrain.hub import WORD_S, Hub, Lines, Message, Ticks, Timing, write_report
from pretrain.streams import standard_streams

EXIT_STATUS = 86
"""Of a rank that the watchdog ended: it hung, or another one hung, failed or died."""
ABOUT = "CRIA_WATCHER"
"""The variable that says what to watch, and the word that opens the hub: arguments are for every user's eyes."""
STACK_SIGNAL = signal.SIGUSR2
"""Makes a rank write its stacks; also by hand."""
CELL = struct.Struct("<QQdq")
"""Beats, signs of life, the limit of this place (seconds), the step or -1; the place's name follows."""
CELL_BYTES = 256
ASK, EXIT, SPEAK, UNWATCHED = b"c", b"x", b"v", b"u"
"""What a watcher says to its rank, in one byte: tell me which collectives are open; leave with EXIT_STATUS; print your exception
and leave; nobody watches you any more. The last two need no answer."""


class Watcher:
    """Watches the process that started it."""

    def __init__(self, about: Message):
        # As the rank says it: who asks for its own parent when that is dead already gets process 1, with all its descendants.
        self._rank, self._parent = about["rank"], about["pid"]
        self._alone = about["world_size"] == 1
        self._agent = about["agent"]
        self._facts = Facts(**about["facts"])
        self._timing = Timing(about["limit_s"])
        self._cell = mmap(about["memory"], CELL_BYTES)
        self._stacks = about["stacks"]
        self._seen = b""
        self._age_s = self._orphaned_s = self._hub_silent_s = 0.0
        self._control = Lines(socket.socket(fileno=about["control"]))
        host, port, token = about["address"]
        self._address = (host, port)
        self._hub = Lines(_connect(host, port, about["connect_s"], self._parent))
        self._ticks = Ticks(self._timing.tick_s)
        self._calm = False
        self._failed = self._left = self._said = False
        self._hub.send({"token": token, "rank": self._rank, "host": this_host(), "pid": self._parent})
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
            passed_s = self._ticks.since_last()
            if not (self._failed or self._left or self._said):
                self._look(passed_s)
            self._hub_silent_s += passed_s
            if self._hub.lost or self._hub_silent_s > self._timing.silence_s:
                if not self._calm:
                    self._without_hub()
                return

    def _answer(self, message: Message) -> bool:
        """Do what the rank or the hub says; True: it is over."""
        if "alive" in message:
            self._hub_silent_s = 0.0
        elif "error" in message:
            self._failed = True
            self._hub.send({**self._where(), **message, "ago_s": time.monotonic() - message["failed_at_s"]})
        elif "collectives" in message:
            self._hub.send(message)
        elif "left" in message and not self._failed:
            self._left = True
            self._hub.send({"left": True})
        elif "calm" in message:
            self._calm = True
        elif "dump" in message:
            where = self._where()
            self._said = True  # a stopped rank goes on for its stack: that is no new place
            with suppress(OSError):
                self._control.socket.sendall(ASK)  # a thread of the rank answers, if it can
            patience_s = self._timing.stacks_s / 4
            stacks = processes.stacks(self._parent, self._stacks, STACK_SIGNAL, patience_s)
            self._hub.send({**where, "stacks": stacks})
        elif "end" in message:
            self._end(message["end"])
            return True
        return "over" in message

    def _look(self, passed_s: float) -> None:
        """One look at the rank, so long after the last one (seconds): its place and age go to the hub."""
        if os.getppid() != self._parent:
            self._failed = True
            self._hub.send(
                {**self._where(), "gone": "it died without a word", "ago_s": 0.0, "stacks": self._read_stacks()}
            )
            return
        beats = self._cell[: CELL.size]
        self._age_s = 0.0 if beats != self._seen else self._age_s + passed_s
        self._seen = beats
        if self._alone and processes.stat(self._parent)[:1] == ["T"]:
            self._age_s = 0.0  # Ctrl-Z on a terminal: nobody waits for it
        self._hub.send(self._where())
        orphaned = self._agent and processes.stat(self._parent)[1:2] not in ([], [str(self._agent)])
        self._orphaned_s = self._orphaned_s + passed_s if orphaned else 0.0
        if self._orphaned_s > self._timing.orphan_s:  # it was asked to stop by `scheduler.Stop`, and does not
            self._said = True
            self._hub.send({"gone": "the torchrun that had started it is gone", "ago_s": 0.0})

    def _where(self) -> Message:
        cell = bytes(self._cell[:])
        beats, _, limit_s, step = CELL.unpack_from(cell)
        place = cell[CELL.size :].rstrip(b"\0").decode(errors="replace")
        state = "".join(processes.stat(self._parent)[:1])
        # It may have come to this place since the last look: the time at the one before is not to be held against this limit.
        age_s = self._age_s if cell[: CELL.size] == self._seen else 0.0
        where = {"beats": beats, "limit_s": limit_s, "place": place, "age_s": age_s, "state": state}
        return {**where, "step": None if step < 0 else step}

    def _read_stacks(self) -> str:
        """What a crash in C code left."""
        return os.pread(self._stacks, 50_000, 0).decode(errors="replace")

    def _without_hub(self) -> None:
        """Rank 0's watcher is gone without a word; if its rank and host are too, nobody else will say so."""
        time.sleep(WORD_S)
        if not self._left and _answers(*self._address):
            go_on_unwatched(self._rank, "rank 0's watcher is gone")
            with suppress(OSError):
                self._control.socket.sendall(UNWATCHED)
            return
        rank = Rank(
            0, place="unknown", gone="nothing is heard of its watcher: its host, or all of the job on it, was ended"
        )
        rank.ended_at_s = time.monotonic()
        me = Rank(self._rank)
        crash.from_message(me, {**self._where(), "host": this_host(), "pid": self._parent}, time.monotonic())
        cause = crash.first_cause([rank, me])
        report = write_report(cause, [rank, me], self._facts)
        self._end(cause.line)
        report.join(self._timing.write_s)

    def _end(self, line: str) -> None:
        """End the rank: by its own hand with our status; if it does not, by force."""
        if self._failed:
            with suppress(OSError):
                self._control.socket.sendall(SPEAK)  # it prints its exception and goes
            if not self._alone:  # and what it leaves running does not hold it
                self._wait_for_death(8.0)
                processes.kill([self._parent] if os.getppid() == self._parent else [])
            return
        print(f"watchdog: {line}. This is rank {self._rank}: it exits with {EXIT_STATUS}", file=sys.stderr, flush=True)
        family = processes.descendants(self._parent) if os.getppid() == self._parent else []
        with suppress(OSError):
            self._control.socket.sendall(EXIT)
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


def main() -> int:
    """Started by `pretrain.watchdog`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the rank decides what they mean
    about = json.loads(os.environ.pop(ABOUT))
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
            socket.socket(fileno=about["control"]).sendall(UNWATCHED)
        return 1
    watcher.run()
    if hub is not None:
        hub.join(25)
    return 0


if __name__ == "__main__":
    with standard_streams("watchdog", lasting=True):  # the log that it speaks in may be gone
        sys.exit(main())
