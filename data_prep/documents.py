"""Which documents a sequence comes from.

    tokens [start, start + count) --> shard and place --> documents/UNIT.npy: rows and lengths --> file and line
                                                      --> without it (imported data): EOS, counted

A list is held against the manifest whenever it is read: of a wrong one, documents would be named that are not there.

Part of the door between `data_prep` and `pretrain`, as TokenDataset.documents: numpy and the standard library.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from data_prep.manifest import DTYPES, Shard

if TYPE_CHECKING:
    from data_prep.shard import TokenDataset


_BLOCK = 1 << 24
"""Tokens looked through at a time."""


def index_path(unit: str) -> str:
    """Where the rows and lengths of a unit's documents lie, relative to the dataset's folder."""
    return f"documents/{unit}.npy"


def listed(directory: Path, shard: Shard) -> tuple[np.ndarray, np.ndarray] | None:
    """Rows and lengths in tokens, both (n,) uint32, of a shard's documents; None where nobody wrote them down.

    Raises ValueError, naming the file, for a list that is not one of the manifest's documents and tokens.
    """
    path = directory / index_path(shard.source_file)
    if not path.is_file():
        return None
    count, remedy = 2 * shard.documents, "delete it and run the command that made the dataset again"
    with open(path, "rb") as file:
        header = npy_header(file)
        if header != ((count,), np.dtype("<u4")):
            has = f"an array {header[0]} of {header[1]}" if header else "no header of a .npy file"
            raise ValueError(f"{path} is no list of {shard.documents:,} documents, it has {has}; {remedy}")
        pairs = np.fromfile(file, "<u4", count)
    if len(pairs) != count:
        raise ValueError(f"{path} was cut short, to {len(pairs):,} of {count:,} numbers; {remedy}")
    rows, lengths = pairs.reshape(-1, 2).T
    tokens = int(lengths.sum(dtype=np.int64))
    if tokens != shard.tokens:
        raise ValueError(f"{path} has documents of {tokens:,} tokens in all, the manifest {shard.tokens:,}; {remedy}")
    return rows, lengths


def npy_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]] | None:
    """Shape and type by the header of a .npy file, which then stands at its data; None for a header that is damaged."""
    try:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except OSError:
        raise
    except Exception:  # numpy has Python parse a header, and a damaged one fails in as many ways as a program
        return None
    return shape, dtype


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


def parts(dataset: TokenDataset, shard: Shard, low: int, high: int) -> Iterator[Part]:
    """The documents that the tokens [low, high) of a shard of `dataset` belong to, in order."""
    tokenizer, policy = dataset.manifest.tokenizer, dataset.manifest
    rows, ends = _documents(
        dataset.directory,
        shard,
        tokenizer.eos_id if policy.append_eos else None,
        tokenizer.bos_id if policy.prepend_bos else None,
    )
    for n in range(int(np.searchsorted(ends, low, side="right")), len(ends)):
        begin, end = int(ends[n - 1]) if n else 0, int(ends[n])
        if begin >= high:
            break
        first, last = max(low, begin), min(high, end)
        line = int(rows[n]) + 1 if rows is not None else None
        yield Part(shard.source_file, line, n, first - begin, last - first, end - begin)


@lru_cache(maxsize=8)
def _documents(
    directory: Path, shard: Shard, eos_id: int | None, bos_id: int | None
) -> tuple[np.ndarray | None, np.ndarray]:
    """Rows (n,) and ends (n,) in tokens of a shard's documents; without a list no rows, and the ends by EOS, else by BOS."""
    found = listed(directory, shard)
    if found is not None:
        rows, lengths = found
        return rows, np.cumsum(lengths, dtype=np.int64)
    ends = _places(directory, shard, eos_id) + 1 if eos_id is not None else _places(directory, shard, bos_id)[1:]
    if eos_id is not None and eos_id == bos_id:  # every other one is a beginning
        ends = ends[1::2]
    return None, np.append(ends, shard.tokens) if not len(ends) or ends[-1] != shard.tokens else ends


def _places(directory: Path, shard: Shard, token: int | None) -> np.ndarray:
    """Where `token` stands in a shard, (n,) int64; read block by block, since others' shards can be larger than the memory."""
    if token is None:
        return np.empty(0, np.int64)
    ids = np.memmap(directory / shard.path, DTYPES[shard.dtype], "r", shard.offset, (shard.tokens,))
    found = [first + np.flatnonzero(ids[first : first + _BLOCK] == token) for first in range(0, len(ids), _BLOCK)]
    return np.concatenate(found)
