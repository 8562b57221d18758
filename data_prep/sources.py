"""Where documents come from: what a source is, and the layouts of SlimPajama and StarCoderData.

    folder --> Source.units: input files in sorted order
                  |  one unit is one file
                  v
    Source.documents(unit) --> Document, Document, ...    every line or row; those to drop with the reason, the broken
                                                          ones with what is wrong with them

To add a source: a class with a `name`, `units` and `documents`; `data_prep.own_data` has two more examples. Everything
streams: a unit of any size takes the memory of its largest document and one buffer.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from data_prep.readers import Bad, Position, read_jsonl, read_parquet

Split = Literal["train", "validation"]

UNKNOWN = "unknown"
"""The subset of a document that is too broken to say which it belongs to."""


class Document(NamedTuple):
    """One record of an input file, or what is left of it."""

    row: int
    """Position in its file, from 0: the line of a jsonl file, the row of a parquet file."""
    subset: str
    """What the source counts by: SlimPajama's `redpajama_set_name`, StarCoderData's language."""
    text: str
    dropped: str = ""
    """The reason for which the document is left out; empty when it is kept."""
    bad: Bad | None = None
    """What is wrong with it, when that is the reason; a few such are borne, more stop the work."""


class Source(ABC):
    """A folder of documents in a known layout, and which of them are in."""

    name: ClassVar[str]
    """The name in the manifest."""

    def __init__(self, root: str | Path, split: str) -> None:
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
    def documents(self, unit: str, position: Position | None = None) -> Iterator[Document]:
        """All documents of an input file, in order; `position` follows the reading. Raises OSError, naming the file."""

    def source_bytes(self, unit: str) -> int:
        """Size of an input file now, in bytes; 0 where nobody knows."""
        return (self.root / unit).stat().st_size


class SlimPajama(Source):
    """SlimPajama-627B: SPLIT/chunk*/*.jsonl.zst with lines {"text", "meta": {"redpajama_set_name"}}.

    RedPajamaGithub is left out, as in TinyLlama's recipe: StarCoderData is the source of code.
    """

    name = "slimpajama"
    excluded: ClassVar[frozenset[str]] = frozenset({"RedPajamaGithub"})

    def units(self) -> list[str]:
        """See Source."""
        return find(self.root, self.split, ".jsonl.zst")

    def documents(self, unit: str, position: Position | None = None) -> Iterator[Document]:
        """See Source."""
        for row, record in read_jsonl(self.root / unit, position):
            subset, text = UNKNOWN, record
            if not isinstance(record, Bad):
                try:
                    subset, text = record["meta"]["redpajama_set_name"], record["text"]
                except (KeyError, TypeError):
                    text = Bad("missing field", 'the line has no "text" and "meta.redpajama_set_name"')
                if not isinstance(subset, str):
                    subset, text = UNKNOWN, Bad("missing field", '"meta.redpajama_set_name" is not a name')
            yield document(row, subset, text, "excluded subset" if subset in self.excluded else "")
            record = text = None  # let go before the next is read: with documents of 100 MB it matters


class StarCoder(Source):
    """StarCoderData: FOLDER/*.parquet, the document in column `content`; a folder a language, and none within it.

    The publisher's special folders (jupyter-scripts-dedup-filtered, jupyter-structured-clean-dedup,
    github-issues-filtered-structured, git-commits-cleaned) have other columns beside it than the languages do, but their
    whole text stands in it too, with marks like <commit_before>, <issue_start> and <jupyter_code>, which are text here.
    So nothing but `content` is read. They count as subsets. A file without that column is named, not passed over.

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
        """See Source. Raises ValueError for a file in another depth: its language and the hash are of the path below the root."""
        units = find(self.root, "", ".parquet")
        for unit in units:
            if unit.count("/") != 1:
                raise ValueError(
                    f"{self.root / unit} does not lie in FOLDER/*.parquet below --input {self.root}: give the folder "
                    "that holds the languages' folders, or each document counts to another language and falls to another split"
                )
        return units

    def documents(self, unit: str, position: Position | None = None) -> Iterator[Document]:
        """See Source."""
        subset = unit.split("/")[0]
        validation = self.split == "validation"
        for row, text in read_parquet(self.root / unit, "content", position):
            elsewhere = is_held_out(unit, row, self.holdout) != validation
            yield document(row, subset, text, "other split" if elsewhere else "")
            text = None  # as above


def document(row: int, subset: str, text: Any, dropped: str = "") -> Document:
    """A Document of whatever was found where its text should be: a text, a `Bad`, or anything else, which is bad too."""
    if isinstance(text, str):
        return Document(row, subset, text, dropped or ("" if text else "empty"))
    bad = text if isinstance(text, Bad) else Bad("not text", f"the document is {type(text).__name__}, not text")
    return Document(row, subset, "", bad.reason, bad)


def find(root: Path, folder: str, suffix: str) -> list[str]:
    """All files below root/folder with the suffix, relative to root, sorted: no order of a directory listing.

    Links are followed, to each folder once. Raises FileNotFoundError for no file, OSError for a folder that can't be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    top, found, seen = root / folder, [], set[tuple[int, int]]()
    for at, folders, files in os.walk(top, onerror=refuse, followlinks=True) if top.is_dir() else ():
        facts = os.stat(at)
        if (facts.st_dev, facts.st_ino) in seen:
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders.sort()  # so that of two ways to a folder the same one counts every time
        found += [(Path(at) / name).relative_to(root).as_posix() for name in files if name.endswith(suffix)]
    if not found:
        raise FileNotFoundError(f"there is no *{suffix} file in {top}")
    return sorted(found)


def is_held_out(unit: str, row: int, holdout: float) -> bool:
    """Whether a document belongs to validation; a pure function of its place."""
    digest = hashlib.blake2b(f"{unit}\0{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < holdout * 2.0**64
