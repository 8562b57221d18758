"""Anyone's data: files of one's own, and datasets of the Hub. The commands `data-prep text` and `data-prep hf`.

    GLOB   --> *.jsonl, anything else as plain text, both plain, .gz or .zst; *.parquet --> a unit a file
    NAME   --> datasets.load_dataset(..., streaming=True) -------------------------------> a unit a file of the dataset

Both are examples of how a source is added: a class with `units` and `documents`, an options class that makes one.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.prepare import WorkOptions
from data_prep.readers import CODECS, Bad, Position, Record, read_jsonl, read_parquet, read_text
from data_prep.sources import UNKNOWN, Document, Source, Split, document, is_held_out

_JSONL = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True, kw_only=True)
class TextOptions(WorkOptions):
    """Prepare files of your own: parquet; jsonl or plain text, as they are or compressed with gzip or zstd."""

    input: list[str] = field(
        metadata={
            "nargs": "+",
            "help": "Files, or patterns in quotes such as 'DIR/**/*.jsonl.zst'; what is neither jsonl nor parquet by its "
            "suffix is plain text",
        }
    )
    text_key: str = "text"
    """Key (a.b for b inside a) or column that holds the document."""
    subset_key: str | None = None
    """Key of jsonl lines to count by; without it files count by the folder they lie in."""
    separator: str | None = None
    """Line that ends a document in plain text, such as "<|endoftext|>"; without it a file is one document."""
    split: Split = "train"
    """Which part: train, or validation, which is the share that holdout gives."""
    holdout: float = 0.0
    """Share of the documents that is held out of train for validation; the same for both splits."""

    def source(self) -> Source:
        """See WorkOptions."""
        return TextFiles(self.input, self.text_key, self.subset_key, self.separator, self.split, self.holdout)


class TextFiles(Source):
    """Files that match some patterns."""

    name = "text"

    def __init__(
        self,
        patterns: list[str],
        text_key: str = "text",
        subset_key: str | None = None,
        separator: str | None = None,
        split: Split = "train",
        holdout: float = 0.0,
    ) -> None:
        """See TextOptions. Raises ValueError for a validation split of nothing."""
        if not 0 <= holdout < 1:
            raise ValueError(f"holdout {holdout} is not a share in [0, 1); 0.001 holds out one document in 1,000")
        if split == "validation" and not holdout:
            raise ValueError(
                "the validation split is empty with --holdout 0: give both splits the same --holdout, 0.001"
            )
        super().__init__(os.path.commonpath([_fixed_part(pattern) for pattern in patterns]), split)
        self.patterns, self.text_key, self.subset_key = patterns, text_key, subset_key
        self.separator, self.holdout = separator, holdout

    @property
    def settings(self) -> dict[str, Any]:
        """See Source."""
        names = ("text_key", "subset_key", "separator", "holdout")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def units(self) -> list[str]:
        """See Source."""
        found = {
            path for pattern in self.patterns for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)
        }
        if not found:
            raise FileNotFoundError(f"no file matches {' '.join(self.patterns)}; ** reaches into folders")
        for path in sorted(found):
            if path.endswith(tuple(f".parquet{codec}" for codec in CODECS)):
                raise ValueError(f"{path} is parquet, which is compressed in itself: decompress it, or leave it out")
        return sorted(Path(os.path.abspath(path)).relative_to(self.root).as_posix() for path in found)

    def documents(self, unit: str, position: Position | None = None) -> Iterator[Document]:
        """See Source."""
        folder = os.path.dirname(unit) or "all"
        validation = self.split == "validation"
        in_json = not unit.endswith(".parquet")  # of which a record is the column's value
        for row, record in self._records(unit, position):
            subset, text = folder, record
            if in_json and not isinstance(record, str | Bad):  # a line of a text file is the text itself
                text = _value(record, self.text_key)
                if self.subset_key:
                    found = _value(record, self.subset_key)
                    subset = found if isinstance(found, str) else UNKNOWN
            elsewhere = self.holdout > 0 and is_held_out(unit, row, self.holdout) != validation
            yield document(row, subset, text, "other split" if elsewhere else "")
            record = text = None  # let go before the next is read

    def _records(self, unit: str, position: Position | None) -> Iterator[Record]:
        path = self.root / unit
        plain = path.with_suffix("") if path.suffix in CODECS else path
        if plain.suffix in _JSONL:
            return read_jsonl(path, position)
        if path.suffix == ".parquet":
            return read_parquet(path, self.text_key, position)
        return read_text(path, self.separator, position)


def _fixed_part(pattern: str) -> str:
    """The folder above the first wildcard, absolute: names of units do not depend on what else lies there."""
    parts = Path(os.path.abspath(pattern)).parts
    fixed = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return os.path.join(*parts[: max(1, fixed)])


def _value(record: Any, key: str) -> Any:
    """record[key], or record[a][b] for the key "a.b"; a `Bad` when there is none."""
    if isinstance(record, dict) and key in record:
        return record[key]
    for part in key.split("."):
        if not isinstance(record, dict) or part not in record:
            return Bad("missing field", f"the line has no {key!r}")
        record = record[part]
    return record


# --- Hugging Face datasets -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HubOptions(WorkOptions):
    """Prepare a dataset of the Hugging Face Hub, or a local one that `datasets` loads, streaming."""

    dataset: str
    """Name on the Hub, or path of a local dataset."""
    split: str
    """Split of the dataset, such as train."""
    config: str | None = None
    """Configuration (subset) of the dataset."""
    revision: str | None = None
    """Commit or tag; without one it is the newest, which may change between a run and its restart."""
    text_key: str = "text"
    """Column that holds the document."""

    def source(self) -> Source:
        """See WorkOptions."""
        return HubDataset(self.dataset, self.split, self.config, self.revision, self.text_key)


class HubDataset(Source):
    """A dataset that the library `datasets` streams; its files are the units."""

    name = "hf"

    def __init__(
        self, dataset: str, split: str, config: str | None = None, revision: str | None = None, text_key: str = "text"
    ) -> None:
        """See HubOptions. Raises ValueError for a dataset, configuration, split or column that does not exist."""
        if not dataset:
            raise ValueError("--dataset is empty: give a name on the Hub, or the path of a local dataset")
        self.dataset, self.split, self.config, self.revision, self.text_key = dataset, split, config, revision, text_key
        self._stream: Any = None
        columns = self._load().column_names
        if columns is not None and text_key not in columns:
            raise ValueError(f"{dataset} has no column {text_key!r}, only {', '.join(columns)}; give --text_key")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_stream": None}  # a worker opens its own

    @property
    def settings(self) -> dict[str, Any]:
        """See Source."""
        names = ("dataset", "config", "revision", "text_key")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def units(self) -> list[str]:
        """See Source."""
        count = self._load().num_shards
        return [f"shard-{n:05d}-of-{count:05d}" for n in range(count)]

    def documents(self, unit: str, position: Position | None = None) -> Iterator[Document]:
        """See Source. Whatever goes wrong while streaming stops the unit: it may be the network."""
        stream = self._load().select_columns([self.text_key])
        stream = stream.shard(num_shards=stream.num_shards, index=int(unit.split("-")[1]))
        try:
            for row, record in enumerate(stream):
                yield document(row, self.config or "all", record[self.text_key])
        except Exception as error:  # datasets raises whatever its readers and the network do
            if isinstance(error, OSError) and error.errno is not None:  # the machine's, which may pass
                where = error.filename or f"{self.dataset} {unit}"
                raise OSError(error.errno, error.strerror or str(error), where) from error
            raise OSError(f"{self.dataset} {unit} can't be read: {error}; run the same command again") from error

    def source_bytes(self, unit: str) -> int:
        """See Source: unknown."""
        return 0

    def _load(self) -> Any:
        if self._stream is None:
            import datasets

            try:
                self._stream = datasets.load_dataset(
                    self.dataset, self.config, split=self.split, revision=self.revision, streaming=True
                )
            except (ValueError, FileNotFoundError, ConnectionError) as error:
                raise ValueError(f"can't load the dataset {self.dataset!r}, split {self.split!r}: {error}") from None
        return self._stream
