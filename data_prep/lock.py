"""Locks between runs: two of them never write into one folder, whatever happened to the first.

    a whole run, data-prep finish   OUT/lock exclusive
    task K of N                     OUT/lock shared + OUT/lock.K-of-N exclusive, and no lock of another N held

The kernel lets go of a lock when its process ends, however it ends: nothing to clean up after a crash.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_NAME = "lock"


class Held(OSError):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock that the file `path` stands for. Raises Held when another process does, unless told to wait."""
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, kind)
        except BlockingIOError:
            os.close(fd)
            raise Held(f"{path} is held by another process") from None
        except OSError as error:  # a file system without locks
            print(
                f"data-prep: {path} can't be locked ({error}): see that no other run uses the folder", file=sys.stderr
            )
        try:
            same = os.fstat(fd).st_ino == os.stat(path).st_ino
        except FileNotFoundError:
            same = False
        if same:
            break
        os.close(fd)  # whoever held it has taken the file away: this lock binds nobody
    try:
        yield
    finally:
        os.close(fd)


@contextmanager
def only_run(out: Path, task: int, tasks: int) -> Iterator[None]:
    """Be the only run in `out`, or the only one that is task `task` of `tasks`. Raises ValueError when it is not."""
    out.mkdir(parents=True, exist_ok=True)
    own = out / f"{LOCK_NAME}.{task}-of-{tasks}"
    try:
        if tasks == 1:
            with locked(out / LOCK_NAME):
                yield
        else:
            with locked(out / LOCK_NAME, shared=True), locked(own):
                _refuse_other_arrays(out, tasks)
                yield
    except Held as error:
        raise ValueError(f"another data-prep is at work in {out} ({error}): wait for it, or end it") from None


def _refuse_other_arrays(out: Path, tasks: int) -> None:
    for path in out.glob(f"{LOCK_NAME}.*-of-*"):
        if not path.name.endswith(f"-of-{tasks}"):
            with locked(path):
                pass
