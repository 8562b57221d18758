"""Saving beside training: slow and full disks, one job at a time; nothing false is ever committed."""

import errno
import gc
import json
import os
import shutil
import threading
from concurrent.futures import Future
from pathlib import Path
from unittest import mock

import pytest
import torch
from fault_saves import Filled, check_all
from forks import finish, fork_ranks, with_group
from test_checkpoint import make_state, save, snapshot, two_checkpoints  # noqa: F401  two_checkpoints: the fixture run_dir
from torch.distributed.checkpoint import filesystem

from pretrain import checkpoint, retention, saver, synced
from pretrain.lock import Lock, Taken, check
from pretrain.sections import CheckpointConfig


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


def test_a_save_holds_up_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU, DCP would copy ahead and wait for the training's queue; its plans would make the collector run."""
    dcp_save, calls = saver.dcp.save, []

    def save_beside_a_gpu(*args: object, **options: object) -> object:
        calls.append(gc.isenabled())
        ahead = mock.patch.object(filesystem, "_OverlappingCpuLoader", side_effect=AssertionError("copies ahead"))
        with ahead, mock.patch("torch.cuda.is_available", return_value=True):
            return dcp_save(*args, **options)

    monkeypatch.setattr(saver.dcp, "save", save_beside_a_gpu)
    writer = saver.Saver(tmp_path, CheckpointConfig(), say=lambda line: None)
    model, optimizer = make_state(3)
    writer.save(7, model, optimizer, {"step": 7})
    writer.close()
    assert [step for step, _ in checkpoint.committed(tmp_path)] == [7]
    assert calls == [False]
    assert gc.isenabled()


def test_a_slow_disk_gives_signs_of_life_and_a_stuck_one_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While training waits for a save, what its thread gets done is told to the watchdog, and nothing else is."""
    noticed, signs = threading.Event(), []
    write = saver.Saver._write_tensors

    def slow_write(self: saver.Saver, *args: object) -> None:
        while not noticed.wait(0.01):
            assert len(signs) < 6000, "nobody looks"
            signs.append(self._alive())
        before = self._signs
        write(self, *args)
        signs.append(self._signs - before)

    monkeypatch.setattr(saver.Saver, "_write_tensors", slow_write)
    monkeypatch.setattr(saver, "alive", noticed.set)
    monkeypatch.setattr(synced, "_SYNCED", 1)
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


def test_a_disk_that_once_stood_still_is_remembered_and_then_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the run, not the process: each save here is another start's."""
    now, pause_s = [0.0], [100.0, *[1.0] * 9]
    write = saver.Saver._write_tensors

    def slow_write(self: saver.Saver, *args: object) -> None:
        write(self, *args)
        now[0] += pause_s.pop(0)

    monkeypatch.setattr(saver.Saver, "_write_tensors", slow_write)
    monkeypatch.setattr(saver.time, "perf_counter", lambda: now[0])
    model, optimizer = make_state(3)
    longest = []
    for step in range(1, 11):
        writer = saver.Saver(tmp_path, CheckpointConfig(), say=lambda line: None)
        longest.append(writer.longest_s)
        writer.save(step, model, optimizer, {"step": step})
        writer.close()
    assert longest == [0, *[100] * 8, 1]
    assert writer.longest_s == 1


def test_the_savers_thread_uses_the_ranks_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[int, str]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    stager = saver.StateDictStager  # type: ignore[attr-defined]
    monkeypatch.setattr(saver, "StateDictStager", lambda pin_memory: stager())
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
        patch.setattr(saver.Saver, "_write_tensors", lambda *_: pytest.fail("it begins to write"))
        writer.save(10, model, optimizer, {"step": 10})
        assert "1.0 MiB free and a checkpoint needs 2.5 MiB" in str(writer.wait())
    assert "step 10: NOT saved, training goes on" in said[-1]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    writer.save(15, model, optimizer, {"step": 15})
    writer.close()
    assert checkpoint.find(tmp_path, pytest.fail).name == "step-00000015"


