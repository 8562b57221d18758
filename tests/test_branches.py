"""A run that is made longer, cooled down on other data, or ended early: branches, and parts of a schedule."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import records, tiny_config, trajectory, write_config
from test_going_on import state, train

from pretrain import checkpoint, config, export, going_on, run_folder
from pretrain.__main__ import main


def test_a_run_of_constant_rate_has_branches_that_cool_down_on_better_data(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And goes on itself: its own folder is not touched, and the branch has its steps where the mixture is the same."""
    stable: dict[str, Any] = {"optim": {"lr_decay": "linear", "lr_decay_steps": 4}, "checkpoint": {"every_steps": 4}}
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    assert train(datasets, trunk, train={"max_steps": 16}, **stable) == 0
    before = {path: path.stat().st_mtime_ns for path in trunk.rglob("*")}
    capsys.readouterr()
    better = {"data": {"stages": [{"first_step": 11, "weights": {"a": 1, "b": 1}}]}}
    back = ("--resume", str(trunk / "checkpoints" / "step-00000008"))
    assert train(datasets, branch, *back, train={"max_steps": 12}, **stable, **better) == 0
    assert "learning rate of step 9 is 0.00232 by the new schedule and was 0.003" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in trunk.rglob("*")} == before
    of_trunk, of_branch = (records(run_dir, "train") for run_dir in (trunk, branch))
    assert list(of_branch) == [9, 10, 11, 12]
    assert [of_branch[step]["lr"] / 3e-3 for step in of_branch] == pytest.approx([0.775, 0.55, 0.325, 0.1])
    assert [of_trunk[step]["lr"] for step in (5, 12)] == [3e-3] * 2
    assert [of_trunk[s]["data_hash"] == of_branch[s]["data_hash"] for s in of_branch] == [True, True, False, False]
    assert of_trunk[9]["loss"] == of_branch[9]["loss"], "the same weights on the same sequences"
    assert [*records(branch, "validation")] == [8, 10, 12], "where it begins, too"
    assert state(branch)["branched_from"] == back[1]
    assert records(branch, "start")[8]["branched_from"] == back[1]

    capsys.readouterr()
    for name in ("SLURM_JOB_ID", "CRIA_RESTARTS"):  # another job, or one that is repeated: it is the same branch
        monkeypatch.setenv(name, "7")
        assert train(datasets, branch, *back, train={"max_steps": 13}, **stable, **better) == 0
        assert "resumed after step 1" in capsys.readouterr().out
    assert train(datasets, branch, train={"max_steps": 14}, **stable, **better) == 0
    assert state(branch)["branched_from"] == back[1], "though --resume is not said any more"
    assert not list((branch / "checkpoints").glob("replaced-*"))
    export.export(branch, tmp_path / "model", None, torch.float32, check=False)
    assert json.loads((tmp_path / "model" / "cria.json").read_text())["branched_from"] == back[1]
    for name in ("SLURM_JOB_ID", "CRIA_RESTARTS"):
        monkeypatch.delenv(name)
    moved = (tmp_path / "attic" / "trunk", tmp_path / "attic" / "trunk" / "checkpoints" / "step-00000008")
    moved[0].parent.mkdir()
    trunk.rename(moved[0])
    capsys.readouterr()
    assert train(datasets, branch, "--resume", str(moved[1]), train={"max_steps": 15}, **stable, **better) == 0
    assert "has saved since: it goes on from there" in capsys.readouterr().out, (
        "wherever it lies, it is that checkpoint"
    )
    moved[0].rename(trunk)
    shutil.rmtree(branch / "checkpoints")
    with pytest.raises(SystemExit):
        train(datasets, branch, *back, train={"max_steps": 14}, **stable, **better)
    assert f"{branch} has had checkpoints and there is none now" in capsys.readouterr().err
    assert (
        train(
            datasets,
            branch,
            "--resume",
            str(trunk / "checkpoints" / "step-00000004"),
            train={"max_steps": 10},
            **stable,
        )
        == 0
    ), "elsewhere"
    assert "resumed after step 4" in capsys.readouterr().out


