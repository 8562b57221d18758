"""A checkpoint is whole or it is not one: damage is found, set aside, and the one before is taken."""

import builtins
import errno
import io
import itertools
import json
import os
import pickle
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_MODEL

from pretrain import checkpoint, saver
from pretrain.lock import lock
from pretrain.model import Llama
from pretrain.optim import make_optimizer
from pretrain.sections import CheckpointConfig, ModelConfig, OptimConfig


def make_state(seed: int) -> tuple[Llama, torch.optim.AdamW]:
    """A model and an optimizer that have taken a step, different for every seed."""
    with torch.device("meta"):
        model = Llama(ModelConfig(**TINY_MODEL))
    model.materialize(torch.device("cpu"))
    model.init_weights(seed)
    optimizer = make_optimizer(model, OptimConfig())
    tokens = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(seed))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    return model, optimizer


def save(run_dir: Path, step: int, model: Llama, optimizer: torch.optim.AdamW, **state: object) -> None:
    writer = saver.Saver(run_dir, CheckpointConfig(keep_last=0), say=lambda line: None)
    writer.save(step, model, optimizer, {"step": step, **state})
    writer.close()


def snapshot(model: Llama, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in checkpoint.tensors_of(model, optimizer).items()}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 5 and 10."""
    for step in (5, 10):
        save(tmp_path, step, *make_state(step), note="kept")
    return tmp_path


def test_what_is_saved_is_what_is_loaded(run_dir: Path) -> None:
    model, optimizer = make_state(99)
    state = checkpoint.load(run_dir / "checkpoints" / "step-00000010", model, optimizer)
    assert state == {"step": 10, "note": "kept", "updates": 1, "save_s": 0.0}
    expected = snapshot(*make_state(10))
    loaded = snapshot(model, optimizer)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert all(s["step"] == 1 for s in optimizer.state.values())
    weights = checkpoint.load_weights(run_dir / "checkpoints" / "step-00000010")
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


def test_it_can_be_loaded_before_the_first_step(run_dir: Path) -> None:
    with torch.device("meta"):
        model = Llama(ModelConfig(**TINY_MODEL))
    model.materialize(torch.device("cpu"))
    optimizer = make_optimizer(model, OptimConfig())
    checkpoint.load(run_dir / "checkpoints" / "step-00000005", model, optimizer)
    expected = snapshot(*make_state(5))
    assert all(torch.equal(t, expected[name]) for name, t in snapshot(model, optimizer).items())


FILES = ["tensors/__0_0.distcp", "tensors/.metadata", "state.json", "manifest.json"]


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    elif how == "truncate":
        del data[-1:]
    elif how == "zero":
        data[len(data) // 3 : len(data) // 3 + 64] = bytes(64)
    if how == "delete":
        path.unlink()
    else:
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["flip", "truncate", "zero", "delete"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_taken(run_dir: Path, name: str, how: str) -> None:
    folders = run_dir / "checkpoints"
    damage(folders / "step-00000010" / name, how)
    warnings: list[str] = []
    assert checkpoint.latest(run_dir, warnings.append) == folders / "step-00000005"
    assert (folders / "step-00000010").exists(), "reading sets nothing aside"
    assert checkpoint.find(run_dir, warnings.append) == folders / "step-00000005"
    assert len(warnings) == 2
    assert all("step-00000010 is corrupt" in warning for warning in warnings)
    if name != "manifest.json":
        assert name in warnings[0]
    assert sorted(p.name for p in folders.iterdir()) == ["corrupt-step-00000010.1", "step-00000005"]


def test_a_shard_of_another_checkpoint_is_found(run_dir: Path) -> None:
    folders = run_dir / "checkpoints"
    shutil.copy(folders / "step-00000005" / FILES[0], folders / "step-00000010" / FILES[0])
    assert FILES[0] in str(checkpoint.verify(folders / "step-00000010"))


def test_what_is_not_committed_is_not_looked_at(run_dir: Path) -> None:
    folders = run_dir / "checkpoints"
    shutil.copytree(folders / "step-00000010", folders / ".staging-step-00000015")
    shutil.copytree(folders / "step-00000010", folders / ".deleting-step-00000020")
    assert checkpoint.find(run_dir, pytest.fail) == folders / "step-00000010"
    save(run_dir, 15, *make_state(15))
    assert checkpoint.find(run_dir, pytest.fail) == folders / "step-00000015"
    assert not (folders / ".staging-step-00000015").exists()


def test_the_newest_is_the_largest_number(tmp_path: Path) -> None:
    for step in (960_000, 99_999_999, 100_000_000):  # in a list of names the last stands first
        save(tmp_path, step, *make_state(1))
    assert checkpoint.find(tmp_path, pytest.fail).name == "step-100000000"


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, *make_state(1))
    saver.prune(tmp_path, CheckpointConfig(keep_last=0))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4
    saver.prune(tmp_path, CheckpointConfig(keep_last=1, keep_every=2))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    saver.prune(tmp_path, CheckpointConfig(keep_last=1))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000004"]


def test_a_step_saved_again_replaces_and_keeps_the_old_one(run_dir: Path) -> None:
    save(run_dir, 10, *make_state(77))
    folders = run_dir / "checkpoints"
    assert sorted(p.name for p in folders.iterdir()) == ["replaced-step-00000010.1", "step-00000005", "step-00000010"]
    assert checkpoint.verify(folders / "step-00000010") is None
    expected = dict(make_state(77)[0].named_parameters())
    assert all(torch.equal(t, expected[n]) for n, t in checkpoint.load_weights(folders / "step-00000010").items())


def test_a_run_begun_again_from_an_earlier_checkpoint_leaves_the_later_ones_behind(run_dir: Path) -> None:
    """Else the next start would go on from what was abandoned, and pruning would take the new ones for old."""
    for step in (15, 20):
        save(run_dir, step, *make_state(step))
    writer = saver.Saver(run_dir, CheckpointConfig(keep_last=2), say=lambda line: None)
    writer.save(10, *make_state(77), {"step": 10})
    writer.close()
    left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    replaced = [f"replaced-step-000000{step}.1" for step in (10, 15, 20)]
    assert left == [*replaced, "step-00000005", "step-00000010"]


def test_a_kill_while_a_step_is_replaced_leaves_one_of_the_two(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, seen = os.rename, []

    def watched(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(target).parent.name == "checkpoints":
            seen.append(checkpoint.latest(run_dir, pytest.fail).name)  # what a start would find after a kill here

    monkeypatch.setattr(saver.os, "rename", watched)
    writer = saver.Saver(run_dir, CheckpointConfig(), say=lambda line: None)
    writer.save(10, *make_state(77), {"step": 10})
    assert writer.wait() is None
    assert seen == ["step-00000010.old", "step-00000010", "step-00000010"]
    monkeypatch.undo()
    rename(run_dir / "checkpoints" / "step-00000010", run_dir / "checkpoints" / "step-00000010.old")
    writer.save(10, *make_state(78), {"step": 10})
    writer.close()
    expected = dict(make_state(78)[0].named_parameters())
    saved = checkpoint.load_weights(checkpoint.find(run_dir, pytest.fail))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.items())
    assert not list((run_dir / "checkpoints").glob("*.old"))


def test_a_manifest_that_is_not_ours_is_refused(run_dir: Path) -> None:
    path = run_dir / "checkpoints" / "step-00000010" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "version": 99}))
    assert "cria-checkpoint 99" in str(checkpoint.verify(path.parent))
    path.write_text("[]")
    assert "cannot be read" in str(checkpoint.verify(path.parent))


def test_a_run_without_checkpoints_says_what_to_do(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path, pytest.fail) is None
    with pytest.raises(FileNotFoundError, match="pretrain train"):
        checkpoint.latest(tmp_path, pytest.fail)


def test_an_index_that_names_anything_else_is_not_opened(run_dir: Path) -> None:
    """DCP's index is a pickle; a crafted one whose checksum was adjusted still runs nothing."""
    folder = run_dir / "checkpoints" / "step-00000010"
    (folder / "tensors" / ".metadata").write_bytes(pickle.dumps(Harmful(run_dir / "harmed")))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["tensors/.metadata"] = checkpoint.describe(folder / "tensors" / ".metadata")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.verify(folder) is None
    with pytest.raises(pickle.UnpicklingError, match="has no place there"):
        checkpoint.load_weights(folder)
    assert not (run_dir / "harmed").exists()
    pickle.loads((folder / "tensors" / ".metadata").read_bytes())
    assert (run_dir / "harmed").exists(), "the pickle was harmless anyway"


