"""One dataset in the making: what its settings are, which units are done, and how one unit is done.

    documents of one input file -> ids -> BOS? ids EOS? -> ShardWriter --> OUT/shards/UNIT.npy   staged, synced, renamed
    what happened to every one of them                                 --> OUT/units/UNIT.json   after its shard
    the records of all units                                           --> OUT/manifest.json     last

What a unit becomes depends on its file and the settings alone. The settings lie in OUT/settings.json from the start; a
rerun with others is refused, since it would mix two datasets.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from data_prep.shard import (
    TOKENIZER_DIR,
    Manifest,
    Shard,
    ShardWriter,
    SubsetTotals,
    TokenizerInfo,
    token_dtype,
    write_atomically,
)
from data_prep.sources import Document, Source
from data_prep.tokenizer import Tokenizer, load

SETTINGS_NAME = "settings.json"
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class UnitRecord:
    """What became of one input file, `shard.source_file`."""

    source_bytes: int
    """Size of the input file when it was read."""
    shard: Shard
    subsets: dict[str, SubsetTotals]


@dataclass(frozen=True)
class Job:
    """One dataset in the making; goes to the workers as it is."""

    out: Path
    source: Source
    tokenizer: TokenizerInfo
    append_eos: bool
    prepend_bos: bool

    def begin(self, tokenizer: Tokenizer) -> None:
        """Make the folder, or check that it was begun with the same settings; raises ValueError if not."""
        policy = {"append_eos": self.append_eos, "prepend_bos": self.prepend_bos}
        ours = {"name": self.source.name, "split": self.source.split, **self.source.settings, **policy}
        ours |= {f"tokenizer {name}": value for name, value in asdict(self.tokenizer).items()}
        path = self.out / SETTINGS_NAME
        if path.is_file():
            theirs = json.loads(path.read_bytes())
            changed = [k for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k)]
            if changed:
                differences = "; ".join(f"{k} was {theirs.get(k)!r}, now {ours.get(k)!r}" for k in changed)
                raise ValueError(
                    f"{self.out} was begun with other settings: {differences}. Give these, or another --out"
                )
        elif self.out.is_dir() and any(entry.name != path.name + ".tmp" for entry in self.out.iterdir()):
            raise ValueError(f"{self.out} is not empty and was not begun by data-prep; give another --out")
        Manifest(*self._head(), shards=())  # refuses a policy that the tokenizer has no token for, before any work
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(ours, indent=1) + "\n").encode())
        tokenizer.save(self.out / TOKENIZER_DIR, self.prepend_bos)

    def source_bytes(self, unit: str) -> int:
        """Size of an input file now."""
        return (self.source.root / unit).stat().st_size

    def finished(self, unit: str) -> UnitRecord | None:
        """The record of a unit that is done, else None."""
        try:
            raw = json.loads(self._record_path(unit).read_bytes())
            shard = Shard(**raw.pop("shard"))
            subsets = {name: SubsetTotals(**totals) for name, totals in raw.pop("subsets").items()}
            record = UnitRecord(shard=shard, subsets=subsets, **raw)
            whole = (self.out / shard.path).stat().st_size == shard.end
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None  # none there, or torn by a power failure
        return record if whole and record.source_bytes == self.source_bytes(unit) else None

    def prepare_unit(self, unit: str) -> UnitRecord:
        """Turn one input file into its shard and record. Raises ValueError and OSError, naming the file."""
        tokenizer = _load_once(self.out / TOKENIZER_DIR)
        counts: dict[str, _Counts] = {}
        source_bytes = self.source_bytes(unit)
        with ShardWriter(self.out, f"shards/{unit}.npy", token_dtype(self.tokenizer.vocab_size)) as writer:
            for batch in _batches(self._kept(unit, counts)):
                encoded = tokenizer.encode_batch([document.text for document in batch])
                for document, ids in zip(batch, encoded, strict=True):
                    counts[document.subset].tokens += len(ids) + self.append_eos + self.prepend_bos
                writer.append(self._join(encoded))
        subsets = _frozen(counts)
        dropped = sum((count.dropped for count in counts.values()), Counter[str]())
        shard = writer.shard(unit, sum(s.documents for s in subsets.values()), dict(sorted(dropped.items())))
        record = UnitRecord(source_bytes, shard, subsets)
        path = self._record_path(unit)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(asdict(record), indent=1) + "\n").encode())
        return record

    def finish(self, records: list[UnitRecord]) -> Manifest:
        """Write the manifest over all units, in the order given. Raises ValueError when there is not one token."""
        subsets: dict[str, _Counts] = {}
        for record in records:
            for name, totals in record.subsets.items():
                subsets.setdefault(name, _Counts()).add(totals)
        manifest = Manifest(
            *self._head(),
            shards=tuple(record.shard for record in records),
            subsets=_frozen(subsets),
            settings=self.source.settings,
        )
        if manifest.tokens == 0:
            raise ValueError(
                f"not one of {sum(manifest.dropped.values()):,} documents is in this dataset ({manifest.dropped}): "
                f"check --input, --split and --holdout, and begin again in another folder than {self.out}"
            )
        manifest.save(self.out)
        return manifest

    def _head(self) -> tuple[str, str, TokenizerInfo, bool, bool]:
        return self.source.name, self.source.split, self.tokenizer, self.append_eos, self.prepend_bos

    def _record_path(self, unit: str) -> Path:
        return self.out / "units" / f"{unit}.json"

    def _kept(self, unit: str, counts: dict[str, _Counts]) -> Iterator[Document]:
        """The documents of a unit that are in; all of them are counted."""
        for document in self.source.documents(unit):
            count = counts.setdefault(document.subset, _Counts())
            if document.dropped:
                count.dropped[document.dropped] += 1
            else:
                count.documents += 1
                yield document

    def _join(self, encoded: Iterable[np.ndarray]) -> np.ndarray:
        """The ids of several documents as one array, with BOS and EOS by the policy."""
        bos = [np.array([self.tokenizer.bos_id])] if self.prepend_bos else []
        eos = [np.array([self.tokenizer.eos_id])] if self.append_eos else []
        return np.concatenate([part for ids in encoded for part in (*bos, ids, *eos)])


@dataclass
class _Counts:
    """SubsetTotals while they grow."""

    documents: int = 0
    tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, totals: SubsetTotals) -> None:
        self.documents += totals.documents
        self.tokens += totals.tokens
        self.dropped.update(totals.dropped)


def _frozen(counts: dict[str, _Counts]) -> dict[str, SubsetTotals]:
    """The counts by subset, with all keys sorted: the same bytes whatever came first."""
    return {
        name: SubsetTotals(count.documents, count.tokens, dict(sorted(count.dropped.items())))
        for name, count in sorted(counts.items())
    }


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about _BATCH_CHARACTERS, so that memory does not grow with the input file."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@cache
def _load_once(path: Path) -> Tokenizer:
    return load(path)
