"""What a user sees of a running preparation: a bar on a terminal, elsewhere a line a minute, and a closing table."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from data_prep.shard import Manifest

SECONDS_A_LINE = 60.0
SECONDS_A_FRAME = 0.25


class Display:
    """Follows the work of all workers together; use as a context manager around the work."""

    def __init__(self, label: str, files: int, total_bytes: int) -> None:
        """`files` input files of `total_bytes` in all (compressed, as they lie on disk) are to be done."""
        self._label, self._files, self._bytes = label, files, total_bytes
        self._files_done = self._bytes_done = self._tokens_done = 0
        self._console = Console(highlight=False, soft_wrap=True)
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            columns = (
                TextColumn(self._label),
                BarColumn(None),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task(self._label, total=1.0, figures="")
            self._bar.start()
        return self

    def tick(self, bytes_done: int, tokens_done: int) -> None:
        """So many bytes have been read and tokens made by now, in all workers together."""
        self._bytes_done, self._tokens_done = bytes_done, tokens_done
        now = time.monotonic()
        share = self._bytes_done / self._bytes if self._bytes else self._files_done / max(1, self._files)
        if self._bar is not None:
            if now - self._last_line >= SECONDS_A_FRAME:
                self._last_line = now
                self._bar.update(self._task, completed=share, figures=self._figures(now - self._start))
        elif now - self._last_line >= SECONDS_A_LINE:
            self._last_line = now
            left = (
                f"{(now - self._start) * (1 - share) / share / 60:.0f} min left"
                if share
                else "the time left is not known"
            )
            self._console.print(f"{self._label}: {self._figures(now - self._start)}, {left}")

    def file_done(self) -> None:
        """One more input file is done."""
        self._files_done += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _figures(self, seconds: float) -> str:
        seconds = max(seconds, 1e-9)
        return (
            f"{self._files_done:,}/{self._files:,} files  {self._bytes_done / seconds / 1e6:.1f} MB/s  "
            f"{self._tokens_done / seconds / 1e6:.2f}M tokens/s"
        )


def print_totals(manifest: Manifest) -> None:
    """The closing table: where every document went, by subset."""
    table = Table(title=f"{manifest.name} {manifest.split}", title_justify="left")
    reasons = sorted(manifest.dropped)
    for column in ("subset", "read", "kept", *(f"dropped: {reason}" for reason in reasons), "tokens"):
        table.add_column(column, justify="left" if column == "subset" else "right", no_wrap=column == "subset")
    for name, counts in sorted(manifest.subsets.items()):
        read = counts.documents + sum(counts.dropped.values())
        dropped = [counts.dropped.get(reason, 0) for reason in reasons]
        table.add_row(name, *(f"{n:,}" for n in (read, counts.documents, *dropped, counts.tokens)))
    read = manifest.documents + sum(manifest.dropped.values())
    table.add_section()
    dropped = [manifest.dropped[reason] for reason in reasons]
    table.add_row("all", *(f"{n:,}" for n in (read, manifest.documents, *dropped, manifest.tokens)))
    Console().print(table)
