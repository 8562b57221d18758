"""The watchdog, as a rank sees it: where it is, said in a word to a process that watches from outside.

    trainer: at("waiting for data", step) ──> 256 bytes of shared memory ──> watcher (`pretrain.watcher`, a child process)
    an exception ──> control socket ──────────────────────────────────────>    │ every rank's, over TCP
                                                                               v
       _exit(86) <── EXIT <── control socket <──────────────── the verdict of rank 0's watcher ─> crash-report.txt

A thread could not do it: one that is to notice a hang must not need the interpreter's lock that a hanging C call may hold,
and a process that is stopped (SIGSTOP) or killed notices nothing. So each rank has a small child that only watches. It costs
the training a copy of some bytes at each place, no system call and nothing on the device.

What can be seen: where the host's side of a rank is. A rank that hangs in its loader, in Python, in a file system, in C
code, stopped, or in the preparation of a collective is behind the others and is named. When a GPU hangs inside a collective
all hosts wait in the same place; then what PyTorch's flight recorder kept (`collectives`) tells the collective, and the ranks
that it waits for (`stuck`). Where none stands out, `pretrain doctor` finds the device.
"""

import faulthandler
import json
import mmap
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from pretrain import collectives, ranks
from pretrain.crash import Facts
from pretrain.scheduler import torchrun_agent
from pretrain.sections import Config
from pretrain.versions import RUN_PACKAGES, versions
from pretrain.watcher import ABOUT, ASK, CELL, CELL_BYTES, EXIT, EXIT_STATUS, STACK_SIGNAL, go_on_unwatched

_current: "weakref.ref[Watchdog] | None" = None
"""The one that is on, weakly: a run that is forgotten, in a notebook say, is not watched any more."""


def _watchdog() -> "Watchdog | None":
    return None if _current is None else _current()


def at(place: str, step: int | None = None) -> None:
    """Say where this rank is: at `place`, working on optimizer step `step`. Called by all ranks alike, in the main thread.

    step: None, the one of the place before.

    Nothing happens where no watchdog is on.
    """
    if (watchdog := _watchdog()) is not None:
        watchdog.at(place, step)


def alive() -> None:
    """Say that this rank makes progress where it is, so that its time there starts again.

    May be called any number of times, by the main thread or one that it waits for. It does not count as a place: places are
    counted, and all ranks must come to the same ones.
    """
    if (watchdog := _watchdog()) is not None:
        watchdog.alive()


def first_step_done() -> None:
    """From now on `watchdog.limit_s` counts: what is compiled is compiled."""
    if (watchdog := _watchdog()) is not None:
        watchdog.limit_s = watchdog.config.limit_s


class Watchdog:
    """Watches this rank while it is entered: `with Watchdog(...)`. An exception that leaves the block is reported.

    Made by all ranks alike, since rank 0 tells the others where its watcher listens.
    """

    def __init__(self, settings: Config):
        self.config = settings.watchdog
        self.limit_s = max(self.config.limit_s, self.config.first_step_limit_s)
        self._beats = self._signs = 0
        self._step: int | None = None
        self._preparing = True
        listener, address = _meet() if self.config.limit_s else (None, None)
        if address is not None:
            self._start(settings, listener, address)

    def _start(self, settings: Config, listener: socket.socket | None, address: tuple[str, int, str]) -> None:
        memory, self._stacks = _file_in_memory(), _file_in_memory()
        memory.truncate(CELL_BYTES)
        self._cell = mmap.mmap(memory.fileno(), CELL_BYTES)
        self._control, theirs = socket.socketpair()
        self._catch_stack_signal()
        batch = settings.train
        facts = Facts(
            str(Path(settings.run_dir)), batch.micro_batch_size, batch.global_batch_size, versions(*RUN_PACKAGES)
        )
        places = {"memory": memory.fileno(), "stacks": self._stacks.fileno(), "control": theirs.fileno()}
        if listener is not None:
            places["listener"] = listener.fileno()
        about = {"rank": ranks.rank(), "world_size": ranks.world_size(), "address": address}
        about |= {"pid": os.getpid(), "agent": torchrun_agent()}
        about |= {"limit_s": self.config.limit_s, "connect_s": self.limit_s, "facts": asdict(facts)}
        # Not a line of the site's packages: it starts in 20 ms. Its own session: signals to the job's group spare it.
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-m", "pretrain.watcher"],
            pass_fds=tuple(places.values()),
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), ABOUT: json.dumps({**about, **places})},
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        memory.close()
        theirs.close()
        if listener is not None:  # kept open: as long as it is, the others know that this rank lives
            os.register_at_fork(after_in_child=listener.close)
        verdict, self._leaving = threading.Event(), threading.Event()
        ears = (self._control, verdict, self._leaving, ranks.rank(), address)
        threading.Thread(target=_obey, args=ears, name="watchdog", daemon=True).start()
        goodbye = (self._control, self._process, verdict, self._leaving, listener)
        self._finalizer = weakref.finalize(self, _say_goodbye, *goodbye)
        self.at("preparing")

    def _catch_stack_signal(self) -> None:
        """On a signal all threads' stacks are written, by C code that does not need the interpreter's lock."""
        os.set_blocking(self._stacks.fileno(), True)
        faulthandler.register(STACK_SIGNAL, file=self._stacks, all_threads=True, chain=False)
        if not faulthandler.is_enabled():
            faulthandler.enable(file=self._stacks, all_threads=True)  # a crash in C code leaves its stack, too

    def at(self, place: str, step: int | None = None) -> None:
        """See the function `at`."""
        self._beats += 1
        self._step = self._step if step is None else step
        self._write(place, self._step, self.limit_s)

    def alive(self) -> None:
        """See the function `alive`."""
        self._signs += 1
        self._write_cell(self._step, self.limit_s)

    def rest(self) -> None:
        """Between preparation and training nobody knows how long it takes."""
        self._preparing = False
        if self.on:
            self._write("prepared", None, 0.0)

    @property
    def on(self) -> bool:
        """Whether there is a watcher."""
        return hasattr(self, "_process")

    def _write(self, place: str, step: int | None, limit_s: float) -> None:
        text = place.encode()[: CELL_BYTES - CELL.size]
        self._cell[CELL.size :] = text.ljust(CELL_BYTES - CELL.size, b"\0")
        self._write_cell(step, limit_s)

    def _write_cell(self, step: int | None, limit_s: float) -> None:
        CELL.pack_into(self._cell, 0, self._beats, self._signs, limit_s, -1 if step is None else step)

    def __enter__(self) -> "Watchdog":
        global _current
        if self.on:
            if (before := _watchdog()) is not None:
                before.rest()
            _current = weakref.ref(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        if not self.on:
            return
        _current = None if _watchdog() is self else _current
        self._leaving.set()  # before the watcher hears of it: after a refusal it is over at once
        if error is not None and not isinstance(error, SystemExit | KeyboardInterrupt):
            self._report(error)
        self._finalizer()

    def _report(self, error: BaseException) -> None:
        """Hand the exception to the watcher, and wait until all ranks' are in, so that none is ended before it has spoken."""
        refused = self._preparing and isinstance(error, (ValueError, OSError))
        message = {
            "error": f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}",
            "trace": "".join(traceback.format_exception(error))[-20_000:],
            "refused": refused,
            "failed_at_s": time.monotonic(),
        }
        _send(self._control, message)


