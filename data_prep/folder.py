"""A dataset's folder while it is made: what is wanted, what is there, and when it is complete.

    begin:   OUT/tokenizer/      the tokenizer
             OUT/inputs.json     the input files and their sizes, in order: the units of work. New ones are reported,
                                 missing ones refused; array tasks accept no change of names
             OUT/settings.json   what was asked for; a run with other settings is refused, it would mix two datasets
    a unit:  OUT/shards/UNIT.npy, OUT/documents/UNIT.npy, and OUT/units/UNIT.json, the record, after both
    finish:  OUT/manifest.json   over the records of all units, in their order, last

What a unit becomes depends on its file and the settings alone, so it does not matter who makes it, when, or how often.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from data_prep.documents import index_path
from data_prep.lock import LOCK_NAME, locked
from data_prep.manifest import check_counts, check_types, read_object
from data_prep.readers import BROKEN_GROUP, UNREADABLE
from data_prep.shard import (
    MANIFEST_NAME,
    NPY_HEADER_BYTES,
    TOKENIZER_DIR,
    Manifest,
    Shard,
    SubsetTotals,
    TokenizerInfo,
    check_tokenizer,
    write_atomically,
)
from data_prep.staging import is_left_over, staged_path
from data_prep.tokenizer import Tokenizer

SETTINGS_NAME = "settings.json"
INPUTS_NAME = "inputs.json"


@dataclass(frozen=True)
class Settings:
    """What decides on the tokens of a dataset, apart from its input files."""

    name: str
    """The kind of the source."""
    split: str
    """Either "train" or "validation"; of a Hugging Face dataset whatever its split is called."""
    tokenizer: TokenizerInfo
    append_eos: bool
    prepend_bos: bool
    source: dict[str, Any]
    """Further settings of the source that decide which documents are in."""

    def manifest(self, shards: Iterable[Shard], subsets: dict[str, SubsetTotals]) -> Manifest:
        """The manifest over `shards`. Raises ValueError for a policy that the tokenizer has no token for."""
        head = (self.name, self.split, self.tokenizer, self.append_eos, self.prepend_bos)
        return Manifest(*head, shards=tuple(shards), subsets=subsets, settings=self.source)

    def flat(self) -> dict[str, Any]:
        """Every setting under a name that a message can show."""
        flat = asdict(self)
        flat |= {f"tokenizer {name}": value for name, value in flat.pop("tokenizer").items()}
        return flat | flat.pop("source")


@dataclass(frozen=True)
class BadDocument:
    """A document, or the rest of a file, that could not be read."""

    line: int
    """Line of a jsonl or text file, row of a parquet file, from 1."""
    reason: str
    detail: str
    count: int = 1
    """Documents that were lost by it."""

    def __post_init__(self) -> None:
        check_counts("bad document", line=self.line, count=self.count)
        check_types("bad document", str, reason=self.reason, detail=self.detail)


@dataclass(frozen=True)
class UnitRecord:
    """What became of one input file, `shard.source_file`."""

    source_bytes: int
    """Size of the input file when it was read."""
    shard: Shard
    subsets: dict[str, SubsetTotals]
    bad_documents: int = 0
    """Documents that could not be read; they are among the dropped."""
    lost_bytes: int = 0
    """Bytes of the input file behind damage that nobody could read past."""
    bad: list[BadDocument] = field(default_factory=list)
    """The first bad documents, one by one; all that damaged a file."""
    engine: str = ""
    """What encoded it, "gigatoken" or "reference"; empty in records of before this was written down."""

    def __post_init__(self) -> None:
        counts = {"bad_documents": self.bad_documents, "lost_bytes": self.lost_bytes}
        check_counts("record", source_bytes=self.source_bytes, **counts)

    @property
    def documents_read(self) -> int:
        """Documents kept and dropped."""
        return self.shard.documents + sum(self.shard.dropped.values())

    @property
    def is_damaged(self) -> bool:
        """Whether the input file could not be read to its end, or a part of it could not."""
        return any(bad.reason in (UNREADABLE, BROKEN_GROUP) for bad in self.bad)


class Folder:
    """The folder of a dataset in the making."""

    def __init__(self, out: str | Path) -> None:
        """`out` need not exist."""
        self.out = Path(out)

    # --- begin -------------------------------------------------------------------------------------------------------

    def check(self, settings: Settings) -> None:
        """Raise ValueError when OUT is somebody else's, was begun with other settings, or the policy can't be."""
        settings.manifest((), {})  # the policy
        if (self.out / SETTINGS_NAME).is_file():
            theirs, ours = self.settings().flat(), settings.flat()
            changed = [k for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k)]
            if changed:
                differences = "; ".join(f"{k} was {theirs.get(k)!r}, now {ours.get(k)!r}" for k in changed)
                raise ValueError(
                    f"{self.out} was begun with other settings: {differences}. Give these, or another --out"
                )
        elif self.out.is_dir():
            ours_begun = (TOKENIZER_DIR, INPUTS_NAME, SETTINGS_NAME, LOCK_NAME)
            if any(not entry.name.startswith(ours_begun) for entry in self.out.iterdir()):
                raise ValueError(f"{self.out} is not empty and was not begun by data-prep; give another --out")

    def begin(
        self,
        settings: Settings,
        tokenizer: Tokenizer,
        inputs: dict[str, int],
        tasks: int = 1,
        allow_other_inputs: bool = False,
    ) -> None:
        """Write down what is wanted, unless it stands there; `inputs` are the input files and their sizes in bytes.

        Raises ValueError for input files that are gone, and in one of several `tasks` for new ones, unless they are allowed;
        and for names that are not UTF-8, which no JSON can hold.
        """
        odd = [repr(unit) for unit in inputs if unit.encode(errors="ignore").decode() != unit]
        if odd:
            raise ValueError(f"the names of {len(odd):,} input files are not UTF-8: {listing(odd)}. Rename them")
        self.out.mkdir(parents=True, exist_ok=True)
        with locked(self.out / f"{LOCK_NAME}.begin", wait=True):  # tasks of an array begin at the same moment
            self.check(settings)
            path, content = self.out / INPUTS_NAME, orjson.dumps(inputs, option=orjson.OPT_INDENT_2)
            if not path.is_file() or path.read_bytes() != content:
                if path.is_file():
                    self._compare(inputs, tasks, allow_other_inputs)
                write_atomically(path, content)
            try:
                check_tokenizer(self.out, settings.tokenizer)
            except ValueError:  # not begun, or damaged since: the workers load it from there
                tokenizer.save(self.out / TOKENIZER_DIR, settings.prepend_bos)
            if not (self.out / SETTINGS_NAME).is_file():
                write_atomically(self.out / SETTINGS_NAME, (json.dumps(asdict(settings), indent=1) + "\n").encode())

    def _compare(self, inputs: dict[str, int], tasks: int, allow_other_inputs: bool) -> None:
        """Say what is other about `inputs` than when OUT was begun; raises as `begin` does."""
        before = self.inputs()
        gone = [unit for unit in before if unit not in inputs]
        new = [unit for unit in inputs if unit not in before]
        changed = [unit for unit in inputs if unit in before and before[unit] != inputs[unit]]
        if gone and not allow_other_inputs:
            raise ValueError(
                f"{len(gone):,} of the {len(before):,} input files that {self.out} was begun with are gone: {listing(gone)}. "
                "Bring them back, or give --allow_other_inputs true to leave them out"
            )
        if new and tasks > 1 and not allow_other_inputs and self.names_with_record():
            raise ValueError(
                f"{len(new):,} input files are new since {self.out} was begun with {len(before):,}: {listing(new)}. New "
                "files change which files each task does. Run without --task, or rerun all tasks with --allow_other_inputs true"
            )
        words = {"new": new, "of another size": changed, "gone": gone}
        said = "; ".join(f"{len(units):,} {word}: {listing(units, 5)}" for word, units in words.items() if units)
        if said:
            print(f"{self.out}: input files since it was begun: {said}", flush=True)

    def sweep(self) -> None:
        """Remove what killed runs left half written; for whoever is the only run in the folder."""
        for at, _, files in os.walk(self.out):
            for path in (Path(at) / name for name in files if name.endswith(".tmp")):
                if is_left_over(path):
                    path.unlink(missing_ok=True)

    def settings(self) -> Settings:
        """What the folder was begun with. Raises FileNotFoundError when it was not, ValueError for a damaged file."""
        remedy = "copy it from where it is whole, or begin again in another --out"
        raw = self._load(SETTINGS_NAME, remedy)
        try:
            settings = Settings(**{**raw, "tokenizer": TokenizerInfo(**raw["tokenizer"])})
            settings.manifest((), {})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.out / SETTINGS_NAME} is damaged ({error}): {remedy}") from None
        return settings

    def inputs(self) -> dict[str, int]:
        """The input files and their sizes in bytes, in order. Raises as `settings` does."""
        remedy = "delete it and run the command that was begun in this folder again"
        inputs = self._load(INPUTS_NAME, remedy)
        for unit, size in inputs.items():
            if type(size) is not int or size < 0:
                raise ValueError(f"{self.out / INPUTS_NAME} is damaged ({unit} has {size!r} bytes): {remedy}")
        return inputs

    def _load(self, name: str, remedy: str) -> dict[str, Any]:
        try:
            return read_object(self.out / name, remedy)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.out} has no {name}: no data-prep command was begun there") from None

    # --- units -------------------------------------------------------------------------------------------------------

    def record(self, unit: str, source_bytes: int) -> UnitRecord | None:
        """The record of a unit that is done with an input file of this size, else None."""
        try:
            raw = orjson.loads(self._record_path(unit).read_bytes())
            shard = Shard(**raw.pop("shard"))
            subsets = {name: SubsetTotals(**totals) for name, totals in raw.pop("subsets").items()}
            bad = [BadDocument(**one) for one in raw.pop("bad")]
            record = UnitRecord(shard=shard, subsets=subsets, bad=bad, **raw)
            whole = os.stat(f"{self.out}/{shard.path}").st_size == shard.end
            index_bytes = NPY_HEADER_BYTES + 8 * shard.documents
            whole &= os.stat(f"{self.out}/{index_path(unit)}").st_size == index_bytes
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None  # none there, or torn by a power failure
        return record if whole and (shard.source_file, record.source_bytes) == (unit, source_bytes) else None

    def records(self, inputs: dict[str, int]) -> dict[str, UnitRecord]:
        """The records of all units that are done, in the order of `inputs`."""
        return {unit: record for unit, size in inputs.items() if (record := self.record(unit, size)) is not None}

    def names_with_record(self) -> set[str]:
        """The units that have a record, whole or not: their names alone, read in a moment."""
        root = self.out / "units"
        names = (os.path.relpath(os.path.join(at, name), root) for at, _, files in os.walk(root) for name in files)
        return {name.removesuffix(".json") for name in names if name.endswith(".json")}

    def write_record(self, record: UnitRecord) -> None:
        """The last thing that happens to a unit. Without fsync: a torn record is none, and its shard is durable."""
        path = self._record_path(record.shard.source_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = staged_path(path)
        try:
            staged.write_bytes(orjson.dumps(asdict(record), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
            os.replace(staged, path)
        finally:
            staged.unlink(missing_ok=True)

    def _record_path(self, unit: str) -> Path:
        return self.out / "units" / f"{unit}.json"

    # --- finish ------------------------------------------------------------------------------------------------------

    def unfinish(self) -> None:
        """While shards are replaced, no manifest may vouch for them."""
        (self.out / MANIFEST_NAME).unlink(missing_ok=True)

    def finish(self, settings: Settings, records: Iterable[UnitRecord]) -> Manifest:
        """Write the manifest over all units, in the order given. Raises ValueError when there is not one token."""
        records = list(records)
        counts: dict[str, Counts] = {}
        for record in records:
            for name, totals in record.subsets.items():
                counts.setdefault(name, Counts()).add(totals)
        manifest = settings.manifest((record.shard for record in records), frozen(counts))
        if manifest.tokens == 0:
            raise ValueError(
                f"not one of {sum(manifest.dropped.values()):,} documents is in this dataset ({manifest.dropped}): "
                f"check --input, --split and --holdout, and begin again in another folder than {self.out}"
            )
        os.sync()  # the names of the shards too, before a manifest vouches for them
        manifest.save(self.out)
        for lock in self.out.glob(f"{LOCK_NAME}.*"):
            lock.unlink()
        return manifest


def listing(units: list[str], most: int = 20) -> str:
    """Their names, the first ones of many."""
    return ", ".join(units[:most]) + (f" and {len(units) - most:,} more" if len(units) > most else "")


@dataclass
class Counts:
    """SubsetTotals while they grow."""

    documents: int = 0
    tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, totals: SubsetTotals) -> None:
        """Add those of another unit."""
        self.documents += totals.documents
        self.tokens += totals.tokens
        self.dropped.update(totals.dropped)


def frozen(counts: dict[str, Counts]) -> dict[str, SubsetTotals]:
    """The counts by subset, with all keys sorted: the same bytes whatever came first."""
    return {
        name: SubsetTotals(count.documents, count.tokens, dict(sorted(count.dropped.items())))
        for name, count in sorted(counts.items())
    }
