"""What the machine does to preparation: a disk that fails is no fault of the file, and what it hid is read in the end."""

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_prepare import options
from test_prepare_faults import assert_same_bytes_of_any_size, clean  # noqa: F401  clean: a fixture

from data_prep import readers
from data_prep.prepare import FinishOptions, finish, run
from data_prep.readers import Position, Record
from data_prep.staging import staged_path


def test_a_damaged_file_that_was_borne_is_read_again_once_it_is_whole(
    clean: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    shutil.copytree(clean.parent / "in", tmp_path / "in")
    shutil.copy(tmp_path / "in/train/chunk1/a.jsonl.zst", tmp_path / "in/train/chunk1/b.jsonl.zst")
    run(options(tmp_path / "in", tmp_path / "expected"))
    path = tmp_path / "in/train/chunk1/a.jsonl.zst"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2].ljust(len(good), b"\0"))
    manifest = run(options(tmp_path / "in", tmp_path / "out", max_bad_documents=1.0))
    assert manifest is not None
    assert manifest.dropped == {"unreadable file": 1}
    path.write_bytes(good)
    run(options(tmp_path / "in", tmp_path / "out", max_bad_documents=1.0))
    assert_same_bytes_of_any_size(tmp_path / "out", tmp_path / "expected")


def fail(monkeypatch: pytest.MonkeyPatch, times: int, number: int = errno.EIO) -> list[float]:
    """Let each file's reading fail so often, behind its first 100 documents; gives the pauses that are made."""
    real, left, pauses = readers.read_jsonl, [times], []

    def failing(path: Path, position: Position) -> Iterator[Record]:
        for record in real(path, position):
            if record[0] == 100 and left[0]:
                left[0] -= 1
                raise OSError(number, os.strerror(number), str(path))
            yield record

    monkeypatch.setattr("data_prep.sources.read_jsonl", failing)
    monkeypatch.setattr("data_prep.unit.time.sleep", pauses.append)
    return pauses


def test_a_disk_that_fails_for_a_while_costs_nothing(
    clean: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    pauses = fail(monkeypatch, times=3)
    run(options(clean.parent / "in", tmp_path / "out"))
    assert pauses == [1, 2, 4]
    said = f"a.jsonl.zst' on {socket.gethostname()}; it is tried again for 300 s"
    assert capsys.readouterr().err.count(said) == 1
    assert_same_bytes_of_any_size(tmp_path / "out", clean)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EIO, "for 0 s: run the same command again when this can be read; finished files are kept"),
        (errno.ENOENT, ""),
    ],
)
def test_a_disk_that_fails_for_good_fails_the_work_and_records_nothing(
    clean: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    remedy: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.unit.RETRY_S", 0.0)
        pauses = fail(patch, times=99, number=number)
        with pytest.raises(OSError, match=r"a\.jsonl\.zst") as raised:
            run(options(clean.parent / "in", tmp_path / "out", max_bad_documents=1.0))
    assert (raised.value.errno, pauses) == (number, [])
    assert remedy in str(raised.value)
    assert not [path for path in (tmp_path / "out").rglob("train/*/*") if path.is_file()]
    run(options(clean.parent / "in", tmp_path / "out"))
    assert_same_bytes_of_any_size(tmp_path / "out", clean)


def test_what_killed_runs_left_is_swept_and_what_others_write_is_not(
    clean: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = shutil.copytree(clean, tmp_path / "out")
    (shard,) = out.glob("shards/train/*/*.npy")
    mine = [staged_path(path) for path in (shard, out / "manifest.json")]
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.staging.socket.gethostname", lambda: "elsewhere")
        living, old = staged_path(shard), staged_path(shard)
    for path in (*mine, living, old):
        path.touch()
    os.utime(old, (0, 0))
    run(options(clean.parent / "in", out, task="1/2"))
    assert all(path.exists() for path in (*mine, living, old))
    for alone in (lambda: run(options(clean.parent / "in", out)), lambda: finish(FinishOptions(directory=str(out)))):
        for path in (*mine, old):
            path.touch()
        os.utime(old, (0, 0))
        alone()
        assert [path.exists() for path in (*mine, living, old)] == [False, False, True, False]


@pytest.mark.parametrize("joined", [False, True])
def test_a_manifest_vouches_for_what_is_on_the_disk(
    clean: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    joined: bool,
) -> None:
    """With the power, nothing is lost: a shard's bytes, then its name, then all names, and only then the manifest."""
    out, calls = tmp_path / "out", []

    def noted(name: str) -> None:
        real = getattr(os, name)

        def call(*args: object) -> object:
            if name == "fsync":
                calls.append((name, os.readlink(f"/proc/self/fd/{args[0]}")))
            else:
                calls.append((name, *map(str, args)))
            return real(*args)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "replace", "sync"):
        noted(name)
    run(options(clean.parent / "in", out, task="1/2" if joined else "1/1"))
    if joined:
        assert ("sync",) not in calls
        run(options(clean.parent / "in", out, task="2/2"))
        finish(FinishOptions(directory=str(out)))
    (shard,) = out.glob("shards/train/*/*.npy")
    order = []
    for path in (shard, out / "manifest.json"):
        (staged,) = [call[1] for call in calls if call[0] == "replace" and call[2] == str(path)]
        order += [("fsync", staged), ("replace", staged, str(path))]
    order.insert(2, ("sync",))
    order.append(("fsync", str(out)))
    assert [call for call in calls if call in order][-6:] == order
