"""Room on the disk: too little of it is said before the work, by bytes and by files, for all that is still to do."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from test_prepare import corpus, options, undisturbed  # noqa: F401  fixtures

from data_prep import space
from data_prep.folder import Folder
from data_prep.prepare import run


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
