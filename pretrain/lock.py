"""One job at a time in a run's folder."""

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO


def lock(run_dir: Path) -> TextIO:
    """Lock the folder for this process until the file that is returned is closed, or the process ends however it ends.

    Raises:
        BlockingIOError: another process has it; says which.
    """
    file = open(run_dir / ".lock", "a+")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise BlockingIOError(
            f"another job ({holder}) is writing into {run_dir}; wait for it, or give this one another run_dir"
        ) from None
    os.register_at_fork(after_in_child=file.close)  # a loader's process must not hold the lock when this one was killed
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
