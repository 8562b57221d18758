"""Shards and their manifest: the formats, how they are written, how they are read.

    input file --> ShardWriter --> shards/NAME.npy     one input file is one unit of work is one shard
                        |
                        v  Shard: path, dtype, offset, tokens, checksum, provenance
                    Manifest --> manifest.json         written last: a folder without one is not a dataset
                        |
                        v  sizes of all files checked before anything is read
                   TokenDataset --> sequences (n, T+1) int64

A dataset is a folder:

    DATASET/manifest.json    the order of the shards, their checksums, where they came from
            shards/*.npy     flat little-endian token ids: uint16 up to a vocabulary of 65,536, else uint32
            documents/*.npy  uint32 (2n,): row in its input file and number of tokens of each of n documents
            tokenizer/       a complete Hugging Face tokenizer folder

The order of the shards in the manifest is the order of the tokens; names and directory listings mean nothing.
Sequence i of a dataset is tokens [i*T, i*T + T] of its concatenated shards: T+1 tokens, neighbours share one.

This module is the door between `data_prep` and `pretrain`: numpy and the standard library, nothing else.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from data_prep import token_bytes
from data_prep.documents import Part, parts
from data_prep.manifest import (
    DTYPES,
    MANIFEST_NAME,
    Manifest,
    Shard,
    SubsetTotals,
    TokenizerInfo,
    check_inside,
)
from data_prep.scan import Stretch, scan_all
from data_prep.staging import staged_path, write_atomically
from data_prep.tokenizer_files import TOKENIZER_DIR, check_tokenizer, folder_fingerprint

__all__ = [
    "DTYPES",
    "MANIFEST_NAME",
    "TOKENIZER_DIR",
    "Manifest",
    "Shard",
    "ShardWriter",
    "SubsetTotals",
    "TokenDataset",
    "TokenizerInfo",
    "check_tokenizer",
    "folder_fingerprint",
    "token_bytes",
    "token_dtype",
    "write_atomically",
]

RETRY_S = 300.0
"""So long a file that cannot be read is tried again (seconds): a file system that fails over takes minutes."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
NPY_HEADER_BYTES = 128


def token_dtype(vocab_size: int) -> str:
    """The narrowest type of ours for ids in [0, vocab_size): "uint16" or "uint32"."""
    return "uint16" if vocab_size <= 65536 else "uint32"


