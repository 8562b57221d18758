"""A command's standard streams, whatever it was started with: one is closed, nobody reads the pipe any more, the disk is full.

    descriptors 0 to 2, opened where they are missing ─> sys.stdout and sys.stderr, which never raise OSError

The two packages meet at data_prep.shard alone, which needs numpy: each has this file, and a test holds them equal.
"""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


@contextmanager
def standard_streams(command: str, lasting: bool = False) -> Iterator[None]:
    """From here on, also while the interpreter ends, no print fails; streams that a notebook or a test has put there stay.

    lasting: the work counts, and not what is printed of it, which is lost where it cannot be written. Other commands end: with
    the status of who dies of SIGPIPE where nobody reads any more, and else with a line and status 2.
    """
    for descriptor in range(3):
        _open_if_missing(descriptor)
    if os.environ.get("COLUMNS") == "0":  # a width that is not known; rich would print nothing
        del os.environ["COLUMNS"]

    def end(error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            raise SystemExit(128 + signal.SIGPIPE)
        print(f"{command}: error: standard output cannot be written: {error.strerror}", file=sys.stderr)
        raise SystemExit(2)

    if sys.stderr is sys.__stderr__:
        sys.stderr = _stream(2, sys.stderr, "backslashreplace", _nothing)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _stream(1, sys.stdout, "replace", _nothing if lasting else end)
    try:
        yield
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _open_if_missing(descriptor: int) -> None:
    """Otherwise the next file or socket would get this number, and lose it in a child process.

    All lower ones are open, so os.open returns exactly this one.
    """
    try:
        os.fstat(descriptor)
    except OSError:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _stream(descriptor: int, before: TextIO | None, errors: str, lost: Callable[[OSError], None]) -> TextIO:
    """What `before` is, None where there is none; a character that its encoding does not have is no error."""
    by_line = before is not None and bool(before.line_buffering or getattr(before, "write_through", False))
    encoding = "utf-8" if before is None else before.encoding
    return io.TextIOWrapper(io.BufferedWriter(_Output(descriptor, lost)), encoding, errors, line_buffering=by_line)


def _nothing(error: OSError) -> None:
    pass


class _Output(io.FileIO):
    """What cannot be written is left out, and `lost` hears of it, once."""

    def __init__(self, descriptor: int, lost: Callable[[OSError], None]):
        super().__init__(descriptor, "w", closefd=False)
        self._lost = lost

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            lost, self._lost = self._lost, _nothing
            lost(error)
            return len(data)
