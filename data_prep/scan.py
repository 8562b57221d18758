"""Read the tokens of a shard once, at the speed of the disk, and say what is in them.

file --> 8 MiB blocks --> sha256, smallest and largest id, how many BOS and EOS      one thread a file, several files
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.manifest import DTYPES, TokenizerInfo

_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Scan:
    """What a shard's tokens are."""

    tokens: int
    """Fewer than asked for when the file is shorter."""
    checksum: str
    smallest: int
    """0 when there are no tokens."""
    largest: int
    """-1 when there are no tokens."""
    bos: int
    """How many tokens are BOS; 0 when there is no such id."""
    eos: int
    """How many tokens are EOS; 0 when there is no such id."""


@dataclass(frozen=True)
class Stretch:
    """Where tokens lie in a file."""

    path: Path
    dtype: str
    """A key of DTYPES."""
    offset: int
    """Bytes before the first token."""
    tokens: int


def cores() -> int:
    """CPU cores that this process may use; where the system does not tell (macOS), all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def scan_all(
    stretches: Iterable[Stretch], tokenizer: TokenizerInfo, alive: Callable[[], None] = lambda: None
) -> Iterator[Scan]:
    """Scan several, in order; `alive` is called after each block. Raises OSError for a file that can't be read."""
    with ThreadPoolExecutor(cores()) as pool:  # hashing and numpy let go of the interpreter
        yield from pool.map(lambda stretch: scan(stretch, tokenizer, alive), stretches)


def scan(stretch: Stretch, tokenizer: TokenizerInfo, alive: Callable[[], None] = lambda: None) -> Scan:
    """Scan one; `alive` is called after each block. Raises OSError for a file that can't be read."""
    dtype = DTYPES[stretch.dtype]
    digest = hashlib.sha256()
    smallest, largest, counts, tokens = 2**63, -1, [0, 0], 0
    with open(stretch.path, "rb", buffering=0) as file:
        file.seek(stretch.offset)
        left = stretch.tokens * dtype.itemsize
        while left and (block := file.read(min(left, _BLOCK_BYTES))):
            while len(block) % dtype.itemsize and (more := file.read(1)):
                block += more
            left -= len(block)
            digest.update(block)
            ids = np.frombuffer(block, dtype, len(block) // dtype.itemsize)
            tokens += ids.size
            smallest, largest = min(smallest, int(ids.min())), max(largest, int(ids.max()))
            alive()
            for n, token in enumerate((tokenizer.bos_id, tokenizer.eos_id)):
                counts[n] += 0 if token is None else int(np.count_nonzero(ids == token))
    return Scan(tokens, f"sha256:{digest.hexdigest()}", smallest if tokens else 0, largest, *counts)
