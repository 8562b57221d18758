"""One input file to its shard: the inner loop of it all.

What runs once a document is Python, what runs once a token is not.

    Source.documents --> kept?  --yes--> batches of 1M characters --> Encoder --> BOS? ids EOS? --> OUT/shards/UNIT.npy
                           |                                          row and tokens of each --> OUT/documents/UNIT.npy
                           no --> counted by reason and subset;
                                  the broken ones by line too -------------------------------> OUT/units/UNIT.json
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.documents import index_path
from data_prep.encoder import Difference, Encoder, Uncuttable
from data_prep.folder import BadDocument, Counts, Folder, Settings, UnitRecord, frozen
from data_prep.readers import BROKEN_GROUP, UNREADABLE, Position
from data_prep.shard import DTYPES, FIRST_PAUSE_S, LONGEST_PAUSE_S, RETRY_S, ShardWriter, token_dtype
from data_prep.sources import Document, Source

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 4096
_MAX_BAD_LISTED = 1000

_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EMFILE, errno.ENFILE)
_FULL = {errno.ENOSPC: "", errno.EDQUOT: " in its quota", errno.EFBIG: " for larger files (ulimit -f)"}

Report = Callable[[int, int], None]
"""Told how many more bytes of input were read and how many more tokens made."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to do units; goes to it as it is."""

    folder: Folder
    source: Source
    settings: Settings
    engine: str
    """See Encoder."""
    check_every: int
    """Every so many documents are encoded by the reference too; 0 for none."""


def prepare_unit(job: Job, encoder: Encoder, unit: str, report: Report) -> UnitRecord:
    """Turn one input file into its shard and record; tried again for RETRY_S where the machine fails for a while.

    Raises OSError, naming the file, and Difference, naming the document, where the encoder and the reference disagree.
    """
    until, pause_s = 0.0, FIRST_PAUSE_S
    while True:
        told = [0, 0]

        def counted(more_bytes: int, more_tokens: int, told: list[int] = told) -> None:
            told[0] += more_bytes
            told[1] += more_tokens
            report(more_bytes, more_tokens)

        try:
            return _prepare_once(job, encoder, unit, counted)
        except OSError as error:
            name, why, remedy = _named(error, job.folder.out)
            if error.errno in _FULL:
                raise OSError(error.errno, f"{why}: {remedy}", name) from error
            if error.errno not in _PASSING:
                raise
            if not until:
                until = time.monotonic() + RETRY_S
                line = f"data-prep: {unit}: {error.strerror}: {name!r} on {socket.gethostname()}; "
                print(f"{line}it is tried again for {RETRY_S:,.0f} s", file=sys.stderr, flush=True)
            if time.monotonic() >= until:
                raise OSError(error.errno, f"{why}, for {RETRY_S:,.0f} s: {remedy}", name) from error
        report(-told[0], -told[1])
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _named(error: OSError, out: Path) -> tuple[str, str, str]:
    """Which file or folder fails, how and on which host, and what to do: whoever reads names the file, a write does not."""
    name = os.fspath(out if error.filename is None else error.filename)
    why = f"{error.strerror} on {socket.gethostname()}"
    if error.errno in _FULL:
        remedy = f"make room{_FULL[error.errno]} and run the same command again"
    else:
        remedy = f"run the same command again when this can be {'written' if error.filename is None else 'read'}"
    return name, why, f"{remedy}; finished files are kept"


def _prepare_once(job: Job, encoder: Encoder, unit: str, report: Report) -> UnitRecord:
    source_bytes = job.source.source_bytes(unit)
    out, dtype = job.folder.out, token_dtype(job.settings.tokenizer.vocab_size)
    position, counts, faults = Position(make_room=encoder.make_room), dict[str, Counts](), _Faults()
    read = 0
    with (
        ShardWriter(out, f"shards/{unit}.npy", dtype) as shard,
        ShardWriter(out, index_path(unit), "uint32", durable=False) as index,
    ):
        writer = _Writer(job, encoder, unit, shard, index, counts)
        for document in job.source.documents(unit, position):
            if not document.dropped:
                try:
                    writer.add(document)
                except Uncuttable as error:
                    document = document._replace(text="", dropped=error.bad.reason, bad=error.bad)
            if document.dropped:
                count = document.bad.documents if document.bad else 1
                counts.setdefault(document.subset, Counts()).dropped[document.dropped] += count
                faults.add(document)
            del document
            if position.bytes - read >= _BATCH_CHARACTERS:
                report(position.bytes - read, writer.new_tokens())
                read = position.bytes
        writer.flush()
    report(source_bytes - read, writer.new_tokens())
    subsets = frozen(counts)
    dropped = sum((count.dropped for count in counts.values()), Counter[str]())
    written = shard.shard(unit, sum(s.documents for s in subsets.values()), dict(sorted(dropped.items())))
    bad = (faults.documents, faults.lost_bytes, faults.listed)
    record = UnitRecord(source_bytes, written, subsets, *bad, engine=job.engine)
    job.folder.write_record(record)
    return record


