"""The command line's manners: one clear line for what a user did wrong, exit status 2, never a traceback."""

import argparse
import difflib
import os
import re
import signal
import sys
import time
from typing import Any, NoReturn

import jsonargparse

from pretrain.hosts import this_host

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

PATIENCE_S = 5.0
"""How long a rank waits for what the first one has to say (seconds)."""

_NO_KEYS = re.compile(
    r"Does not validate against any of the Union subtypes\s+Subtypes: \[[^\]]*'pretrain.*Given value: (.*)|"
    r"Not a valid subclass of \w+\.\s+Got value: (.*?)\s+Subclass types expect.*|Expected a dot import path string: (.*)",
    re.DOTALL,
)
"""How jsonargparse says that something else stands where a dataclass should."""


class Parser(jsonargparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest key where one is unknown."""

    command = "pretrain"
    """What the user called; jsonargparse makes parsers of its own for parts of a configuration."""
    explained_by = "pretrain"
    """The command whose --help explains the keys; that of a command which only names a file does not."""

    def __init__(self, *args: Any, prog: str | None = None, explained_by: str | None = None, **options: Any):
        super().__init__(*args, prog=prog, **options)
        Parser.command = prog or Parser.command
        Parser.explained_by = explained_by or prog or Parser.explained_by

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print `message` as one line and exit with status 2."""
        message = re.sub(r"<class '(\w+)'>", r"\1", str(message)).replace("typing.Literal", "one of ")
        message = re.sub(_NO_KEYS, r"it has \1\2\3 where keys must stand", message)
        fail(self.command, message + self._suggestion(message) + f" ({self.explained_by} --help explains every key)")

    def _suggestion(self, message: str) -> str:
        unknown = re.search(r"[Oo]ption '([\w.]+)'|arguments: --([\w.]+)", message)
        if not unknown:
            return ""
        group = re.search(r"Group '([\w.]+)' does", message)
        known = [action.dest for action in self._actions]
        name = ".".join(part for part in (group and group[1], unknown[1] or unknown[2]) if part)
        near = difflib.get_close_matches(name, known, n=1)
        return f"; did you mean {near[0]}?" if near else ""


class OptionsParser(argparse.ArgumentParser):
    """A parser of a command's own options, apart from the configuration's keys; its errors, too, are one line."""

    def error(self, message: str) -> NoReturn:
        """Print `message` as one line and exit with status 2."""
        fail(self.prog, f"{message} ({self.prog} --help explains every option)")


def fail(command: str, message: object, status: int = 2) -> NoReturn:
    """Print one line on standard error and exit.

    Rank 0 prints at once, the others only after `PATIENCE_S`: a launcher ends all ranks when one has left, and would catch them
    in the middle of their imports. A rank that is still there after that has a problem, or a log, of its own, and prints its own
    line.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(status))
        time.sleep(PATIENCE_S)
        command = f"rank {rank} on {this_host()}: {command}"
    print(f"{command}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(status)