class Harmful:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is the state at the call, though the weights change before the writing has begun."""
    begun, go_on = threading.Event(), threading.Event()
    write = saver.Saver._write_tensors

    def slow_write(self: saver.Saver, *args: object) -> None:
        begun.set()
        assert go_on.wait(30)
        write(self, *args)

    monkeypatch.setattr(saver.Saver, "_write_tensors", slow_write)
    model, optimizer = make_state(3)
    expected = snapshot(model, optimizer)
    writer = saver.Saver(tmp_path, CheckpointConfig(), say=lambda line: None)
    writer.save(7, model, optimizer, {"step": 7})
    assert begun.wait(30)
    assert checkpoint.committed(tmp_path) == []
    with torch.no_grad():
        for tensor in checkpoint.tensors_of(model, optimizer).values():
            tensor.zero_()
    go_on.set()
    writer.close()
    saved = checkpoint.load_tensors(tmp_path / "checkpoints" / "step-00000007")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_a_slow_disk_gives_signs_of_life_and_a_stuck_one_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While training waits for a save, what its thread gets done is told to the watchdog, and nothing else is."""
    noticed, signs = threading.Event(), []
    write = saver.Saver._write_tensors

    def slow_write(self: saver.Saver, *args: object) -> None:
        while not noticed.wait(0.01):
            assert len(signs) < 6000, "nobody looks"
            signs.append(self._sign())
        before = self._signs
        write(self, *args)
        signs.append(self._signs - before)

    monkeypatch.setattr(saver.Saver, "_write_tensors", slow_write)
    monkeypatch.setattr(saver, "alive", noticed.set)
    monkeypatch.setattr(saver, "_SYNCED", 1)
    writer = saver.Saver(tmp_path, CheckpointConfig(), say=lambda line: None)
    model, optimizer = make_state(3)
    writer.save(7, model, optimizer, {"step": 7})
    writer.close()
    assert signs[-1] > 100, "each tensor of a few kilobytes"
    monkeypatch.setattr(saver, "alive", lambda: pytest.fail("nothing is done"))
    stuck: Future[str | None] = Future()
    writer._pending = stuck
    threading.Timer(1.2, stuck.set_result, ["at last"]).start()
    assert writer.wait() == "at last"


