"""Shards: what is written is what is read, by threads and forked processes too, and a disk that fails leaves no half file."""

import errno
import hashlib
import json
import os
import re
import resource
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_prep.folder import Folder, UnitRecord
from data_prep.shard import DTYPES, Manifest, Shard, ShardWriter, TokenDataset, TokenizerInfo, token_dtype
from data_prep.staging import staged_path, write_atomically

DIGEST = "sha256:" + "0" * 64
TOKENIZER = TokenizerInfo(DIGEST, "sentencepiece", 32000, 1, 2)


def make_dataset(root: Path, parts: list[np.ndarray], dtype: str = "uint16") -> Manifest:
    """A dataset with one shard for each array of `parts`."""
    shards = []
    for n, part in enumerate(parts):
        with ShardWriter(root, f"shards/{n:05d}.npy", dtype) as writer:
            for piece in np.array_split(part, 3):
                writer.append(piece)
        shards.append(writer.shard(f"{n}.jsonl.zst", documents=1, dropped={"code": n} if n else {}))
    manifest = Manifest("slimpajama", "train", TOKENIZER, True, False, tuple(shards))
    manifest.save(root)
    return manifest


@pytest.fixture
def parts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 32000, n) for n in (1000, 0, 1, 7, 0, 2500, 64, 3)]


def change(root: Path, **fields: object) -> None:
    """Overwrite fields of the manifest on disk, as somebody's editor would."""
    path = root / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_what_is_written_is_what_numpy_loads(tmp_path: Path, parts: list[np.ndarray], dtype: str) -> None:
    manifest = make_dataset(tmp_path, parts, dtype)
    for shard, part in zip(manifest.shards, parts, strict=True):
        array = np.load(tmp_path / shard.path, mmap_mode="r" if len(part) else None)
        np.testing.assert_array_equal(array, part)
        assert array.dtype == DTYPES[dtype]
        data = (tmp_path / shard.path).read_bytes()
        assert shard.checksum == "sha256:" + hashlib.sha256(data[shard.offset :]).hexdigest()
        assert len(data) == shard.end
    assert Manifest.load(tmp_path) == manifest
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_writers_of_one_shard_make_one_of_the_two(tmp_path: Path) -> None:
    """A job that lives on where its node counts as lost, and the one in its place."""
    with ShardWriter(tmp_path, "shards/a.npy", "uint16") as first:
        first.append(np.arange(50_000))
        with ShardWriter(tmp_path, "shards/a.npy", "uint16") as second:
            second.append(np.arange(1000))
            first.append(np.arange(50_000))
        np.testing.assert_array_equal(np.load(tmp_path / "shards/a.npy"), np.arange(1000))
    np.testing.assert_array_equal(np.load(tmp_path / "shards/a.npy"), np.tile(np.arange(50_000), 2))
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["a.npy"]
    long = tmp_path / ("é" * 120)
    assert len({staged_path(long), staged_path(long)}) == 2
    staged_path(long).touch()


@pytest.mark.parametrize("seq_len", [1, 7, 64, 2048, 3574])
def test_sequences_are_slices_of_the_concatenated_shards(tmp_path: Path, parts: list[np.ndarray], seq_len: int) -> None:
    make_dataset(tmp_path, parts)
    dataset, tokens = TokenDataset(tmp_path, max_open_files=2), np.concatenate(parts)
    count = dataset.num_sequences(seq_len)
    assert dataset.num_tokens == len(tokens) == 3575
    assert count == (len(tokens) - 1) // seq_len > 0
    order = np.random.default_rng(1).permutation(count)
    got = dataset.sequences(order, seq_len)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, np.stack([tokens[i * seq_len : i * seq_len + seq_len + 1] for i in order]))
    assert dataset.sequences([], seq_len).shape == (0, seq_len + 1)


def test_shards_of_others_at_an_offset_and_of_another_type(tmp_path: Path) -> None:
    first, second = np.arange(10, dtype="<i4"), np.arange(10, 30, dtype="<u2")
    (tmp_path / "a.bin").write_bytes(b"LITPKDS" + first.tobytes() + b"padding")
    (tmp_path / "b.bin").write_bytes(second.tobytes())
    shards = (
        Shard("a.bin", "int32", 7, 10, DIGEST, "a.bin", 1),
        Shard("b.bin", "uint16", 0, 20, DIGEST, "b.bin", 1),
    )
    Manifest("import", "train", TOKENIZER, False, False, shards).save(tmp_path)
    np.testing.assert_array_equal(TokenDataset(tmp_path).sequences([0, 1], 14)[:, 0], [0, 14])
    np.testing.assert_array_equal(TokenDataset(tmp_path).sequences([0], 29)[0], np.arange(30))


@pytest.mark.parametrize(("tokens", "count"), [(0, 0), (1, 0), (8, 0), (9, 1), (16, 1), (17, 2)])
def test_from_no_sequence_to_two(tmp_path: Path, tokens: int, count: int) -> None:
    make_dataset(tmp_path, [np.arange(tokens)])
    dataset = TokenDataset(tmp_path)
    assert dataset.num_sequences(8) == count
    with pytest.raises(IndexError, match=f"{count} sequences of 8 \\+ 1 tokens"):
        dataset.sequences([count], 8)
    with pytest.raises(IndexError):
        dataset.sequences([-1], 8)
    for call in (dataset.num_sequences, lambda seq_len: dataset.sequences([0], seq_len)):
        with pytest.raises(ValueError, match="seq_len is 0"):
            call(0)


