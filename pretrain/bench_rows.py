"""Rows that are timed in processes of their own: what one leaves behind on the device touches no other.

Child(command, OUT.json) ─> run to its end within a time limit, or in turns with others ─> the row it wrote, or a problem
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from pretrain import processes
from pretrain.bench_timing import DOES_NOT_FIT, SPENT

ROOT = Path(__file__).parent.parent
"""Where the packages lie: children import them from there, whether they are installed or not."""


NOT_ASKED_FOR = "not asked for (--rows)"
"""Problem of a row that was left out."""
NOT_TIMED, FAILED, REFUSED = "not timed", "failed with status", "refused: "
"""How the problems of other rows begin; or `DOES_NOT_FIT`."""
_ERROR = "pretrain bench: error: "
"""Before what `pretrain bench` says on standard error of what it refuses."""

SHORTEST_ROW_S = 60.0 if torch.cuda.is_available() else 20.0
"""A row is not begun with less time left (seconds)."""


def asked_for(name: str, rows: str | None) -> bool:
    """Whether --rows, beginnings of names between commas, has one of this row's name; None: it was not given."""
    return rows is None or any(name.startswith(part.strip()) for part in rows.split(","))


class Budget:
    """Seconds that may be spent; None: as many as it takes."""

    def __init__(self, seconds: float | None):
        self._seconds, self._started = seconds, time.monotonic()

    def left(self) -> float | None:
        """Seconds left, at least 0; None: no limit."""
        return None if self._seconds is None else max(0.0, self._seconds - (time.monotonic() - self._started))

    def too_short(self, needed: float) -> bool:
        """Whether less than `needed` seconds are left."""
        left = self.left()
        return left is not None and left < needed


class Child:
    """A process that times one row and writes it, as JSON, to `out`; killed after `timeout_s` (None: never).

    It dies with this process, and so do its ranks, which see to that themselves.
    """

    def __init__(self, command: list[str], out: Path, timeout_s: float | None, in_turns: bool = False):
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._out, self._timeout_s, self._expired = out, timeout_s, False
        out.unlink(missing_ok=True)  # of an earlier try under the same name
        self._log = open(out.with_suffix(".txt"), "w+")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            processes.bound(command),
            stdin=subprocess.PIPE if in_turns else subprocess.DEVNULL,
            stdout=subprocess.PIPE if in_turns else self._log,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        self._watch = threading.Timer(timeout_s or 0, self._expire)
        self._watch.daemon = True
        if timeout_s is not None:
            self._watch.start()

    def _expire(self) -> None:
        self._expired = True
        self.kill()

    def kill(self) -> None:
        """End it, and the ranks that it has started."""
        processes.kill_family(self._process)

    def ready(self) -> bool:
        """Wait until it stands before its next step; False: it has no more, or is gone."""
        assert self._process.stdout is not None
        return any(line == "ready\n" for line in iter(self._process.stdout.readline, ""))

    def step(self) -> bool:
        """Let it take a step, then as `ready`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone, and its row says why
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        return self.ready()

    def row(self) -> dict[str, Any]:
        """Wait for its end and return its row; a process that failed, or took too long, is a row with a `problem`."""
        try:
            status = self._process.wait()
        except BaseException:  # Ctrl-C: it does not reach a session of its own
            self.kill()
            raise
        self._watch.cancel()
        self._log.seek(0)
        said = self._log.read()
        self._log.close()
        if self._out.exists():
            return json.loads(self._out.read_text())
        if self._expired:
            return {"problem": f"{NOT_TIMED}: stopped after the {self._timeout_s:.0f} s that were left"}
        return {"problem": _problem(status, said)}


def take_turns(children: list[Child]) -> None:
    """Let the processes take steps, one each, round and round, until none has any left."""
    waiting = [child for child in children if child.ready()]
    while waiting:
        waiting = [child for child in waiting if child.step()]


def _problem(status: int, said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    spent = [line for line in lines if any(words in line for words in SPENT)]
    if spent:
        return f"{DOES_NOT_FIT}: {spent[-1][:200]}"
    if status == -9:
        return f"{DOES_NOT_FIT}: the system killed it, most likely for its memory"
    refused = [line.partition(_ERROR)[2] for line in lines if _ERROR in line]
    if refused:
        return REFUSED + refused[0]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|error): ", line)] or lines
    return f"{FAILED} {status}: {errors[-1][:300] if errors else 'it said nothing'}"


def bench_command(arguments: list[str], row: Path, ranks: int = 1) -> list[str]:
    """The command line of `pretrain bench` on so many ranks of this machine; what it needs meanwhile lies beside its `row`."""
    launch = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--log-dir", str(row.parent), "-m"]
    return [sys.executable, "-m", *(launch if ranks > 1 else []), "pretrain", "bench", "--row", str(row), *arguments]
