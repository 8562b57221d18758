"""Room on the disk: too little of it is said before the work, by bytes and by files, and where it ends within a file."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
from fault_disks import file_system
from test_prepare import assert_same_bytes, corpus, options, undisturbed  # noqa: F401  fixtures
from test_sources import line, write_jsonl
from test_tokenizer import LLAMA_MODEL

from data_prep import space
from data_prep.folder import Folder
from data_prep.prepare import run
from data_prep.shard import Manifest, ShardWriter, write_atomically


def test_too_little_room_is_said_before_the_work(
    corpus: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage._replace(free=200_000_000))
    with pytest.raises(
        OSError, match=r"has 0\.2 GB free, the 6 input files to do need about 0\.0 GB and 0\.3 GB must stay"
    ):
        run(options(corpus, tmp_path / "out"))
    assert not (tmp_path / "out/shards").exists()
    assert run(options(corpus, tmp_path / "out", check_space=False)) is not None


class Room(NamedTuple):
    """What os.statvfs tells of files."""

    f_files: int
    f_favail: int


@pytest.mark.parametrize(("room", "refused"), [(Room(1000, 17), True), (Room(1000, 18), False), (Room(0, 0), False)])
def test_too_few_inodes_are_said_before_the_work(
    corpus: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    room: Room,
    refused: bool,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(space.os, "statvfs", lambda path: room)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage)
    if refused:
        words = r"has room for 17 more files \(inodes; see df -i\), the 6 input files to do become 18: "
        with pytest.raises(OSError, match=words):
            run(options(corpus, tmp_path / "out"))
        assert not (tmp_path / "out/shards").exists()
    assert run(options(corpus, tmp_path / "out", check_space=not refused)) is not None


def test_a_task_of_an_array_looks_for_room_for_all_that_is_left(
    corpus: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage, out = shutil.disk_usage(tmp_path), tmp_path / "out"
    room = Room(1000, 18)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(space.os, "statvfs", lambda path: room)
    assert run(options(corpus, out, task="1/3")) is None
    room = Room(1000, 11)
    with pytest.raises(OSError, match="the 4 input files to do become 12"):
        run(options(corpus, out, task="2/3"))
    room = Room(1000, 12)
    monkeypatch.setattr("data_prep.prepare._SPACE_CHECK_SECONDS", 0.0)  # and again after each file
    asked: list[int] = []
    real = space.require_space
    monkeypatch.setattr(
        "data_prep.prepare.require_space", lambda out, todo, *more: (asked.append(len(todo)), real(out, todo, *more))
    )
    assert run(options(corpus, out, task="2/3")) is None
    assert asked == [4, 3, 2]


def test_room_is_estimated_by_what_was_made(undisturbed: Path) -> None:  # noqa: F811
    assert space.estimate({"a.jsonl": 1000, "b.jsonl.zst": 1000}, [], 2) == 2650
    assert space.estimate({"a.parquet": 1000}, [], 4) == 4000
    plain, packed = ("a.md", "a.py", "a.ndjson", "a.json", "a.txt", "a"), ("a.txt.gz", "a.jsonl.zstd")
    assert [space.estimate({name: 1000}, [], 2) for name in (*plain, *packed)] == [650] * 6 + [2000] * 2
    records = list(Folder(undisturbed).records(Folder(undisturbed).inputs()).values())
    assert len(records) == 6
    large = [type(records[0])(100 << 20, record.shard, record.subsets) for record in records]
    written = sum(2 * record.shard.tokens + 8 * record.shard.documents for record in records)
    assert space.estimate({"a": 6 * (100 << 20)}, large, 2) == pytest.approx(written)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device on .*: make room and run the same command again"),
        (errno.EDQUOT, "Disk quota exceeded on .*: make room in its quota and run the same command again"),
        (errno.EIO, "Input/output error on .*, for 0 s: run the same command again when this can be written"),
    ],
)
@pytest.mark.parametrize("at", ["append", "fsync"])
def test_what_cannot_be_written_is_named_with_its_folder(
    corpus: Path,  # noqa: F811
    undisturbed: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    words: str,
    at: str,
) -> None:
    """Python names no file when a write fails. What was done is kept, and half a shard is not."""
    out, calls = tmp_path / "out", []

    def failing(*_: object) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(number, os.strerror(number))
        return real(*_)

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.unit.RETRY_S", 0.0)
        run(options(corpus, out, task="6/6"))  # begun
        home, name = (ShardWriter, "append") if at == "append" else (os, "fsync")
        real = getattr(home, name)
        patch.setattr(home, name, failing)
        with pytest.raises(OSError, match=f"{words}; finished files are kept: '{out}'") as raised:
            run(options(corpus, out))
    assert raised.value.errno == number
    assert not list(out.rglob("*.tmp"))
    before = {path: path.stat().st_mtime_ns for path in out.glob("shards/**/*.npy")}
    assert 1 <= len(before) < 6
    run(options(corpus, out))
    assert_same_bytes(out, undisturbed)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("kind", ["full", "limited"])
def test_a_disk_that_is_full_within_a_file_says_so(tmp_path: Path, kind: str, workers: str) -> None:
    """A real one, where we may mount one; and a limit on the size of files, which is real everywhere."""
    if kind == "full" and os.geteuid() != 0:
        pytest.skip("mounts a file system")
    write_jsonl(tmp_path / "in/train/chunk1/a.jsonl.zst", line("small"))
    write_jsonl(tmp_path / "in/train/chunk1/b.jsonl.zst", *(line("a b c d e f g h " * 50_000) for _ in range(12)))
    room = tmp_path / "room"
    room.mkdir()
    command = [sys.executable, "-m", "data_prep", "slimpajama", "--input", tmp_path / "in", "--split", "train"]
    command += ["--tokenizer", LLAMA_MODEL, "--out", room / "out", "--workers", workers, "--check_space", "false"]
    try:
        mounted = file_system(room, 8 << 10) if kind == "full" else nullcontext()
        mounted.__enter__()
    except subprocess.CalledProcessError:
        pytest.skip("mounts a file system")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (7 << 20, 7 << 20))

    try:
        preexec = limit if kind == "limited" else None
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=preexec)
        assert done.returncode == 2, done.stdout + done.stderr
        (said,) = (text for text in done.stderr.splitlines() if text.startswith("data-prep: error: "))
        assert {"full": "No space left on device on ", "limited": "File too large on "}[kind] in said
        assert "make room" in said
        assert said.endswith(f"finished files are kept: '{room}/out'"), said
        assert not list(room.rglob("*.tmp"))
        if kind == "full":
            subprocess.run(["mount", "-o", "remount,size=64m", str(room)], check=True)
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        assert Manifest.load(room / "out").shards[1].tokens > 4_000_000
    finally:
        mounted.__exit__(None, None, None)


def test_a_small_file_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/settings\.json'"):
        write_atomically(tmp_path / "settings.json", b"{}")
    assert not list(tmp_path.iterdir())
