"""Where documents come from: the layouts of SlimPajama and StarCoderData.

    folder --> Source.units: input files in sorted order
                  |  one unit is one file
                  v
    Source.documents(unit) --> Document, Document, ...    every line or row, those to drop included, with the reason

Everything streams: a unit of any size takes the memory of its largest document and one decompression buffer. A record
that can't be read raises ValueError with its file and line; nothing is skipped without a count.
"""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

Split = Literal["train", "validation"]

_LINE_BUFFER_BYTES = 1 << 20
_ROWS_A_BATCH = 64  # a row is a whole document, up to megabytes


class Document(NamedTuple):
    """One record of an input file."""

    row: int
    """Position in its file, from 0: the line of a jsonl file, the row of a parquet file."""
    subset: str
    """What the source counts by: SlimPajama's `redpajama_set_name`, StarCoderData's language."""
    text: str
    dropped: str = ""
    """The reason for which the document is left out; empty when it is kept."""


class Source(ABC):
    """A folder of documents in a known layout, and which of them are in."""

    name: ClassVar[str]
    """The name in the manifest."""

    def __init__(self, root: str | Path, split: Split) -> None:
        """`root` is the folder that the publisher's layout begins in."""
        self.root = Path(root)
        self.split = split
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} is not a folder")

    @property
    def settings(self) -> dict[str, Any]:
        """Settings, apart from the split, that decide which documents are in; kept in the manifest."""
        return {}

    @abstractmethod
    def units(self) -> list[str]:
        """Input files relative to the root, with "/", sorted. Raises FileNotFoundError when there are none."""

    @abstractmethod
    def documents(self, unit: str) -> Iterator[Document]:
        """All documents of an input file, in order. Raises ValueError and OSError, naming the file and the line."""


class SlimPajama(Source):
    """SlimPajama-627B: SPLIT/chunk*/*.jsonl.zst with lines {"text", "meta": {"redpajama_set_name"}}.

    RedPajamaGithub is left out, as in TinyLlama's recipe: StarCoderData is the source of code.
    """

    name = "slimpajama"
    excluded: ClassVar[frozenset[str]] = frozenset({"RedPajamaGithub"})

    def units(self) -> list[str]:
        """See Source."""
        return _find(self.root, self.split, ".jsonl.zst")

    def documents(self, unit: str) -> Iterator[Document]:
        """See Source."""
        for row, record in read_jsonl(self.root / unit):
            try:
                subset, text = record["meta"]["redpajama_set_name"], record["text"]
            except (KeyError, TypeError):
                subset = None
            if not isinstance(subset, str):
                raise ValueError(f'{unit} line {row + 1}: no "text" and "meta.redpajama_set_name"') from None
            _check_text(unit, row, text)
            dropped = "excluded subset" if subset in self.excluded else "" if text else "empty"
            yield Document(row, subset, text, dropped)


class StarCoder(Source):
    """StarCoderData: LANGUAGE/train-*.parquet, the document in column `content`; jupyter-*, issues and commits likewise.

    The publisher ships only "train". A document is held out for validation when a hash of its file and row falls below
    `holdout`: train and validation are disjoint, are everything together, and stay so wherever and however often they
    are prepared.
    """

    name = "starcoder"

    def __init__(self, root: str | Path, split: Split, holdout: float) -> None:
        """`holdout` is the share of the documents that go to validation, in (0, 1)."""
        super().__init__(root, split)
        if not 0 < holdout < 1:
            raise ValueError(f"holdout {holdout} is not a share between 0 and 1; 0.001 holds out one document in 1,000")
        self.holdout = holdout

    @property
    def settings(self) -> dict[str, Any]:
        """See Source."""
        return {"holdout": self.holdout}

    def units(self) -> list[str]:
        """See Source."""
        return _find(self.root, "", ".parquet")

    def documents(self, unit: str) -> Iterator[Document]:
        """See Source."""
        subset = unit.split("/")[0]
        validation = self.split == "validation"
        for row, text in read_parquet(self.root / unit, "content"):
            _check_text(unit, row, text)
            elsewhere = _is_held_out(unit, row, self.holdout) != validation
            yield Document(row, subset, text, "other split" if elsewhere else "" if text else "empty")


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """The line number (from 0) and the value of each line of a jsonl.zst file; blank lines are none.

    Raises ValueError for a line that is not JSON in UTF-8 or for a cut zstd frame.
    """
    # pyarrow's stream notices a cut frame; python-zstandard's ends as if the file were complete.
    with pa.OSFile(os.fspath(path)) as raw, pa.CompressedInputStream(raw, "zstd") as stream:
        row = -1
        try:
            for row, line in enumerate(io.BufferedReader(stream, _LINE_BUFFER_BYTES)):
                if not line.isspace():
                    yield row, orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"{path} line {row + 1} is not JSON: {error}") from None
        except OSError as error:
            raise ValueError(f"{path} can't be decompressed after line {row + 1}: {error}") from None


def read_parquet(path: Path, column: str) -> Iterator[tuple[int, Any]]:
    """The row number (from 0) and the value of `column` of each row. Raises ValueError for a broken file."""
    try:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise ValueError(f"{path} has no column {column!r}, only {', '.join(file.schema_arrow.names)}")
            row = 0
            for batch in file.iter_batches(_ROWS_A_BATCH, columns=[column], use_threads=False):
                for text in batch.column(0).to_pylist():
                    yield row, text
                    row += 1
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from None


def _find(root: Path, folder: str, suffix: str) -> list[str]:
    """All files below root/folder with the suffix, relative to root, sorted: no order of a directory listing."""
    found = [path.relative_to(root).as_posix() for path in (root / folder).rglob(f"*{suffix}") if path.is_file()]
    if not found:
        raise FileNotFoundError(f"there is no *{suffix} file in {root / folder}")
    return sorted(found)


def _is_held_out(unit: str, row: int, holdout: float) -> bool:
    digest = hashlib.blake2b(f"{unit}\0{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < holdout * 2.0**64


def _check_text(unit: str, row: int, text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{unit} line {row + 1}: the document is {type(text).__name__}, not text")
