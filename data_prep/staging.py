"""Files that appear whole or not at all: staged beside their place, synced, renamed.

The standard library, nothing else.
"""

import os
import secrets
import socket
import time
from pathlib import Path


def staged_path(path: Path) -> Path:
    """Where to write what is then renamed to `path`: another file each time, so that two writers never mix in one."""
    return path.with_name(f"{path.name[:40]}{_staged_here()}{secrets.token_hex(4)}.tmp")


def is_left_over(staged: Path) -> bool:
    """Whether a staged file was left by a killed writer: any of this host's (the caller is its only writer), others' when
    older than a day.
    """
    try:
        return _staged_here() in staged.name or time.time() - staged.stat().st_mtime > 86400
    except FileNotFoundError:
        return False


def _staged_here() -> str:
    return f".{socket.gethostname()[:60]}-"


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, durably, at once or not at all: stage beside it, fsync, rename, fsync the folder.

    Raises OSError, naming the file: what a write raises names none.
    """
    staged = staged_path(path)
    try:
        with open(staged, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        staged.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
