"""Real processes without the seconds that importing torch takes: they are forked from one that has imported it.

A process of these is its own: signals, kills, locks, exit status and ranks are the real thing. That `python -m pretrain`
and torchrun start the same is shown by the tests of the README, of the faults, and by `pretrain(..., torchrun=True)`.
"""

import atexit
import itertools
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["preloaded"])
_PORTS = itertools.count(random.randrange(500))
_STARTED: list["Process"] = []


def free_port() -> int:
    """One that nobody listens on, of a range from which the kernel gives none to others; pytest's workers have their own."""
    block = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4
    while True:
        port = 10_000 + 500 * block + next(_PORTS) % 500
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def kill_what_is_left() -> None:
    """End those that a failed test has left behind: they would slow the next ones."""
    while _STARTED:
        if (process := _STARTED.pop()).poll() is None:
            process.kill()


class Process:
    """One rank of `pretrain ARGV`, in a process group of its own; the part of subprocess.Popen's interface that tests need."""

    def __init__(
        self,
        argv: tuple[str, ...],
        env: dict[str, str],
        cwd: str | Path | None = None,
        merged: bool = False,
        out: Path | None = None,
    ):
        """merged: standard error goes where standard output goes, to `out` or a file of its own."""
        self.args = argv
        self._out = self._err = out or Path(tempfile.mkstemp(prefix="test-")[1])
        if not merged:
            self._err = Path(tempfile.mkstemp(prefix="test-")[1])
        # Where the server finds `preloaded`, and what that imports.
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        with patch.dict(os.environ, PYTHONPATH=path):
            forkserver.ensure_running()
        self._process = _SERVER.Process(target=_run, args=(argv, env, str(cwd or Path.cwd()), self._out, self._err))
        self._process.start()
        self.pid = self._process.pid
        _STARTED.append(self)

    @property
    def returncode(self) -> int | None:
        """The exit status, minus the signal's number for a killed process; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As subprocess.Popen's."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        """As subprocess.Popen's."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; what was printed on standard output (merged: on both) and on standard error."""
        self.wait(timeout)
        return self._out.read_text(), "" if self._err == self._out else self._err.read_text()

    def kill(self) -> None:
        """SIGKILL, to this process alone."""
        self._process.kill()


def _run(argv: tuple[str, ...], env: dict[str, str], cwd: str, out: Path, err: Path) -> None:
    os.setsid()  # a terminal's Ctrl-C would reach the whole group
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # as the new environment says
    os.chdir(cwd)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # ignored where the tests have nohup, or have trained themselves
    sys.argv = ["pretrain", *argv]
    from pretrain.__main__ import main

    try:
        sys.exit(main(list(argv)))
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out; loggers rely on them


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """What torchrun tells each rank of one node."""
    if ranks == 1:
        return [{}]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= {"GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "none"}
    return [{k: str(v) for k, v in {**shared, "RANK": n, "LOCAL_RANK": n}.items()} for n in range(ranks)]


def run(
    argv: tuple[str, ...], ranks: int, env: dict[str, str] | None = None, cwd: str | Path | None = None
) -> subprocess.CompletedProcess:
    """Run `pretrain ARGV` on so many ranks to its end. Where a rank fails the others are killed, as torchrun does."""
    base = dict(os.environ) if env is None else env
    processes = [Process(argv, {**base, **own}, cwd) for own in rank_environments(ranks)]
    deadline = time.monotonic() + 600
    while any(p.poll() is None for p in processes):
        failed = any(p.poll() for p in processes)
        if failed or time.monotonic() > deadline:
            until = time.monotonic() + (10 if failed else 0)  # to print what went wrong
            while any(p.poll() is None for p in processes) and time.monotonic() < until:
                time.sleep(0.02)
            for process in processes:
                process.kill()
            break
        time.sleep(0.02)
    texts = [process.communicate() for process in processes]
    statuses = [process.returncode for process in processes]
    status = next((s for s in statuses if s and s > 0), next((s for s in statuses if s), 0))
    return subprocess.CompletedProcess(argv, status, "".join(t[0] for t in texts), "".join(t[1] for t in texts))
