"""The manifest of a dataset: what its shards are, in which order, and where every document went.

    Shard, Shard, ... --> Manifest --> save: manifest.json, written last; a folder without one is not a dataset
                                         |
                          Manifest <-- load: version, names, totals, fingerprint and the size of every file checked

`data_prep.shard` hands all of this on to those who are not part of it. The standard library and numpy, nothing else.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.staging import write_atomically

FORMAT = "cria-shards"
VERSION = 1
MANIFEST_NAME = "manifest.json"

DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4"), "int32": np.dtype("<i4")}
"""Names of token types in a manifest. int32 occurs only in files that others packed."""


@dataclass(frozen=True)
class TokenizerInfo:
    """What a reader of token ids must know about the tokenizer that made them."""

    fingerprint: str
    """Digest "sha256:HEX" over what determines the ids; two datasets mix only when these are equal."""
    kind: str
    """Either "sentencepiece" or "huggingface"."""
    vocab_size: int
    """Ids lie in [0, vocab_size)."""
    bos_id: int | None
    """Id of the begin-of-sequence token, None when there is none."""
    eos_id: int | None
    """Id of the end-of-sequence token, None when there is none."""

    def __post_init__(self) -> None:
        _check_digest("tokenizer fingerprint", self.fingerprint)
        if self.kind not in ("sentencepiece", "huggingface"):
            raise ValueError(f"tokenizer kind {self.kind!r} is neither sentencepiece nor huggingface")
        check_counts("tokenizer", vocab_size=self.vocab_size)
        for name, value in (("bos_id", self.bos_id), ("eos_id", self.eos_id)):
            if value is not None and not (type(value) is int and 0 <= value < self.vocab_size):
                raise ValueError(f"tokenizer {name} {value!r} is not an id in [0, vocab_size {self.vocab_size})")

    def marks_a_document(self, append_eos: bool, prepend_bos: bool) -> int:
        """How many EOS, or BOS, a document has that has any: two where both are set and one token is both, as GPT-2's is."""
        return 2 if append_eos and prepend_bos and self.bos_id == self.eos_id else 1


