"""Which documents a sequence comes from.

    tokens [start, start + count) --> shard and place --> documents/UNIT.npy: rows and lengths --> file and line
                                                      --> without it (imported data): EOS, counted

Part of the door between `data_prep` and `pretrain`, as TokenDataset.documents: numpy and the standard library.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data_prep.manifest import DTYPES, Shard

if TYPE_CHECKING:
    from data_prep.shard import TokenDataset


def index_path(unit: str) -> str:
    """Where the rows and lengths of a unit's documents lie, relative to the dataset's folder."""
    return f"documents/{unit}.npy"


class Part(NamedTuple):
    """The tokens of one document in a sequence."""

    source_file: str
    line: int | None
    """Line or row in the file, from 1; None where nobody wrote it down."""
    document: int
    """Number of the document in its shard, from 0."""
    first: int
    """Place of the first token in its document."""
    tokens: int
    """How many tokens of the document are in the sequence."""
    document_tokens: int
    """How many tokens the document has, with BOS and EOS."""


def parts(dataset: TokenDataset, start: int, count: int) -> Iterator[Part]:
    """The documents that the `count` tokens from `start` on belong to, in order."""
    shard_start = 0
    for shard in dataset.manifest.shards:
        low, high = max(start, shard_start), min(start + count, shard_start + shard.tokens)
        if low < high:
            yield from _in_shard(dataset, shard, low - shard_start, high - shard_start)
        shard_start += shard.tokens


def _in_shard(dataset: TokenDataset, shard: Shard, low: int, high: int) -> Iterator[Part]:
    """The documents of the tokens [low, high) of a shard."""
    rows, ends = _documents(dataset, shard)
    for n in range(int(np.searchsorted(ends, low, side="right")), len(ends)):
        begin, end = int(ends[n - 1]) if n else 0, int(ends[n])
        if begin >= high:
            break
        first, last = max(low, begin), min(high, end)
        line = int(rows[n]) + 1 if rows is not None else None
        yield Part(shard.source_file, line, n, first - begin, last - first, end - begin)


def _documents(dataset: TokenDataset, shard: Shard) -> tuple[np.ndarray | None, np.ndarray]:
    """Rows (n,) and ends (n,) in tokens of a shard's documents; no rows, and the ends by EOS, where there is no list."""
    index = dataset.directory / index_path(shard.source_file)
    if index.is_file():
        rows, lengths = np.load(index).reshape(-1, 2).T
        return rows, np.cumsum(lengths, dtype=np.int64)
    path, dtype = dataset.directory / shard.path, DTYPES[shard.dtype]
    ids = np.fromfile(path, dtype, shard.tokens, offset=shard.offset)
    manifest = dataset.manifest
    if manifest.append_eos:
        ends = np.flatnonzero(ids == manifest.tokenizer.eos_id) + 1
    elif manifest.prepend_bos:
        ends = np.flatnonzero(ids == manifest.tokenizer.bos_id)[1:]
    else:
        ends = np.empty(0, np.int64)
    return None, np.append(ends, shard.tokens) if not len(ends) or ends[-1] != shard.tokens else ends