def test_where_all_are_kept_nothing_is_saved_by_the_clock_but_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without keep_last the clock would fill the disk; a step whose save failed is another matter."""
    now = [1000.0]
    monkeypatch.setattr(saver.time, "perf_counter", lambda: now[0])
    model, optimizer = make_state(3)
    overdue = []
    for keep_last in (1, 0):
        settings = CheckpointConfig(every_minutes=30, keep_last=keep_last)
        writer = saver.Saver(tmp_path / str(keep_last), settings, say=lambda line: None)
        now[0] += 1801
        overdue.append(writer.overdue())
        writer.save(5, model, optimizer, {"step": 5})
        assert writer.wait() is None
        now[0] += 1801
        overdue.append(writer.overdue())
        writer.close()
    assert overdue == [True, True, False, False]
    writer = saver.Saver(tmp_path / "0", settings, say=lambda line: None)
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    with monkeypatch.context() as patch:
        patch.setattr(saver.shutil, "disk_usage", lambda path: full)
        writer.save(10, model, optimizer, {"step": 10})
        assert writer.wait() is not None
    now[0] += 299
    assert not writer.overdue()
    now[0] += 2
    assert writer.overdue()
    writer.save(11, model, optimizer, {"step": 11})
    assert writer._pending is not None
    assert writer._pending.result(timeout=60) is None
    now[0] += 301  # nobody has waited for it yet, as in training
    assert not writer.overdue()
    writer.close()
    now[0] += 1801
    assert not writer.overdue()


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


def test_a_second_job_on_a_run_folder_is_refused_and_the_lock_ends_with_its_holder(tmp_path: Path) -> None:
    held = Lock(tmp_path)
    with pytest.raises(BlockingIOError, match=rf"process {os.getpid()} on .* is writing into"):
        Lock(tmp_path)
    held.close()
    Lock(tmp_path).close()


def test_a_second_job_that_no_lock_held_back_loses_nothing_of_the_first(tmp_path: Path) -> None:
    """Where locks hold within a host only: who was there first saves no more, and says why; what is there stays."""
    model, optimizer = make_state(3)
    held, said = Lock(tmp_path), []
    writer = saver.Saver(tmp_path, CheckpointConfig(), said.append)
    writer.save(5, model, optimizer, {"step": 5})
    assert writer.wait() is None
    (tmp_path / ".lock").write_text("process 7 on another-host, 0123\n")
    (tmp_path / "checkpoints" / ".staging-step-00000010").mkdir()  # of the step that this one comes to, too
    writer.save(10, model, optimizer, {"step": 10})
    assert "another job (process 7 on another-host, 0123) has begun to write" in str(writer.wait())
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [".staging-step-00000010", "step-00000005"]
    (tmp_path / ".lock").unlink()
    writer.save(15, model, optimizer, {"step": 15})
    writer.close()
    held.close()


def test_a_start_that_was_refused_where_locks_do_not_reach_ends_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another host, that is; a file system that locks within a host only lets both in."""
    held = Lock(tmp_path)
    mine = Lock.ours[tmp_path.resolve()]
    monkeypatch.setattr("fcntl.flock", lambda *arguments: None)
    other = Lock(tmp_path)
    Lock.ours[tmp_path.resolve()] = mine
    with pytest.raises(Taken):
        check(tmp_path)
    other.close()
    Lock.ours[tmp_path.resolve()] = mine
    check(tmp_path)
    Lock(tmp_path)  # a third, which goes on
    Lock.ours[tmp_path.resolve()] = mine
    with pytest.raises(Taken):
        check(tmp_path)
    held.close()
    assert (tmp_path / ".lock").read_text(), "the third's name stays"


def test_a_note_that_cannot_be_written_keeps_no_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        saver.scheduler, "note_saved", mock.Mock(side_effect=OSError(errno.EDQUOT, "Disk quota exceeded"))
    )
    model, optimizer = make_state(3)
    said: list[str] = []
    writer = saver.Saver(tmp_path, CheckpointConfig(every_steps=5, keep_last=2), said.append)
    for step in (5, 10, 15, 20):
        writer.save(step, model, optimizer, {"step": step})
    writer.close()
    assert [step for step, _ in checkpoint.committed(tmp_path)] == [20, 15]
    assert f"step 20: {tmp_path} cannot be written: [Errno {errno.EDQUOT}] Disk quota exceeded" in said


def test_a_run_folder_that_is_moved_while_it_trains_loses_nothing_and_is_named(tmp_path: Path) -> None:
    model, optimizer = make_state(3)
    folder, said = tmp_path / "run", []
    folder.mkdir()
    writer = saver.Saver(folder, CheckpointConfig(), said.append)
    writer.save(5, model, optimizer, {"step": 5})
    assert writer.wait() is None
    folder.rename(tmp_path / "moved")
    writer.save(10, model, optimizer, {"step": 10})
    writer.close()
    assert f"{folder} is gone, moved or deleted: a new one is made for the checkpoints" in said
    assert [checkpoint.committed(tmp_path / name)[0][0] for name in ("moved", "run")] == [5, 10]


def test_a_file_system_without_locks_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(OSError, match="cannot be locked against a second job"):
        Lock(tmp_path)


def test_what_the_clock_has_saved_pushes_out_nothing_that_the_steps_have(tmp_path: Path) -> None:
    for step in (10, 14, 18, 20, 23, 26, 29, 30, 33, 36):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        retention.prune(tmp_path, CheckpointConfig(every_steps=10, keep_last=2))
    assert [step for step, _ in checkpoint.committed(tmp_path)] == [36, 33, 30, 20]


@pytest.mark.parametrize("failing", ["write", "read back"])
def test_a_save_that_fails_on_one_rank_has_failed_on_all(tmp_path: Path, failing: str) -> None:
    """Rank 1's disk, once: both ranks say the same, the checkpoint before stays, and the next save is good."""

    def body(rank: int) -> None:
        lines: list[str] = []
        state = Filled(tmp_path, lines.append)
        state.save(1, 1)
        assert state.saver.wait() is None
        owner, name = (synced._Stream, "write") if failing == "write" else (checkpoint, "describe")
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(owner, name, mock.Mock(side_effect=OSError(errno.EIO, "a made-up error")))
            state.save(2, 2)
            problem = state.saver.wait()
        (tmp_path / f"said-{rank}").write_text(json.dumps([problem, lines[1:]]))
        state.save(3, 3)
        state.saver.close()

    output = tmp_path / "output.txt"
    assert finish(fork_ranks(2, output, with_group(2, body))) == [0, 0], output.read_text()
    (problem, lines), other = (json.loads((tmp_path / f"said-{rank}").read_text()) for rank in (0, 1))
    assert "a made-up error" in problem
    assert lines == [f"step 2: NOT saved, training goes on: {problem}"]
    assert other == [problem, []]
    assert [step for step, _ in checkpoint.committed(tmp_path)] == [3, 1]
    assert check_all(tmp_path) == (3, 3)
