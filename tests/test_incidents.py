"""What happens to runs on real clusters: disks that are full for a while, files that are away, nodes that are taken."""

import errno
import os
import platform
import re
import resource
import stat
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import tiny_config, trajectory, write_config

from pretrain import checkpoint, config, going_on, parallel, preparation, run_folder, saver, scheduler, train, trainer
from pretrain.__main__ import main
from pretrain.hosts import this_host
from pretrain.sections import CheckpointConfig, ParallelConfig


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """But what a test says."""
    for name in (*os.environ, "SLURM_RESTART_COUNT", "CRIA_FAILURES"):
        if name.startswith(("SLURM_", "CRIA_")):
            monkeypatch.delenv(name, raising=False)


def command(datasets: Path, folder: Path, **sections: object) -> list[str]:
    return [
        "train",
        "--config",
        str(write_config(folder / "c.yaml", tiny_config(datasets, folder / "run", **sections))),
    ]


def status_of(words: list[str]) -> int:
    """What the command ends with, however it ends."""
    try:
        return main(words)
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 2),
        ({"SLURM_RESTART_COUNT": "1"}, scheduler.LATER),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "3", "CRIA_CHAIN": "1"}, 2),
        ({"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MIN": "3", "CRIA_CHAIN": "1"}, scheduler.LATER),
        ({"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MIN": "3"}, 2),  # each of them a run of its own
    ],
)
def test_a_file_system_that_is_away_is_final_only_where_nothing_was_started_before(
    datasets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    expected: int,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    source = {"name": "a", "weight": 1, "train": str(tmp_path / "not-mounted")}
    assert status_of(command(datasets, tmp_path, data={"sources": [source]})) == expected
    assert len(capsys.readouterr().err.splitlines()) == 1, "a line, not a traceback"


def test_what_a_user_got_wrong_stays_final_at_a_restart(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert status_of([*command(datasets, tmp_path), "--train.micro_batch_size", "3"]) == 2


def test_a_folder_that_an_earlier_start_still_holds_is_waited_for(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command(datasets, tmp_path)
    (tmp_path / "run").mkdir()
    held = run_folder.Lock(tmp_path / "run")
    assert status_of(words) == 2, "another job's: refused"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert status_of(words) == scheduler.LATER
    held.close()


def test_a_start_that_failed_holds_the_folder_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook, where the process lives on."""
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "note_start", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match=r"run_dir: .*No space left on device"), run_folder.enter(tmp_path):
            pytest.fail("entered")
    with run_folder.enter(tmp_path), pytest.raises(BlockingIOError):
        run_folder.Lock(tmp_path)


def test_a_save_that_failed_is_tried_again_soon_and_one_is_due_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_checkpoint import make_state

    now = [1000.0]
    monkeypatch.setattr(saver.time, "perf_counter", lambda: now[0])
    writer = saver.Saver(tmp_path, CheckpointConfig(every_minutes=30), say=lambda line: None)
    model, optimizer = make_state(3)
    writer.save(5, model, optimizer, {"step": 5})
    assert writer.wait() is None
    now[0] += 1799
    assert not writer.overdue()
    now[0] += 2
    assert writer.overdue()
    with monkeypatch.context() as full:
        full.setattr(
            saver.Saver, "_make_room", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        writer.save(10, model, optimizer, {"step": 10})
        writer._pending.exception(timeout=60)
    assert not writer.overdue()
    now[0] += 301
    assert writer.overdue(), "and nobody has waited for it yet"
    assert not writer.given_up(), "the first that failed, however long ago the last one was that did not"
    now[0] += 7200
    assert writer.given_up()
    writer.save(11, model, optimizer, {"step": 11})
    writer.close()
    now[0] += 301
    assert not writer.overdue()
    assert [step for step, _ in checkpoint.committed(tmp_path)] == [11, 5]


def test_by_the_clock_saves_change_nothing_in_the_run(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "straight").mkdir()
    assert main(command(datasets, tmp_path / "straight", checkpoint={"every_steps": 0})) == 0
    assert [step for step, _ in checkpoint.committed(tmp_path / "straight" / "run")] == [20]
    (tmp_path / "often").mkdir()
    save = saver.Saver.save
    monkeypatch.setattr(saver.Saver, "save", lambda self, *all_of: (save(self, *all_of), self.wait()))
    often = {"every_steps": 0, "every_minutes": 1e-9, "keep_last": 100}
    assert main(command(datasets, tmp_path / "often", checkpoint=often)) == 0
    assert len(checkpoint.committed(tmp_path / "often" / "run")) == 20
    assert trajectory(tmp_path / "often" / "run") == trajectory(tmp_path / "straight" / "run")


def test_a_run_without_a_gradient_says_so_though_its_last_save_fails(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tiny_config(datasets, tmp_path / "run", train={"max_skipped_steps": 2})
    run = preparation.prepare(config.load(write_config(tmp_path / "c.yaml", tree)))
    backward = run.fabric.backward
    monkeypatch.setattr(run.fabric, "backward", lambda loss: backward(loss * (1.0 if run.step < 2 else float("nan"))))
    monkeypatch.setattr(saver.Saver, "_commit", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(FloatingPointError, match=r"up to step 4.*not saved: .*No space left on device"):
        trainer.train(run)


def test_restarts_of_a_run_without_a_gradient_push_out_no_good_checkpoint(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tiny_config(
        datasets, tmp_path / "run", train={"max_skipped_steps": 2}, checkpoint={"every_steps": 5, "keep_last": 2}
    )
    settings = config.load(write_config(tmp_path / "c.yaml", tree))
    kept = []
    for _ in range(4):
        run = preparation.prepare(settings)
        backward = run.fabric.backward
        monkeypatch.setattr(
            run.fabric, "backward", lambda loss, f=backward, r=run: f(loss * (1.0 if r.step < 11 else float("nan")))
        )
        with pytest.raises(FloatingPointError):
            trainer.train(run)
        kept.append([step for step, _ in checkpoint.committed(tmp_path / "run")])
    assert kept == [[13, 10, 5]] * 4


def test_read_only_data_can_be_trained_on_twice(datasets: Path, tmp_path: Path) -> None:
    """As finished data often is; the copy in the run's folder is written, and must not be read-only too."""
    short = {"train": {"max_steps": 1}, "optim": {"warmup_steps": 1}}
    tokenizer = datasets / "a" / "train" / "tokenizer"
    modes = {path: path.stat().st_mode for path in (tokenizer, *tokenizer.iterdir())}
    try:
        for path in modes:
            path.chmod(path.stat().st_mode & ~0o222)
        assert main(command(datasets, tmp_path, **short)) == 0
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    copies = [tmp_path / "run" / "tokenizer", tmp_path / "run" / "tokenizer" / "tokenizer.json"]
    assert all(path.stat().st_mode & stat.S_IWUSR for path in copies)
    copies[1].write_text("damaged")
    assert main(command(datasets, tmp_path, **short)) == 0
    assert copies[1].read_text() == (tokenizer / "tokenizer.json").read_text()


def test_a_disk_without_room_for_one_checkpoint_is_said_before_the_first_step(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = SimpleNamespace(total=2**30, used=2**30, free=2**20)
    monkeypatch.setattr(saver.shutil, "disk_usage", lambda path: full)
    assert status_of(command(datasets, tmp_path)) == 2
    assert "has 1.0 MiB free and a checkpoint needs" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_lower_keep_last_makes_room_at_the_start_and_what_was_set_aside_is_named(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saves = {"every_steps": 5, "keep_last": 9}
    assert main(command(datasets, tmp_path, train={"max_steps": 20}, checkpoint=saves)) == 0
    folder = tmp_path / "run" / "checkpoints"
    checkpoint.set_aside(folder / "step-00000005", "replaced")
    full = SimpleNamespace(total=2**30, used=2**30, free=2**20)
    with monkeypatch.context() as patch:
        patch.setattr(saver.shutil, "disk_usage", lambda path: full)
        assert status_of(command(datasets, tmp_path, train={"max_steps": 21}, checkpoint=saves)) == 2
        assert re.search(
            r"such as the 1 that were set aside, \d+\.\d MiB, or start again with", capsys.readouterr().err
        )
        saves["keep_last"] = 1
        assert status_of(command(datasets, tmp_path, train={"max_steps": 21}, checkpoint=saves)) == 2
    said = capsys.readouterr().out
    assert "older checkpoints were deleted: step-00000015, step-00000010" in said
    assert re.search(r"holds 1 that were set aside, \d+\.\d MiB, which nothing deletes", said)
    assert [step for step, _ in checkpoint.committed(tmp_path / "run")] == [20]


@pytest.mark.parametrize("content", ["a: [", "- a list\n", "3", "\x00"])
def test_a_damaged_copy_of_the_configuration_is_kept_and_replaced(
    content: str, datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(datasets, tmp_path, train={"max_steps": 1}, optim={"warmup_steps": 1})
    assert main(words) == 0
    copy = tmp_path / "run" / "config.yaml"
    good = copy.read_text()
    copy.write_text(content)
    (tmp_path / "run" / "config.yaml.host-0a1b2c3d.tmp").write_text("a start was killed here")
    (tmp_path / "run" / "thesis.tmp").write_text("not ours")
    assert main(words) == 0
    assert copy.read_text() == good
    assert (tmp_path / "run" / "before-config.yaml.1").read_text() == content
    assert [path.name for path in (tmp_path / "run").glob("*.tmp")] == ["thesis.tmp"]


def test_other_versions_than_the_checkpoints_are_said(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(datasets, tmp_path, train={"max_steps": 1}, optim={"warmup_steps": 1})
    assert main(words) == 0
    assert "other versions" not in capsys.readouterr().out
    monkeypatch.setattr(going_on, "run_versions", lambda: {"torch": "9.9", "python": "3.99"})
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"step-00000001 was written with other versions: python {platform.python_version()}, now 3.99; torch" in said
    assert f"torch {version('torch')}, now 9.9" in said


def test_a_node_without_the_gpus_it_should_have_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name that SLURM has for it, also to the launch script."""
    monkeypatch.setenv("SLURMD_NODENAME", "gpu017")
    monkeypatch.setenv("CRIA_SUSPECT", str(tmp_path / "suspect"))
    assert this_host() == "gpu017"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert parallel._choose_accelerator(ParallelConfig(accelerator="auto"), 1) == "cpu"
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match=r"this PyTorch \(2\..*\) is one for CPUs: install one for CUDA"):
        parallel._choose_accelerator(ParallelConfig(accelerator="auto"), 1)
    assert not (tmp_path / "suspect").exists(), "the host is well"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert parallel._choose_accelerator(ParallelConfig(accelerator="cpu"), 1) == "cpu"
    with pytest.raises(OSError, match=f"8 GPUs on {this_host()}, and PyTorch finds none there"):
        parallel._choose_accelerator(ParallelConfig(accelerator="auto"), 1)
    assert (tmp_path / "suspect").read_text() == "gpu017\n"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    assert parallel._choose_accelerator(ParallelConfig(accelerator="auto"), 7) == "cuda"
    with pytest.raises(OSError, match=f"8 GPUs on {this_host()}, and PyTorch finds 7 there: see") as found:
        parallel._choose_accelerator(ParallelConfig(accelerator="auto"), 8)
    assert "--gpu-bind" not in str(found.value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(OSError, match=r"each task one GPU \(CUDA_VISIBLE_DEVICES 0\), give srun --gpu-bind=none"):
        parallel._choose_accelerator(ParallelConfig(accelerator="auto"), 8)


def test_gpus_that_are_seen_and_cannot_be_used_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old driver is the installation's fault; all else is the host's."""
    monkeypatch.setenv("CRIA_SUSPECT", str(tmp_path / "suspect"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    said = "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by downloading it."

    def fail() -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "init", fail)
    with pytest.raises(
        ValueError, match=r"too old \(found version 12040\): PyTorch 2\..* is built for CUDA .*; install one for a"
    ):
        parallel._choose_accelerator(ParallelConfig(accelerator="auto"), 8)
    said = (
        "Unexpected error from cudaGetDeviceCount(). Error 804: forward compatibility was attempted on non supported HW"
    )
    with pytest.raises(ValueError, match="install one for a CUDA that this driver knows"):
        parallel._choose_accelerator(ParallelConfig(accelerator="auto"), 8)
    assert not (tmp_path / "suspect").exists()
    said = "CUDA unknown error - this may be due to an incorrectly set up environment.\nmore"
    with pytest.raises(
        OSError, match=f"the GPUs of {this_host()} cannot be used .CUDA unknown error.* see nvidia-smi on that host"
    ):
        parallel._choose_accelerator(ParallelConfig(accelerator="auto"), 8)
    assert (tmp_path / "suspect").read_text() == f"{this_host()}\n"


def test_as_many_files_as_the_system_lets_us() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        train._open_many_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(before[1], 65536), before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_a_killed_save_has_left_is_no_reason_to_refuse_a_start(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `checkpoints` a link to a disk of its own, which is the one that counts."""
    elsewhere = tmp_path / "scratch"
    left = elsewhere / ".staging-step-00000005" / "tensors"
    left.mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(elsewhere)

    def free(path: Path) -> SimpleNamespace:
        full = path.resolve() != elsewhere or left.exists()
        return SimpleNamespace(total=2**30, used=0, free=2**20 if full else 2**30)

    monkeypatch.setattr(saver.shutil, "disk_usage", free)
    short = {"train": {"max_steps": 1}, "optim": {"warmup_steps": 1}}
    assert status_of(command(datasets, tmp_path, **short)) == 0
    monkeypatch.setattr(saver.shutil, "disk_usage", lambda path: SimpleNamespace(total=2**30, used=2**30, free=0))
    assert status_of(command(datasets, tmp_path, **short)) == 0, "there is nothing left to save"
