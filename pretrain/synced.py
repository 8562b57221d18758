"""How a checkpoint's files come to the disk: synced on the way, so that the disk's pace is seen, and not that of the memory."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem

_SYNCED = 2**28
"""So many bytes (256 MiB) are synced at a time: the disk's pace is seen, not that of the host's memory."""


class Writer(dcp.FileSystemWriter):
    """DCP's writer, but what is wrong with the disk is not hidden by what torch.save says of the file that came of it."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        """Raises OSError for a disk that is full or fails."""
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


class Files(FileSystem):
    """DCP's files, but what is written is synced on the way, and each time a sign of life is given."""

    def __init__(self, alive: Callable[[], None]):
        self._alive = alive

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        """A file that is open as long as the block."""
        with super().create_stream(path, mode) as stream:
            yield _Stream(stream, self._alive)


class _Stream:
    """A file to write; all but `write` and `fileno` is the file's own."""

    def __init__(self, file: Any, alive: Callable[[], None]):
        self._file, self._alive, self._unsynced = file, alive, 0

    def write(self, data: Any) -> int:
        """Returns how many bytes."""
        written = self._file.write(data)
        self._unsynced += written
        if self._unsynced >= _SYNCED:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._unsynced = 0
            self._alive()
        return written

    def fileno(self) -> int:
        """For whoever syncs: DCP syncs its index without having flushed it."""
        self._file.flush()
        return self._file.fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def write(path: Path, text: str) -> None:
    """A small file, on the disk when it returns."""
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