def test_the_savers_thread_uses_the_ranks_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[int, str]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda n: chosen.append((n, threading.current_thread().name)))
    writer = saver.Saver(tmp_path, CheckpointConfig(), say=lambda line: None)
    writer.save(5, *make_state(3), {"step": 5})
    monkeypatch.undo()
    writer.close()
    assert chosen == [(3, "saver_0")]


def test_a_checkpoint_that_does_not_fit_is_not_begun_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    writer = saver.Saver(tmp_path, CheckpointConfig(), said.append)
    model, optimizer = make_state(3)
    writer.save(5, model, optimizer, {"step": 5})
    assert writer.wait() is None
    nearly_full = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(saver.shutil, "disk_usage", lambda path: nearly_full)
        writer.save(10, model, optimizer, {"step": 10})
        assert "1.0 MiB free and a checkpoint needs 2.5 MiB" in str(writer.wait())
    assert "step 10: NOT saved, training goes on" in said[-1]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    writer.save(15, model, optimizer, {"step": 15})
    writer.close()
    assert checkpoint.find(tmp_path, pytest.fail).name == "step-00000015"


@pytest.mark.parametrize("failing", ["_write_tensors", "_commit", "_make_room"])
def test_a_failed_write_commits_nothing_and_the_run_is_told_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    writer = saver.Saver(tmp_path, CheckpointConfig(), say=lambda line: None)
    model, optimizer = make_state(3)
    writer.save(5, model, optimizer, {"step": 5})

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    writer.wait()
    monkeypatch.setattr(saver.Saver, failing, fail)
    writer.save(10, model, optimizer, {"step": 10})
    with pytest.raises(OSError, match=r"not saved: .*No space left"):
        writer.close()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    assert checkpoint.find(tmp_path, pytest.fail).name == "step-00000005"


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


def test_a_second_job_on_a_run_folder_is_refused_and_the_lock_ends_with_its_holder(tmp_path: Path) -> None:
    held = lock(tmp_path)
    with pytest.raises(BlockingIOError, match=rf"process {os.getpid()} on .* is writing into"):
        lock(tmp_path)
    held.close()
    lock(tmp_path).close()