class _Writer:
    """Gathers documents into batches, encodes them and writes them down."""

    def __init__(
        self, job: Job, encoder: Encoder, unit: str, shard: ShardWriter, index: ShardWriter, counts: dict[str, Counts]
    ) -> None:
        self._job, self._encoder, self._unit = job, encoder, unit
        self._shard, self._index, self._counts = shard, index, counts
        tokenizer = job.settings.tokenizer
        self._bos = tokenizer.bos_id if job.settings.prepend_bos else None
        self._eos = tokenizer.eos_id if job.settings.append_eos else None
        self._batch: list[Document] = []
        self._characters = self._reported = 0
        # The first document checked depends on the file's name, so that many small files are checked no more than one large.
        self._documents = zlib.crc32(unit.encode()) % max(1, job.check_every)

    def add(self, document: Document) -> None:
        """Take a document. Raises Uncuttable for one that can't be taken, and has then left nothing."""
        if self._job.check_every and self._documents % self._job.check_every == 0:
            self._check(document)
        if len(document.text) > self._encoder.long_characters:
            self.flush()
            self._add_long(document)
        else:
            self._batch.append(document)
            self._characters += len(document.text)
            if self._characters >= _BATCH_CHARACTERS or len(self._batch) >= _BATCH_DOCUMENTS:
                self.flush()
        self._documents += 1

    def flush(self) -> None:
        """Write what was gathered."""
        if not self._batch:
            return
        encoded = self._encoder.encode([document.text for document in self._batch])
        ids, lengths = with_controls(*encoded, self._bos, self._eos, DTYPES[self._shard.dtype])
        self._shard.append(ids)
        self._write_index([document.row for document in self._batch], lengths)
        for document, length in zip(self._batch, lengths.tolist(), strict=True):
            self._count(document.subset, length)
        self._batch, self._characters = [], 0

    def new_tokens(self) -> int:
        """Tokens written since this was last asked."""
        new, self._reported = self._shard.tokens - self._reported, self._shard.tokens
        return new

    def _add_long(self, document: Document) -> None:
        """Write a document piece by piece, once it is sure that it can be cut."""
        self._encoder.refuse_uncuttable(document.text)
        before = self._shard.tokens
        dtype = DTYPES[self._shard.dtype]
        if self._bos is not None:
            self._shard.append(np.array([self._bos], dtype))
        for ids in self._encoder.encode_long(document.text):
            self._shard.append(ids)
        if self._eos is not None:
            self._shard.append(np.array([self._eos], dtype))
        length = self._shard.tokens - before
        self._write_index([document.row], np.array([length]))
        self._count(document.subset, length)

    def _check(self, document: Document) -> None:
        try:
            self._encoder.check(document.text)
        except Difference as difference:
            raise Difference(f"{self._unit} line {document.row + 1}: {difference}") from None

    def _write_index(self, rows: list[int], lengths: np.ndarray) -> None:
        self._index.append(np.stack((np.array(rows, dtype=np.uint32), lengths.astype(np.uint32)), axis=1).ravel())

    def _count(self, subset: str, tokens: int) -> None:
        count = self._counts.get(subset) or self._counts.setdefault(subset, Counts())
        count.documents += 1
        count.tokens += tokens


class _Faults:
    """The documents that could not be read."""

    def __init__(self) -> None:
        self.documents = self.lost_bytes = 0
        self.listed: list[BadDocument] = []

    def add(self, document: Document) -> None:
        """Note a dropped document, if it was dropped for being bad."""
        bad = document.bad
        if bad is None:
            return
        self.documents += bad.documents
        self.lost_bytes += bad.lost_bytes
        if len(self.listed) < _MAX_BAD_LISTED or bad.reason in (UNREADABLE, BROKEN_GROUP):
            self.listed.append(BadDocument(document.row + 1, bad.reason, bad.detail, bad.documents))


def with_controls(
    ids: np.ndarray, ends: np.ndarray, bos: int | None, eos: int | None, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Put BOS before and EOS behind each document, where they are not None.

    `ids` (n,) and `ends` (documents,) as in Encoded; gives the new ids as an array of `dtype` and the new length of each
    document, (documents,) int64.
    """
    lengths = np.diff(ends, prepend=0) + (bos is not None) + (eos is not None)
    stops = np.cumsum(lengths)
    out = np.empty(int(stops[-1]), dtype)
    is_text = np.ones(len(out), dtype=bool)
    for control, places in ((bos, stops - lengths), (eos, stops - 1)):
        if control is not None:
            out[places], is_text[places] = control, False
    assert not ids.size or int(ids.max()) <= np.iinfo(dtype).max
    out[is_text] = ids
    return out, lengths
