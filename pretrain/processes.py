"""What Linux tells of other processes, and a process's stacks; elsewhere, where there is no /proc, nothing is known.

python -S -m pretrain.processes PID COMMAND... becomes the command, which dies with process PID, its parent. Standard library
only.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


def stat(pid: int) -> list[str]:
    """State, parent, ... of a process, as in proc(5) after the name; nothing where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    """Children and their children, without this process."""
    children: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # a thread that has just ended
                children += map(int, (task / "children").read_text().split())
    others = [child for child in children if child != os.getpid()]
    return [found for child in others for found in (child, *descendants(child))]


def kill(pids: list[int]) -> None:
    """SIGKILL to those that there are."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


_GONE_S = 30.0
"""How long killed processes may take to be gone: a GPU's memory is given back first."""


def kill_family(process: subprocess.Popen[Any]) -> None:
    """SIGKILL to a process that leads a session and to all that it has started; returns when they are gone.

    torchrun gives each rank a session of its own: a signal to the agent's session reaches none of them.
    """
    if process.poll() is not None:
        return
    others = descendants(process.pid)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    kill(others)
    until = time.monotonic() + _GONE_S
    while time.monotonic() < until and any(stat(pid)[:1] not in ([], ["Z"]) for pid in [process.pid, *others]):
        time.sleep(0.02)


_PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""


def die_with_parent() -> None:
    """Let this process be killed when the thread that has started it ends, however it ends; what it becomes (exec) as well."""
    with suppress(AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def bound(command: list[str]) -> list[str]:
    """The command line of a child that runs `command` and dies with this process."""
    return [sys.executable, "-S", "-m", "pretrain.processes", str(os.getpid()), *command]


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal: the others would die of it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def stacks(pid: int, file: int, number: int, patience_s: float) -> str:
    """The stacks of a process's threads, which it writes into `file` on signal `number`, within `patience_s`.

    A stopped process is let go on, and writes its stack first.
    """
    if not catches(pid, number):
        return ""
    before = size = os.fstat(file).st_size
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        os.kill(pid, signal.SIGCONT)
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        time.sleep(0.02)
        grown = os.fstat(file).st_size
        if grown == size > before:
            break
        size = grown
    return os.pread(file, 50_000, before).decode(errors="replace") or "it did not answer\n"


if __name__ == "__main__":
    die_with_parent()
    if os.getppid() != int(sys.argv[1]):  # it has ended before
        sys.exit(1)
    os.execvp(sys.argv[2], sys.argv[2:])