def test_a_branch_begins_in_a_folder_of_its_own_and_has_something_to_do(
    datasets: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    back = ("--resume", str(straight / "checkpoints" / "step-00000010"))
    assert train(datasets, tmp_path / "own", train={"max_steps": 4}) == 0
    for run_dir, words, said in (
        (tmp_path / "own", (), "a branch begins in another run_dir"),
        (tmp_path / "new", ("--train.stop_after_step", "10"), "there is nothing for a branch to do"),
        (tmp_path / "new", ("--train.max_steps", "10"), "there is nothing for a branch to do"),
    ):
        with pytest.raises(SystemExit):
            train(datasets, run_dir, *back, *words)
        assert said in capsys.readouterr().err
    assert [step for step, _ in checkpoint.committed(tmp_path / "own")] == [4]
    inside = tmp_path / "outer" / "straight"
    shutil.copytree(straight, inside)
    back = ("--resume", str(inside / "checkpoints" / "step-00000010"))
    for last in ("12", "14"):
        assert train(datasets, tmp_path / "outer", *back, "--train.max_steps", last) == 0
    assert state(tmp_path / "outer")["branched_from"] == back[1], "though that run lies in its folder"
    assert "resumed after step 12" in capsys.readouterr().out


def test_a_job_that_went_back_before_branches_were_known_goes_on(
    datasets: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoints do not say where the run began; nor do they where the other run was moved."""
    back = ("--resume", str(straight / "checkpoints" / "step-00000005"))
    with monkeypatch.context() as patch:
        patch.setattr(going_on.Found, "branched_from", None)
        assert train(datasets, tmp_path / "run", *back, train={"max_steps": 12}) == 0
    monkeypatch.setenv("CRIA_RESTARTS", "1")
    capsys.readouterr()
    assert train(datasets, tmp_path / "run", *back, train={"max_steps": 14}) == 0
    assert "resumed after step 12" in capsys.readouterr().out


def test_the_checkpoint_before_the_decay_stays(datasets: Path, tmp_path: Path) -> None:
    sections = {"optim": {"lr_decay": "sqrt", "lr_decay_steps": 7}, "checkpoint": {"every_steps": 5, "keep_last": 1}}
    assert train(datasets, tmp_path / "run", **sections) == 0
    assert [step for step, _ in checkpoint.committed(tmp_path / "run")] == [20, 13]
    early: dict[str, Any] = {
        "optim": {"lr_decay": "sqrt", "lr_decay_steps": 4},
        "checkpoint": {"every_steps": 5, "keep_last": 1},
    }
    assert train(datasets, tmp_path / "early", "--train.stop_after_step", "10", **early) == 0
    early["optim"]["lr_decay_steps"] = 6
    assert train(datasets, tmp_path / "early", train={"max_steps": 16}, **early) == 0
    assert [step for step, _ in checkpoint.committed(tmp_path / "early")] == [16, 15, 10], "where it was taken up, too"


def test_a_key_that_the_checkpoint_does_not_know_had_its_default(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was written by an earlier version of Cria, and nothing has changed."""
    tree = tiny_config(datasets, tmp_path)
    settings = config.load(write_config(tmp_path / "c.yaml", tree))
    before = {"step": 10, "config": dataclasses.asdict(settings)}
    for key in ("lr_decay", "lr_decay_steps"):
        del before["config"]["optim"][key]
    del before["config"]["validation"]["sets"]
    run_folder._keep_config(settings, tmp_path / "config.yaml", before, print)
    assert capsys.readouterr().out == ""
    other = dataclasses.replace(settings, optim=dataclasses.replace(settings.optim, lr_decay_steps=5))
    run_folder._keep_config(other, tmp_path / "config.yaml", before, print)
    assert "optim.lr_decay_steps: 0 -> 5" in capsys.readouterr().out


def test_the_first_part_of_a_run_is_that_of_the_whole_run(
    datasets: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert train(datasets, run_dir, "--train.stop_after_step", "7") == 0
    assert "ended after step 7 of 20, by train.stop_after_step 7" in capsys.readouterr().out
    assert state(run_dir)["step"] == 7
    assert [*records(run_dir, "validation")][-1] == 7, "as after a last step"
    assert train(datasets, run_dir, "--train.stop_after_step", "7") == 0
    assert max(records(run_dir, "train")) == 7, "nothing more"
    capsys.readouterr()
    assert main(["train", "--config", str(run_dir / "config.yaml")]) == 0
    assert "configuration changed" not in capsys.readouterr().out
    ours, theirs = ([r for r in trajectory(folder) if len(r) > 2] for folder in (run_dir, straight))
    assert ours == theirs
    assert len(ours) == 20
