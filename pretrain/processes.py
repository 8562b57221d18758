"""What Linux tells of other processes, and a process's stacks; elsewhere, where there is no /proc, nothing is known."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path


def stat(pid: int) -> list[str]:
    """State, parent, ... of a process, as in proc(5) after the name; nothing where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    """Children and their children, without this process."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(n) for task in tasks for n in (task / "children").read_text().split()]
    except OSError:
        return []
    others = [child for child in children if child != os.getpid()]
    return [found for child in others for found in (child, *descendants(child))]


def kill(pids: list[int]) -> None:
    """SIGKILL to those that there are."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


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