# --- writing ---------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Stream tokens into one shard; the file appears under its name when the block ends well, and not otherwise.

        with ShardWriter(directory, "shards/a.npy", "uint16") as writer:
            writer.append(ids)                                      # any integer array (n,)
        shard = writer.shard(source_file="a.jsonl.zst", documents=1)

    The staged file is this writer's own; Folder.sweep removes what a killed one left. Memory: that of one call.
    """

    def __init__(self, directory: str | os.PathLike[str], path: str, dtype: str, durable: bool = True) -> None:
        """`path` is relative to the dataset's folder `directory`; `dtype` is a key of DTYPES.

        Not `durable`: the file may be lost or torn with the power; for what is checked by other means.
        """
        check_inside(path)
        self._durable = durable
        self.path, self.dtype, self.tokens = path, dtype, 0
        self._target = Path(directory) / path
        self._staged = staged_path(self._target)
        self._hash = hashlib.sha256()
        self._file: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._staged, "wb")
        self._write_header()
        return self

    def append(self, ids: np.ndarray) -> None:
        """Add token ids, an integer array (n,). Raises ValueError for an id that the shard's type can't hold."""
        assert self._file is not None, "append outside of the with block"
        dtype = DTYPES[self.dtype]
        if ids.dtype != dtype and ids.size:
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high > np.iinfo(dtype).max:
                raise ValueError(f"token ids from {low} to {high} don't fit a shard of {self.dtype}")
        data = np.ascontiguousarray(ids, dtype=dtype).data
        self._hash.update(data)
        self._file.write(data)
        self.tokens += ids.size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        try:
            with self._file as file:
                if kind is None:
                    self._write_header()  # now with the number of tokens
                    file.flush()
                    if self._durable:
                        os.fsync(file.fileno())
            if kind is None:
                os.replace(self._staged, self._target)
        finally:
            self._staged.unlink(missing_ok=True)  # it is still there when something failed

    def shard(self, source_file: str, documents: int, dropped: dict[str, int] | None = None) -> Shard:
        """The record of what was written, once the block has ended well."""
        assert self._file is not None
        assert self._file.closed
        checksum = f"sha256:{self._hash.hexdigest()}"
        written = (self.path, self.dtype, NPY_HEADER_BYTES, self.tokens, checksum)
        return Shard(*written, source_file, documents, dropped or {})

    def _write_header(self) -> None:
        """Write the header at the start; numpy leaves room in it for any count, so its size stays the same."""
        assert self._file is not None
        self._file.seek(0)
        header = {"descr": DTYPES[self.dtype].str, "fortran_order": False, "shape": (self.tokens,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        assert self._file.tell() == NPY_HEADER_BYTES


# --- reading ---------------------------------------------------------------------------------------------------------


class _OpenFile:
    """A file descriptor that closes with its last user, so that an eviction never closes it under a reader."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class TokenDataset:
    """The tokens of a dataset as one long row, cut into sequences on demand.

    Tokens are read with pread, not through a memory map: as fast from the page cache, and a file cut short or a failing
    disk is an exception that names the shard instead of SIGBUS. Files open when first needed, at most `max_open_files`
    at a time (60,000 shards exceed any limit on descriptors). Forks and serves several threads: no position is shared.
    What cannot be read is opened and read again for RETRY_S: a stale handle, a file system that fails over.
    """

    def __init__(self, directory: str | os.PathLike[str], max_open_files: int = 256, check_files: bool = True) -> None:
        """Open the dataset in `directory`; checks and raises as Manifest.load does."""
        self.directory = Path(directory)
        self.manifest, self._facts = Manifest.load_with_facts(directory, check_files)
        self._shards = [shard for shard in self.manifest.shards if shard.tokens]
        self._ends = np.cumsum([shard.tokens for shard in self._shards], dtype=np.int64).tolist()  # in tokens
        self._begins = [0, *self._ends[:-1]]
        self._dtypes = [DTYPES[shard.dtype] for shard in self._shards]
        self._offsets = [shard.offset for shard in self._shards]
        self._paths = [f"{self.directory}/{shard.path}" for shard in self._shards]
        self.dtype = np.result_type(np.uint16, *set(self._dtypes))
        """Holds every token: the type of all shards, where they agree."""
        self.num_tokens = self.manifest.tokens
        """Tokens in all shards."""
        self._file = lru_cache(max_open_files)(_OpenFile)  # by its path
        self._opened = False
        """Whether any file could be opened. Until then a missing one is a wrong path, and fails at once; afterwards its file
        system may be away, and it is waited for."""
        self._leaving = threading.Event()

    def stop_waiting(self) -> None:
        """Wait no longer for what cannot be read: from now on it fails at once, in every thread."""
        self._leaving.set()

    def num_sequences(self, seq_len: int) -> int:
        """How many sequences of `seq_len` + 1 tokens there are; the last token of one is the first of the next."""
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}; it must be at least 1 token")
        return max(0, (self.num_tokens - 1) // seq_len)

    def sequences(self, indices: Iterable[int] | np.ndarray, seq_len: int) -> np.ndarray:
        """Sequences `indices` (n,) as an int64 array (n, seq_len + 1), in the order asked for.

        Raises ValueError for a seq_len below 1, IndexError for an index outside [0, num_sequences), OSError for a shard that
        can't be read any more.
        """
        self.num_sequences(seq_len)  # refuses a length below 1
        wanted = indices.tolist() if isinstance(indices, np.ndarray) else list(indices)
        rows = np.empty((len(wanted), seq_len + 1), self.dtype)
        for row, index in zip(rows, wanted):
            self.read_sequence(index, row)
        return rows.astype(np.int64)

    def read_sequence(self, index: int, row: np.ndarray) -> None:
        """Fill `row`, (seq_len + 1,) of a type that holds `dtype`, with sequence `index`; raises as `sequences` does."""
        seq_len = len(row) - 1
        start = index * seq_len
        end = start + seq_len + 1
        if index < 0 or end > self.num_tokens:
            raise IndexError(
                f"sequence {index} was asked of {self.directory}, which has {self.num_sequences(seq_len):,} "
                f"sequences of {seq_len} + 1 tokens ({self.num_tokens:,} tokens)"
            )
        number = bisect_right(self._ends, start)
        if end <= self._ends[number]:  # nearly always: no more than this is done for it
            self._read(number, start - self._begins[number], row)
            return
        for number, low, high in self._pieces(start, end):
            first = self._begins[number] + low - start
            self._read(number, low, row[first : first + high - low])

    def documents(self, start: int, count: int) -> list[Part]:
        """The documents that hold the `count` tokens from `start` on, in order, each with its file and line."""
        return [
            part
            for number, low, high in self._pieces(start, start + count)
            for part in parts(self, self._shards[number], low, high)
        ]

    def _pieces(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Where the dataset's tokens [start, end) lie: shard by shard, its number and its tokens [low, high)."""
        number = bisect_right(self._ends, start)
        while start < end:
            first = self._begins[number]
            until = min(end, self._ends[number])
            yield number, start - first, until - first
            start, number = until, number + 1

    def signature(self, of_these_files: bool = False) -> str:
        """Another when a shard's file was written since: sizes and modification times, without reading a token.

        They are those of the opening, which asked every file. Where it did not (`check_files`), they are asked for now; raises as
        Manifest.load does.

        of_these_files: count the change times too, which nobody can set, so that a copy has another signature even where it was
        made with the times of the original.
        """
        if self._facts is None:
            self._facts = self.manifest.file_facts(self.directory)
        names = "\n".join([self.manifest.fingerprint, *(shard.path for shard in self.manifest.shards)])
        # The last is when its entry changed, which nobody can set.
        facts = self._facts if of_these_files else self._facts[:, :2]
        return hashlib.sha256(names.encode() + b"\0" + facts.tobytes()).hexdigest()

    def check(self, share: tuple[int, int] = (0, 1), alive: Callable[[], None] = lambda: None) -> str | None:
        """Read shards and compare them with the manifest: checksum, and ids within the vocabulary.

        share: (k, n) reads every n-th shard from the k-th on. alive is called after each block, by other threads. Returns what
        is wrong first, naming the file, or None.
        """
        mine = self._shards[share[0] :: share[1]]
        stretches = [Stretch(self.directory / s.path, s.dtype, s.offset, s.tokens) for s in mine]
        vocab_size = self.manifest.tokenizer.vocab_size
        for shard, found in zip(mine, scan_all(stretches, self.manifest.tokenizer, alive)):
            if (found.tokens, found.checksum) != (shard.tokens, shard.checksum):
                return f"{self.directory / shard.path} is damaged: its checksum is not the manifest's"
            if found.smallest < 0 or found.largest >= vocab_size:
                ids = f"{found.smallest} to {found.largest}"
                return f"{self.directory / shard.path} has ids from {ids}, not all in a vocabulary of {vocab_size}"
        return None

    def _read(self, number: int, low: int, into: np.ndarray) -> None:
        """Fill `into` with the tokens of shard `number` from its token `low` on."""
        dtype = self._dtypes[number]
        stored = into if into.dtype == dtype else np.empty(len(into), dtype)
        place = self._offsets[number] + low * dtype.itemsize
        path = self._paths[number]
        try:
            size = self._read_once(path, stored, place)
        except OSError as error:
            size = self._read_patiently(path, stored, place, error)
        if size != stored.nbytes:
            raise OSError(f"{path} was cut short while in use: prepare or copy it again")
        if stored is not into:
            into[:] = stored

    def _read_once(self, path: str, into: np.ndarray, place: int) -> int:
        """Read a shard's bytes from `place` on; returns how many."""
        file = self._file(path)  # held, so that no other thread's eviction closes it while it is read
        self._opened = True
        return os.preadv(file.fd, [into], place)  # type: ignore[list-item]  # an array is a buffer

    def _read_patiently(self, path: str, into: np.ndarray, place: int, error: OSError) -> int:
        """The same after it has failed with `error`, again and again; raises the last OSError when RETRY_S are over."""
        until, pause_s = time.monotonic() + RETRY_S, FIRST_PAUSE_S
        while True:
            if error.errno in (errno.EMFILE, errno.ENFILE) and self._file.cache_info().currsize:
                self._file.cache_clear()  # too many files are open: those here are closed
            elif not self._opened and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM):
                raise error
            else:
                why = f"{error.strerror} on {socket.gethostname()}"
                if self._leaving.is_set():
                    raise error
                if time.monotonic() >= until:
                    raise OSError(error.errno, f"{why}, for {RETRY_S:,.0f} s", path) from error
                if pause_s == FIRST_PAUSE_S:
                    line = f"{path} cannot be read ({why}); it is tried again for {RETRY_S:,.0f} s"
                    with suppress(OSError):  # the log may lie on the same file system
                        print(line, file=sys.stderr, flush=True)
                self._file.cache_clear()  # a handle that is stale is seldom alone
                self._leaving.wait(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            try:
                return self._read_once(path, into, place)
            except OSError as again:
                error = again
