"""What a save leaves on a disk that fails at any of its calls, or loses its power: nothing false."""

import builtins
import errno
import io
import itertools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import checkpoint, saver
from pretrain.sections import CheckpointConfig


class FailingDisk:
    """Every call that touches the disk is counted, those of open files included; the `fail_at`-th raises."""

    def __init__(self, patch: pytest.MonkeyPatch, fail_at: int, number: int) -> None:
        self.calls, self.fail_at, self.number, self.failed = 0, fail_at, number, ""
        for name in ("fsync", "rename", "mkdir", "open"):
            patch.setattr(os, name, self._counted(name, getattr(os, name)))
        opened = io.open

        def open_counted(path: object, mode: str = "r", *args: Any, **options: Any) -> Any:
            if not set(mode) & set("wax+"):
                return opened(path, mode, *args, **options)
            self.count("open")
            return FailingFile(opened(path, mode, *args, **options), self)

        patch.setattr(io, "open", open_counted)
        patch.setattr(builtins, "open", open_counted)

    def count(self, name: str) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            self.failed = name
            raise OSError(self.number, os.strerror(self.number))

    def _counted(self, name: str, call: Callable) -> Callable:
        def counted(*args: Any, **options: Any) -> Any:
            self.count(name)
            return call(*args, **options)

        return counted


class FailingFile:
    """A file whose writes are counted."""

    def __init__(self, file: Any, disk: FailingDisk) -> None:
        self._file, self._disk = file, disk

    def write(self, content: Any) -> int:
        self._disk.count("write")
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "FailingFile":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._file.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_whichever_call_of_a_save_the_disk_fails_nothing_false_is_committed(tmp_path: Path, number: int) -> None:
    """The short form of fault 4: one call after the other fails; what a real disk does is in `make faults`."""
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    said: list[str] = []
    writer = saver.Saver(tmp_path, CheckpointConfig(keep_last=2), said.append)
    writer.save(1, model, optimizer, {"step": 1})
    assert writer.wait() is None
    failed, before = Counter[str](), tmp_path / "checkpoints" / "step-00000001"
    for step in itertools.count(2):
        with pytest.MonkeyPatch.context() as patch:
            disk = FailingDisk(patch, fail_at=step - 1, number=number)
            writer.save(step, model, optimizer, {"step": step})
            problem = writer.wait()
        folders = [folder for _, folder in checkpoint.committed(tmp_path)]
        assert all(checkpoint.verify(folder) is None for folder in folders)
        assert before in folders, "what was there before is gone"
        before = folders[0]
        if not disk.failed:
            assert problem is None
            break
        if problem is None:  # the call was for nothing that matters: a folder that is there
            assert folders[0].name == f"step-{step:08d}"
            continue
        failed[disk.failed] += 1
        assert os.strerror(number) in problem, f"{disk.failed} of call {disk.fail_at}: {problem}"
        assert f"step {step}: NOT saved, training goes on" in said[-1]
    writer.close()
    assert folders[0].name == f"step-{step:08d}", "the next save is good"
    assert failed.keys() == {"write", "fsync", "rename", "mkdir", "open"}
    assert failed.total() > 30


def test_everything_is_on_the_disk_before_the_rename_that_commits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power failure a file has what it had when it was last synced, a folder likewise."""
    synced, fsync, rename = dict[int, int](), os.fsync, os.rename
    committed: list[Path] = []

    def noted_fsync(file: int) -> None:
        fsync(file)
        synced[os.fstat(file).st_ino] = os.fstat(file).st_size

    def checked_rename(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".staging-"):
            for path in (Path(source), *Path(source).rglob("*")):
                assert path.stat().st_ino in synced, f"{path.name} was never synced"
                assert path.is_dir() or synced[path.stat().st_ino] == path.stat().st_size, f"{path.name} in part only"
            committed.append(Path(target))
            synced.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", checked_rename)
    model = torch.nn.Linear(4, 4)  # whose index fits the buffer of its file
    optimizer = torch.optim.AdamW(model.parameters())
    writer = saver.Saver(tmp_path, CheckpointConfig(), say=lambda line: None)
    writer.save(5, model, optimizer, {"step": 5})
    writer.close()
    assert committed == [tmp_path / "checkpoints" / "step-00000005"]
    assert (tmp_path / "checkpoints").stat().st_ino in synced, "the rename itself"