@dataclass(frozen=True)
class Shard:
    """One file of tokens and where it came from. An input file that yields nothing still has its shard, of 0 tokens."""

    path: str
    """Relative to the dataset's folder, with "/"."""
    dtype: str
    """A key of DTYPES; little-endian."""
    offset: int
    """Bytes before the first token."""
    tokens: int
    """Number of tokens."""
    checksum: str
    """Digest "sha256:HEX" over the bytes of the tokens alone, without the header."""
    source_file: str
    """The input file, relative to the input folder."""
    documents: int
    """Documents kept."""
    dropped: dict[str, int] = field(default_factory=dict, hash=False)
    """Documents dropped, by reason. Documents read = documents + sum(dropped)."""

    def __post_init__(self) -> None:
        check_inside(self.path)
        if type(self.source_file) is not str or type(self.dropped) is not dict:
            what = f"source_file {self.source_file!r} is not text, or dropped {self.dropped!r} no counts by reason"
            raise ValueError(f"shard {self.path}: {what}")
        if self.dtype not in DTYPES:
            raise ValueError(f"shard {self.path}: dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        check_counts(f"shard {self.path}", offset=self.offset, tokens=self.tokens, documents=self.documents)
        if self.dropped:
            check_counts(f"shard {self.path}: dropped", **self.dropped)
        _check_digest(f"shard {self.path}: checksum", self.checksum)

    @property
    def end(self) -> int:
        """Bytes that the file must have at least."""
        return self.offset + self.tokens * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class SubsetTotals:
    """What one subset (SlimPajama's `redpajama_set_name`, StarCoderData's language) adds to a dataset."""

    documents: int = 0
    """Documents kept."""
    tokens: int = 0
    """Tokens, with BOS and EOS."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Documents dropped, by reason."""

    def __post_init__(self) -> None:
        check_counts("subset", documents=self.documents, tokens=self.tokens, **self.dropped)


@dataclass(frozen=True)
class Manifest:
    """One dataset: which shards in which order, by which tokenizer, from which documents."""

    name: str
    """The kind of the source: "slimpajama", "starcoder"."""
    split: str
    """Either "train" or "validation"; of a Hugging Face dataset whatever its split is called."""
    tokenizer: TokenizerInfo
    append_eos: bool
    """Each document ends with EOS."""
    prepend_bos: bool
    """Each document begins with BOS."""
    shards: tuple[Shard, ...]
    """In the order of the tokens."""
    subsets: dict[str, SubsetTotals] = field(default_factory=dict)
    """Totals by subset; empty when the source has none."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further settings of the source that decided which documents are in (StarCoderData's holdout)."""

    @property
    def begins_after(self) -> int | None:
        """The mark after which a document's text begins: BOS, else the EOS of the one before; None where there is neither."""
        return self.tokenizer.bos_id if self.prepend_bos else self.tokenizer.eos_id if self.append_eos else None

    def __post_init__(self) -> None:
        check_types("manifest", str, name=self.name, split=self.split)
        check_types("manifest", bool, append_eos=self.append_eos, prepend_bos=self.prepend_bos)
        check_types("manifest", dict, subsets=self.subsets, settings=self.settings)
        if self.append_eos and self.tokenizer.eos_id is None:
            remedy = "name it in tokenizer_config.json, or give --append_eos false"
            raise ValueError(f"append_eos is set, but the tokenizer has no EOS token: {remedy}")
        if self.prepend_bos and self.tokenizer.bos_id is None:
            remedy = "name it in tokenizer_config.json, or give --prepend_bos false"
            raise ValueError(f"prepend_bos is set, but the tokenizer has no BOS token: {remedy}")
        paths = {shard.path for shard in self.shards}
        if len(paths) != len(self.shards):
            raise ValueError(f"{len(self.shards)} shards have only {len(paths)} different paths")
        if self.subsets:
            for what in ("documents", "tokens"):
                by_subset, total = sum(getattr(s, what) for s in self.subsets.values()), getattr(self, what)
                if by_subset != total:
                    raise ValueError(f"the subsets have {by_subset:,} {what} in all, the shards {total:,}")
            if _add_up(s.dropped for s in self.subsets.values()) != self.dropped:
                raise ValueError("the subsets and the shards disagree on the dropped documents")

    @cached_property
    def documents(self) -> int:
        """Documents kept."""
        return sum(shard.documents for shard in self.shards)

    @cached_property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @cached_property
    def dropped(self) -> dict[str, int]:
        """Documents dropped, by reason."""
        return _add_up(shard.dropped for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """Digest "sha256:HEX" of what determines the stream of tokens; where it lies on disk does not."""
        digest = hashlib.sha256()
        policy = (self.tokenizer.fingerprint, self.tokenizer.vocab_size, self.append_eos, self.prepend_bos)
        digest.update(repr((FORMAT, VERSION, *policy)).encode())
        for shard in self.shards:
            if shard.tokens:
                digest.update(f"\n{shard.dtype} {shard.tokens} {shard.checksum}".encode())
        return f"sha256:{digest.hexdigest()}"

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write DIRECTORY/manifest.json at once or not at all."""
        body = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        body["tokenizer"] = vars(self.tokenizer)
        body["subsets"] = {name: vars(totals) for name, totals in sorted(self.subsets.items())}
        shards = body.pop("shards")
        head = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint, **body, "totals": self._totals()}
        # One line a shard: 60,000 of them stay readable, and a diff names the shard that changed.
        lines = ",\n".join("  " + json.dumps(_stored(shard)) for shard in shards)
        text = json.dumps(head, indent=1)[:-2] + f',\n "shards": [\n{lines}\n ]\n}}\n'
        write_atomically(Path(directory) / MANIFEST_NAME, text.encode())

    @classmethod
    def load(cls, directory: str | os.PathLike[str], check_files: bool = True) -> Manifest:
        """Read and check DIRECTORY/manifest.json and, unless another process of the same job does, the size of every shard.

        Raises FileNotFoundError without a manifest or a shard; ValueError for a manifest of another version, damaged,
        inconsistent or leading out of the folder, and for a shard too short for its tokens (reading on would end in
        wrong tokens, or SIGBUS under a memory map).
        """
        return cls.load_with_facts(directory, check_files)[0]

    @classmethod
    def load_with_facts(
        cls, directory: str | os.PathLike[str], check_files: bool = True
    ) -> tuple[Manifest, np.ndarray | None]:
        """What `load` returns and, if `check_files`, what `file_facts` does."""
        collected = gc.isenabled()
        gc.disable()  # none of some 60,000 shards is garbage, and looking for it would take a third of the time
        try:
            return cls._load(Path(directory), check_files)
        finally:
            if collected:
                gc.enable()

    @classmethod
    def _load(cls, directory: Path, check_files: bool) -> tuple[Manifest, np.ndarray | None]:
        path = directory / MANIFEST_NAME
        try:
            raw = read_object(path, "the file is damaged; prepare the dataset again")
        except FileNotFoundError:
            hint = "prepare it with data-prep; the manifest is written last, so an unfinished run has none"
            raise FileNotFoundError(f"{path} does not exist: {hint}") from None
        try:
            manifest = cls._from_json(raw)
            facts = manifest.file_facts(directory) if check_files else None
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: not a manifest that this version can read: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return manifest, facts

    @classmethod
    def _from_json(cls, raw: dict[str, Any]) -> Manifest:
        if raw.pop("format", None) != FORMAT:
            raise ValueError(f'not a dataset of ours: "format" is not "{FORMAT}"')
        version = raw.pop("version")
        if version != VERSION:
            raise ValueError(f"version {version}, this code reads version {VERSION}: update Cria or prepare again")
        fingerprint, totals = raw.pop("fingerprint"), raw.pop("totals")
        raw["tokenizer"] = TokenizerInfo(**raw["tokenizer"])
        raw["subsets"] = {name: SubsetTotals(**counts) for name, counts in raw["subsets"].items()}
        raw["shards"] = tuple(Shard(**shard) for shard in raw["shards"])
        manifest = cls(**raw)
        if totals != manifest._totals():
            raise ValueError(f"its totals {totals} are not the sums over its shards, {manifest._totals()}")
        if fingerprint != manifest.fingerprint:
            raise ValueError(f"its fingerprint {fingerprint} is not that of its content, {manifest.fingerprint}")
        return manifest

    def _totals(self) -> dict[str, Any]:
        return {"documents": self.documents, "tokens": self.tokens, "dropped": self.dropped}

    def file_facts(self, directory: Path) -> np.ndarray:
        """Size in bytes, modification and change time in ns of each shard's file, int64 (shards, 3). One lstat a shard.

        Raises FileNotFoundError, or ValueError for what is not a regular file inside the folder, as long as its tokens need.
        """
        root = os.path.realpath(directory)
        for folder in {os.path.dirname(shard.path) for shard in self.shards}:
            real = os.path.realpath(os.path.join(root, folder))
            if os.path.commonpath((root, real)) != root:
                raise ValueError(f"folder {folder} is a link that leads out of the dataset, to {real}")

        def one(shard: Shard) -> tuple[int, int, int]:
            try:
                status = os.lstat(f"{root}/{shard.path}")
            except OSError as error:
                raise FileNotFoundError(f"shard {shard.path} of {directory} is missing ({error.strerror})") from None
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"shard {shard.path} is not a regular file (a link may lead out of the dataset)")
            if status.st_size < shard.end:
                raise ValueError(
                    f"shard {shard.path} has {status.st_size:,} bytes, its {shard.tokens:,} tokens need {shard.end:,}: "
                    "it was cut short; copy or prepare it again"
                )
            return status.st_size, status.st_mtime_ns, status.st_ctime_ns

        return _ask_all(one, self.shards)


def _stored(shard: Shard) -> dict[str, Any]:
    return {name: value for name, value in vars(shard).items() if name != "dropped" or value}


def _add_up(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Sums by key, keys sorted."""
    sums: dict[str, int] = {}
    for one in counts:
        for key, value in one.items():
            sums[key] = sums.get(key, 0) + value
    return dict(sorted(sums.items()))


def check_types(what: str, kind: type, /, **values: object) -> None:
    """Raises ValueError where a value is not of exactly this type; `what` they belong to stands before it."""
    for name, value in values.items():
        if type(value) is not kind:
            raise ValueError(f"{what}: {name} is {value!r}, not of type {kind.__name__}")


def check_counts(what: str, /, **counts: int) -> None:
    """Raises ValueError where one is not a whole number from 0 up; `what` they belong to stands before it."""
    for name, value in counts.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{what}: {name} is {value!r}, not a whole number from 0 up")


def _check_digest(what: str, value: str) -> None:
    if type(value) is not str or len(value) != 71 or not value.startswith("sha256:"):
        raise ValueError(f"{what} is {value!r}, not sha256: and 64 hexadecimal digits")


def _ask_all(one: Callable[[Shard], tuple[int, int, int]], shards: Sequence[Shard]) -> np.ndarray:
    """What `one` tells of each shard's file, int64 (shards, 3).

    16 at a time, since a file system of many hosts takes a millisecond for one; where it is quick, threads would only be in each
    other's way. It is slow when it was twice running: once is anybody's hiccup.
    """
    facts = np.empty((len(shards), 3), np.int64)
    parts = [slice(first, first + 64) for first in range(0, len(shards), 64)]

    def some(part: slice) -> None:
        facts[part] = [one(shard) for shard in shards[part]]

    done = slow = 0
    while done < len(parts) and slow < 2:
        started = time.perf_counter()
        some(parts[done])
        slow = slow + 1 if time.perf_counter() - started > 0.0025 else 0
        done += 1
    with ThreadPoolExecutor(16) as pool:
        deque(pool.map(some, parts[done:]), maxlen=0)  # raises the first error, in the order of the shards
    return facts


def check_inside(path: str) -> None:
    """Raises ValueError where a shard's path is not below its dataset's folder."""
    if type(path) is not str or not path or path[0] == "/" or "\0" in path or ".." in path.split("/"):
        raise ValueError(f"shard path {path!r} leads out of the dataset's folder")


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError; ValueError, with the remedy, when there is anything else in it."""
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # the latter for brackets in thousands of brackets
        raise ValueError(f"{path} is not JSON ({error}): {remedy}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not an object of JSON but {type(raw).__name__}: {remedy}")
    return raw