def read_all(dataset: TokenDataset, seq_len: int) -> np.ndarray:
    return dataset.sequences(range(dataset.num_sequences(seq_len)), seq_len)


def test_threads_read_the_same(tmp_path: Path, parts: list[np.ndarray]) -> None:
    """Threads close each other's files all the time where only one may be open."""
    make_dataset(tmp_path, parts)
    expected = read_all(TokenDataset(tmp_path), 16)
    dataset = TokenDataset(tmp_path, max_open_files=1)
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: read_all(dataset, 16), range(40)):
            np.testing.assert_array_equal(got, expected)


FORKED = """
import hashlib, os, sys
from data_prep.shard import TokenDataset
dataset = TokenDataset(sys.argv[1])
read = lambda: hashlib.sha256(dataset.sequences(range(dataset.num_sequences(16)), 16).tobytes()).hexdigest()
here = read()  # leaves files open across the fork
inside, outside = os.pipe()
for _ in range(2):
    if os.fork() == 0:
        os.write(outside, read().encode())
        os._exit(0)
    assert read() == here
    os.wait()
assert os.read(inside, 200).decode() == here * 2
"""


def test_forked_processes_read_the_same(tmp_path: Path, parts: list[np.ndarray]) -> None:
    """Forked from a process without threads: here, locks that other threads hold would stay held for ever."""
    make_dataset(tmp_path, parts)
    subprocess.run([sys.executable, "-c", FORKED, str(tmp_path)], check=True, timeout=60)


def test_open_files_are_bounded_and_closed(tmp_path: Path) -> None:
    make_dataset(tmp_path, [np.arange(9)] * 40)
    before = len(os.listdir("/proc/self/fd"))
    dataset = TokenDataset(tmp_path, max_open_files=4)
    assert len(os.listdir("/proc/self/fd")) == before
    read_all(dataset, 8)
    assert len(os.listdir("/proc/self/fd")) == before + 4
    del dataset
    assert len(os.listdir("/proc/self/fd")) == before


def test_too_many_open_files_are_closed(tmp_path: Path) -> None:
    make_dataset(tmp_path, [np.arange(9)] * 40)
    dataset = TokenDataset(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.open(tmp_path, os.O_RDONLY) for _ in range(5)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free) + 1, before[1]))
    for descriptor in free:
        os.close(descriptor)
    try:
        tokens = read_all(dataset, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    np.testing.assert_array_equal(tokens, read_all(TokenDataset(tmp_path), 8))


def test_a_file_system_that_fails_over_is_waited_for(
    tmp_path: Path, parts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """First the handles are stale, then the names are gone for a while; those that are missing from the start are missing."""
    make_dataset(tmp_path / "data", parts)
    expected, dataset = read_all(TokenDataset(tmp_path / "data"), 16), TokenDataset(tmp_path / "data")
    read_all(dataset, 16)
    links = Path("/proc/self/fd").iterdir()
    stale = [int(fd.name) for fd in links if fd.is_symlink() and str(tmp_path) in os.readlink(fd)]
    read, pauses = os.preadv, list[float]()
    assert stale

    def fail_over(fd: int, buffers: list, place: int) -> int:
        if fd in stale and len(pauses) < 2:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(fd, buffers, place)

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 1:
            (tmp_path / "data" / "shards").rename(tmp_path / "away")
        elif len(pauses) == 5:
            (tmp_path / "away").rename(tmp_path / "data" / "shards")

    monkeypatch.setattr(os, "preadv", fail_over)
    monkeypatch.setattr(dataset._leaving, "wait", pause)
    np.testing.assert_array_equal(read_all(dataset, 16), expected)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0]
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"00000\.npy cannot be read \(Stale file handle on \S+\); it is tried again for 300 s", line)

    dataset = TokenDataset(tmp_path / "data")
    (tmp_path / "data" / "shards").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=r"00000\.npy"):
        read_all(dataset, 16)
    assert len(pauses) == 5, "it was never there"


def test_a_shard_that_stays_unreadable_is_named(
    tmp_path: Path, parts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, buffers: list, place: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    make_dataset(tmp_path, parts)
    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr("data_prep.shard.RETRY_S", 0.05)
    monkeypatch.setattr("data_prep.shard.FIRST_PAUSE_S", 0.01)
    with pytest.raises(OSError, match=rf"Input/output error on {socket.gethostname()}, for 0 s: .*00000\.npy"):
        read_all(TokenDataset(tmp_path), 16)


def test_a_failed_block_leaves_no_shard(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="from 0 to 65536"), ShardWriter(tmp_path, "a.npy", "uint16") as writer:
        writer.append(np.array([0, 65536]))
    assert not list(tmp_path.iterdir())
    assert (token_dtype(65536), token_dtype(65537)) == ("uint16", "uint32")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Else each retry would leave another copy of the shard."""
    record = UnitRecord(1, Shard("shards/a.npy", "uint16", 128, 1, DIGEST, "a.jsonl", 1), {})

    def fail(*args: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    def write_a_shard() -> None:
        with ShardWriter(tmp_path, "a.npy", "uint16") as writer:
            writer.append(np.array([1]))

    monkeypatch.setattr(os, call, fail)
    for write in (
        write_a_shard,
        lambda: write_atomically(tmp_path / "a.json", b"{}"),
        *([lambda: Folder(tmp_path).write_record(record)] if call == "replace" else []),
    ):
        with pytest.raises(OSError, match="quota"):
            write()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
