"""--resume, and a run's own configuration: what they name is taken, or refused with the reason."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config, write_config
from test_going_on import HALF, crash, state, train

from pretrain import back, checkpoint
from pretrain.__main__ import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any, **sections: Any) -> str:
    """What a start that is refused says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train(*arguments, **sections)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_folder_that_was_moved_takes_with_it_where_it_was_sent_back_to(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert train(datasets, run_dir, train={"max_steps": 7}) == 0
    (run_dir / "checkpoints").rename(tmp_path / "scratch")
    (run_dir / "checkpoints").symlink_to(tmp_path / "scratch")
    crash(monkeypatch, datasets, run_dir, "--resume", str(run_dir / "checkpoints" / "step-00000005"))
    run_dir.rename(tmp_path / "moved")
    export = ["export", str(tmp_path / "moved"), "--out", str(tmp_path / "model")]
    with pytest.raises(SystemExit):
        main(export)
    assert "was sent back to step 5 and has saved nothing since" in capsys.readouterr().err
    assert train(datasets, tmp_path / "moved", train={"max_steps": 8}) == 0
    assert "resumed after step 5" in capsys.readouterr().out
    main(export)
    assert "step 8" in capsys.readouterr().out


def test_what_resume_names_and_cannot_be_taken_is_refused_with_the_reason(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert train(datasets, run_dir, train={"max_steps": 7}) == 0
    folders = run_dir / "checkpoints"
    shutil.copytree(folders / "step-00000005", folders / ".staging-step-00000006")
    assert "was never finished" in refused(
        capsys, datasets, run_dir, "--resume", str(folders / ".staging-step-00000006")
    )
    assert not (run_dir / back.NAME).exists()
    for option in ("--resume", "--init_from"):
        where = run_dir if option == "--resume" else tmp_path / "new"
        assert f"name one of those in {folders}" in refused(capsys, datasets, where, option, str(run_dir))
    newest = folders / "step-00000007"
    (newest / "state.json").write_text("{}")
    said = refused(capsys, datasets, run_dir, "--resume", str(newest))
    assert "is corrupt, as said above, and has been set aside" in said
    assert train(datasets, run_dir, "--resume", str(folders / "step-00000005"), train={"max_steps": 6}) == 0


def test_a_run_that_is_sent_to_its_newest_leaves_nothing(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert train(datasets, run_dir, train={"max_steps": 7}) == 0
    crash(monkeypatch, datasets, run_dir, "--resume", str(run_dir / "checkpoints" / "step-00000005"))
    assert (run_dir / back.NAME).exists()
    crash(monkeypatch, datasets, run_dir, "--resume", str(run_dir / "checkpoints" / "step-00000007"))
    assert not (run_dir / back.NAME).exists(), "nor is it sent to where it was to go before"
    main(["export", str(run_dir), "--out", str(tmp_path / "model")])
    capsys.readouterr()
    assert train(datasets, run_dir, train={"max_steps": 8}) == 0
    assert "resumed after step 7" in capsys.readouterr().out


def test_resume_leads_past_a_checkpoint_of_a_newer_version(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert train(datasets, run_dir, train={"max_steps": 7}) == 0
    manifest = run_dir / "checkpoints" / "step-00000007" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": checkpoint.VERSION + 1}))
    assert "go on with the version of Cria that wrote it" in refused(capsys, datasets, run_dir)
    to = ("--resume", str(run_dir / "checkpoints" / "step-00000005"))
    assert train(datasets, run_dir, *to, train={"max_steps": 9}) == 0
    assert [step for step, _ in checkpoint.committed(run_dir)] == [9, 5]
    assert (run_dir / "checkpoints" / "replaced-step-00000007.1").is_dir(), "nothing is deleted"


def test_a_configuration_over_that_of_a_run_is_a_new_run(datasets: Path, tmp_path: Path) -> None:
    """And the same folder by another name is the same folder, but not a copy of it."""
    tree = {**tiny_config(datasets, tmp_path, **HALF), "run_dir": f"{tmp_path}/run/"}
    assert main(["train", "--config", str(write_config(tmp_path / "c.yaml", tree))]) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(tmp_path / "copy" / "config.yaml")])
    over = write_config(tmp_path / "over.yaml", {"run_dir": str(tmp_path / "new"), "train": {"max_steps": 5}})
    own = ["train", "--config", str(tmp_path / "run" / "config.yaml")]
    assert main([*own, "--config", str(over)]) == 0
    assert [state(tmp_path / name)["step"] for name in ("run", "new")] == [10, 5]
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert main(["train", "--config", str(tmp_path / "link" / "config.yaml"), "--train.max_steps", "11"]) == 0
    assert state(tmp_path / "run")["step"] == 11