def _file_in_memory() -> BinaryIO:
    """Of no disk, which could be full: a mapping would die of that by SIGBUS. A temporary file where the system has none."""
    with suppress(AttributeError, OSError):
        return open(os.memfd_create("watchdog"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _meet() -> tuple[socket.socket | None, tuple[str, int, str]]:
    """Rank 0's listening socket, on rank 0, and for all ranks its address: host, port and a word that opens it."""
    listener = None
    address = ("127.0.0.1", 0, "")
    if ranks.rank() == 0:
        alone = ranks.world_size() == 1
        host = "127.0.0.1" if alone else os.environ.get("MASTER_ADDR", socket.gethostname())
        wide = not alone and socket.has_dualstack_ipv6()
        listener = socket.create_server(
            ("127.0.0.1" if alone else "", 0),
            family=socket.AF_INET6 if wide else socket.AF_INET,
            dualstack_ipv6=wide,
            backlog=1024,
        )
        address = (host, listener.getsockname()[1], secrets.token_hex(16))
    return listener, ranks.broadcast(address)


def _obey(
    control: socket.socket, verdict: threading.Event, leaving: threading.Event, rank: int, address: tuple[str, int, str]
) -> None:
    """A thread: end the process when the watcher says so; `verdict` is set when it has no more to say.

    A watcher that is gone before the rank is `leaving` was killed: the hub is told that the rank goes on without.
    """
    word = b""
    with suppress(OSError):
        word = control.recv(1)
        while word == ASK:
            with suppress(Exception):  # PyTorch's own affairs, which may change: the verdict comes without them
                _send(control, {"collectives": collectives.recorded()})
            word = b""
            word = control.recv(1)
    if word == EXIT:
        os._exit(EXIT_STATUS)
    verdict.set()
    if not word and not leaving.is_set():
        go_on_unwatched(rank, "its watcher was killed")
        host, port, token = address
        with suppress(OSError), socket.create_connection((host, port), timeout=5) as hub:
            hub.sendall(json.dumps({"token": token, "rank": rank, "unwatched": True}).encode() + b"\n")


def _send(control: socket.socket, message: dict) -> None:
    with suppress(OSError):  # the watcher is gone: the end comes without it
        control.sendall(json.dumps(message).encode() + b"\n")


def _say_goodbye(
    control: socket.socket,
    process: subprocess.Popen,
    verdict: threading.Event,
    leaving: threading.Event,
    listener: socket.socket | None,
) -> None:
    """The run is over, for good or ill: all have left, or the page about the failure is written."""
    leaving.set()
    _send(control, {"left": True})
    if verdict.wait(15):
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.2)  # longer only after a failure: then it sees to it that this process ends
    control.close()
    if listener is not None:
        listener.close()
