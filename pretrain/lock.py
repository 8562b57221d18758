"""One job at a time in a run's folder, or in one of exports."""

import fcntl
import os
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

NAME = ".lock"


class Taken(OSError):
    """Another job has written its name into a lock that this process holds."""


class Lock:
    """A folder's lock: this process has it until `close`, or until it ends, however it ends."""

    ours: ClassVar[dict[Path, str]] = {}
    """What this process wrote into the locks that it holds, by folder."""

    def __init__(self, folder: Path, option: str = "run_dir"):
        """Raises BlockingIOError where another process has it, and says which; OSError where the file system has no locks.

        option: what the user calls the folder.
        """
        self._folder = folder.resolve()
        self._file = open(folder / NAME, "a+")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise BlockingIOError(
                f"another job ({holder}) is writing into {folder}; wait for it, or give this one another {option}"
            ) from None
        except OSError as error:
            self._file.close()
            raise OSError(
                f"{folder} cannot be locked against a second job ({error.strerror}); mount its file system with locks (Lustre: "
                f"flock, NFS: local_lock=none), or take a {option} on another one"
            ) from None
        self.mark = f"process {os.getpid()} on {socket.gethostname()}, {secrets.token_hex(4)}\n"
        try:
            self._file.truncate(0)
            self._file.write(self.mark)
            self._file.flush()
        except OSError:
            with suppress(OSError):  # the mark is still in its buffer
                self._file.close()
            raise
        # Else a child that outlives this process would go on holding the lock.
        os.register_at_fork(after_in_child=self._file.close)
        self.ours[self._folder] = self.mark

    def close(self) -> None:
        """Release the lock.

        Nobody's name stays in it: to who has had the folder before, where locks do not reach, a start that was refused is no
        reason to stop.
        """
        self.ours.pop(self._folder, None)
        with suppress(OSError):
            self._file.seek(0)
            if self._file.read() == self.mark:
                self._file.truncate(0)
        self._file.close()


def check(folder: Path) -> None:
    """Look whether a lock that this process holds still says so; where it holds none there is nothing to say.

    Some file systems lock within a host only, and a lock's file can be deleted: then two jobs believe that they have it.

    Raises:
        Taken: another job has written its name there.
    """
    mark = Lock.ours.get(folder.resolve())
    if mark is None or not (folder / NAME).exists():  # the file was deleted: no reason to lose a save
        return
    found = (folder / NAME).read_text()
    if found and found != mark:  # empty: somebody is about to write, or the file system is away for a moment
        raise Taken(f"another job ({found.strip() or 'unknown'}) has begun to write into {folder}; end one of the two")
