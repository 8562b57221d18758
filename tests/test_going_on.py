"""A second start with other words: --resume that a scheduler repeats, another mixture, stages still to come."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from conftest import pretrain, records, tiny_config, write_config, write_dataset

from pretrain import back, checkpoint, going_on, scheduler, trainer
from pretrain.__main__ import main

HALF = {"train": {"max_steps": 10}}


def train(datasets: Path, run_dir: Path, *words: str, weights: tuple[int, int] = (7, 3), **sections: Any) -> int:
    """`pretrain train` in this process."""
    tree = tiny_config(datasets, run_dir, **sections)
    for source, weight in zip(tree["data"]["sources"], weights):
        source["weight"] = weight
    return main(["train", "--config", str(write_config(run_dir.with_suffix(".yaml"), tree)), *words])


def state(run_dir: Path) -> dict[str, Any]:
    return checkpoint.read_state(checkpoint.latest(run_dir, pytest.fail))


def step_5_of_its_own(straight: Path, run_dir: Path) -> tuple[str, str]:
    """The words that send a run back, which has 20 steps."""
    shutil.copytree(straight, run_dir)
    return ("--resume", str(run_dir / "checkpoints" / "step-00000005"))


def test_a_scheduler_that_repeats_the_command_does_not_go_back_again(
    datasets: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    back = step_5_of_its_own(straight, tmp_path / "run")
    assert train(datasets, tmp_path / "run", *back, train={"max_steps": 12}) == 0
    assert "resumed after step 5" in capsys.readouterr().out
    monkeypatch.setenv("CRIA_RESTARTS", "1")
    assert train(datasets, tmp_path / "run", *back, train={"max_steps": 14}) == 0
    assert "resumed after step 12" in capsys.readouterr().out, "the scheduler's start goes on"
    monkeypatch.delenv("CRIA_RESTARTS")
    assert train(datasets, tmp_path / "run", *back, train={"max_steps": 14}) == 0
    assert "resumed after step 5" in capsys.readouterr().out, "a person's goes back"
    assert main(["train", "--config", str(tmp_path / "run" / "config.yaml"), "--train.max_steps", "15"]) == 0
    assert "resumed after step 14" in capsys.readouterr().out, "the run's own configuration goes on"


def crash(monkeypatch: pytest.MonkeyPatch, datasets: Path, run_dir: Path, *words: str, **sections: Any) -> None:
    """A start that dies in its first step, and has saved nothing."""
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(datasets, run_dir, *words, **sections)


def test_a_start_that_was_sent_back_and_saved_nothing_does_not_fall_to_the_branch_it_left(
    datasets: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    back = step_5_of_its_own(straight, run_dir)
    assert train(datasets, run_dir, *back, optim={"max_lr": 0.03}, train={"max_steps": 12}) == 0
    crash(monkeypatch, datasets, run_dir, *back, train={"max_steps": 12})
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setenv("CRIA_RESTARTS", "1")
        crash(patch, datasets, run_dir, *back, train={"max_steps": 12})
    assert "resumed after step 5" in capsys.readouterr().out, "step 12 is the first job's, which had the same --resume"
    assert train(datasets, run_dir, train={"max_steps": 7}) == 0, "by hand, without --resume"
    said = capsys.readouterr().out
    assert "an earlier start was sent back" in said
    assert "resumed after step 5" in said
    assert train(datasets, run_dir, train={"max_steps": 9}) == 0
    assert "resumed after step 7" in capsys.readouterr().out, "it has saved since"


def test_a_job_whose_first_start_never_came_to_the_checkpoints_goes_back_at_its_second(
    datasets: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest is of a job before, with the same --resume."""
    run_dir = tmp_path / "run"
    to = step_5_of_its_own(straight, run_dir)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert train(datasets, run_dir, *to, train={"max_steps": 12}) == 0
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    monkeypatch.setenv("CRIA_RESTARTS", "1")
    capsys.readouterr()
    assert train(datasets, run_dir, *to, train={"max_steps": 8}) == 0
    assert "resumed after step 5" in capsys.readouterr().out
    assert train(datasets, run_dir, *to, train={"max_steps": 9}) == 0
    said = capsys.readouterr().out
    assert "or gone back to it, and has saved since: it goes on from there" in said
    assert "resumed after step 8" in said


def test_of_the_branch_that_was_left_nothing_can_be_taken_any_more(datasets: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(datasets, run_dir, train={"max_steps": 7}) == 0
    to = ("--resume", str(run_dir / "checkpoints" / "step-00000005"))
    assert train(datasets, run_dir, *to, train={"max_steps": 9}) == 0
    assert [step for step, _ in checkpoint.committed(run_dir)] == [9, 5]
    assert (run_dir / "checkpoints" / "replaced-step-00000007.1").is_dir()


def test_what_it_saved_is_not_lost_where_the_branch_that_was_left_cannot_be_set_aside(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor where it is killed between the two."""
    run_dir = tmp_path / "run"
    assert train(datasets, run_dir, train={"max_steps": 10}) == 0
    to = ("--resume", str(run_dir / "checkpoints" / "step-00000005"))
    with monkeypatch.context() as patch:
        keep = checkpoint.set_aside
        denied = Mock(side_effect=OSError(13, "Permission denied"))
        patch.setattr(checkpoint, "set_aside", lambda path, why: (denied if why == "replaced" else keep)(path, why))
        sections: dict[str, Any] = {"train": {"max_steps": 9}, "checkpoint": {"every_steps": 2, "keep_last": 2}}
        assert train(datasets, run_dir, *to, **sections) == 0
    assert [step for step, _ in checkpoint.committed(run_dir)] == [10, 9, 8, 6, 5], "nothing is pruned meanwhile"
    capsys.readouterr()
    assert train(datasets, run_dir, train={"max_steps": 10}) == 0
    assert "resumed after step 9" in capsys.readouterr().out
    assert [path.name for path in (run_dir / "checkpoints").glob("replaced-*")] == ["replaced-step-00000010.1"]


def test_a_note_that_cannot_be_deleted_holds_nobody_up(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert train(datasets, run_dir, train={"max_steps": 7}) == 0
    monkeypatch.setattr(back, "forget", Mock(side_effect=OSError(5, "Input/output error")))
    to = ("--resume", str(run_dir / "checkpoints" / "step-00000005"))
    assert train(datasets, run_dir, *to, train={"max_steps": 9}) == 0
    for steps in (11, 13):
        capsys.readouterr()
        assert train(datasets, run_dir, train={"max_steps": steps}) == 0
        said = capsys.readouterr().out
        assert f"resumed after step {steps - 2}" in said
        assert "back.json cannot be deleted, which does no harm: [Errno 5]" in said
    assert len(list((run_dir / "checkpoints").glob("replaced-*"))) == 1


@pytest.mark.parametrize("steps", [6, 11], ids=["in its first save", "after its third"])
def test_a_start_that_saved_and_could_not_say_so_goes_on_from_that(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], steps: int
) -> None:
    """Killed a moment too early, or on a disk that fails just there."""
    run_dir = tmp_path / "run"
    assert train(datasets, run_dir, train={"max_steps": 7}) == 0
    to = ("--resume", str(run_dir / "checkpoints" / "step-00000005"))
    with monkeypatch.context() as patch:
        patch.setattr(back, "forget", Mock(side_effect=OSError(5, "Input/output error")))
        assert train(datasets, run_dir, *to, train={"max_steps": steps}, checkpoint={"every_steps": 2}) == 0
    assert capsys.readouterr().out.count("Input/output error") == {6: 1, 11: 4}[steps], "it tries at each save"
    assert train(datasets, run_dir, train={"max_steps": 12}) == 0
    assert f"resumed after step {steps}" in capsys.readouterr().out
    assert steps in [step for step, _ in checkpoint.committed(run_dir)]
    assert [path.name for path in (run_dir / "checkpoints").glob("replaced-*")] == ["replaced-step-00000007.1"]
    assert not (run_dir / back.NAME).exists()


def test_checkpoints_that_are_gone_are_no_new_run(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    crash(monkeypatch, datasets, run_dir, **HALF)
    assert f"a new run begins in {run_dir}" in capsys.readouterr().out
    assert train(datasets, run_dir, **HALF) == 0, "there was none to be lost"
    (run_dir / "checkpoints").rename(run_dir / "archive")
    for restarts, status in (("1", scheduler.LATER), ("0", 2)):
        monkeypatch.setenv("CRIA_RESTARTS", restarts)
        with pytest.raises(SystemExit) as end:
            train(datasets, run_dir)
        assert end.value.code == status
        assert "has had checkpoints and there is none now that can be taken: bring" in capsys.readouterr().err
    (run_dir / "archive").rename(run_dir / "checkpoints")
    assert train(datasets, run_dir) == 0
    run_dir.rename(tmp_path / "elsewhere")
    monkeypatch.setenv("CRIA_RESTARTS", "1")
    monkeypatch.setenv("CRIA_TRAINED", "1")
    monkeypatch.setenv("CRIA_FAILURES", "9")
    with pytest.raises(SystemExit) as end:
        train(datasets, run_dir)
    assert end.value.code == scheduler.LATER, "however often it has failed before"
    assert "is not there, and this job has trained in it" in capsys.readouterr().err
    assert not run_dir.exists()


def test_a_copied_folders_own_configuration_does_not_act_on_the_original(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(datasets, tmp_path / "run", **HALF) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    config = ["train", "--config", str(tmp_path / "copy" / "config.yaml"), "--train.max_steps", "12"]
    kept = write_config(tmp_path / "kept.yaml", yaml.safe_load((tmp_path / "copy" / "config.yaml").read_text()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRIA_CONFIG", str(tmp_path / "copy" / "config.yaml"))
        with pytest.raises(SystemExit):
            main(["train", "--config", str(kept)])
    assert "was it moved or copied?" in capsys.readouterr().err, "of which launch/slurm.sbatch has made a copy"
    with pytest.raises(SystemExit):
        main(config)
    assert f"says run_dir {tmp_path / 'run'}, which is another one: was it moved or copied?" in capsys.readouterr().err
    assert main([*config, f"--run_dir={tmp_path / 'copy'}"]) == 0
    assert [state(tmp_path / name)["step"] for name in ("run", "copy")] == [10, 12]


def test_what_has_changed_is_told_by_what_was_trained(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by the start before, which may have trained nothing."""
    run_dir, hot = tmp_path / "run", {"optim": {"max_lr": 0.03}, "checkpoint": {"keep_last": 3}}
    assert train(datasets, run_dir, **HALF) == 0
    for _ in range(2):
        capsys.readouterr()
        crash(monkeypatch, datasets, run_dir, **hot)
        said = capsys.readouterr().out
        assert "optim.max_lr: 0.003 -> 0.03" in said
        assert "checkpoint.keep_last: " in said
    shutil.rmtree(datasets_of := tmp_path / "data", ignore_errors=True)
    shutil.copytree(datasets, datasets_of)
    shutil.rmtree(datasets_of / "a" / "validation")
    write_dataset(datasets_of / "a" / "validation", 4_000, 78)
    config = write_config(tmp_path / "two.yaml", tiny_config(datasets_of, run_dir))
    pretrain("train", "--config", config, "--train.max_steps", "12", ranks=2)
    assert state(run_dir)["world_size"] == 2
    changed = checkpoint.latest(run_dir, pytest.fail) / "state.json"
    before = json.loads(changed.read_text())
    assert before["validation"].keys() == {"a", "b"}
    capsys.readouterr()
    going_on._say_differences(changed.parent, before, {"validation": {"a": "another", "c": "new"}}, print)
    said = capsys.readouterr().out
    assert "was trained on 2 ranks, now 1" in said
    assert "the validation data of a is another" in said
    assert "validation data of b" not in said


def test_a_source_comes_in_with_a_later_stage(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A last phase of better data, which nobody had when the run began."""
    write_dataset(tmp_path / "c" / "train", 9_000, 79)
    assert train(datasets, tmp_path / "run", **HALF) == 0
    assert train(datasets, tmp_path / "straight") == 0

    def with_c(first_step: int, at: int = 2) -> dict[str, Any]:
        both = tiny_config(datasets, tmp_path)["data"]
        both["sources"].insert(at, {"name": "c", "train": str(tmp_path / "c" / "train"), "weight": 0})
        return {**both, "stages": [{"first_step": first_step, "weights": {"a": 6, "b": 1, "c": 1}}]}

    def train_with(data: dict[str, Any]) -> int:
        tree = tiny_config(datasets, tmp_path / "run", data=data)
        return main(["train", "--config", str(write_config(tmp_path / "c.yaml", tree))])

    for refused in (with_c(10), with_c(11, at=0)):
        with pytest.raises(SystemExit):
            train_with(refused)
        assert "2 sources and the configuration says 3 sources" in capsys.readouterr().err
    assert train_with(with_c(11)) == 0
    assert state(tmp_path / "run")["tokens_per_source"] == {
        "a": (56 + 60) * 32,
        "b": (24 + 10) * 32,
        "c": 10 * 32,
    }
    ours, theirs = (records(tmp_path / name, "train") for name in ("run", "straight"))
    assert [ours[step]["data_hash"] == theirs[step]["data_hash"] for step in (10, 11)] == [True, False]


def test_another_mixture_is_refused_allowed_and_counted(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(datasets, tmp_path / "run", **HALF) == 0
    before = state(tmp_path / "run")
    assert before["tokens_per_source"] == {"a": 56 * 32, "b": 24 * 32}
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train(datasets, tmp_path / "run", weights=(1, 1))
    said = capsys.readouterr().err
    assert "mixture = 70.0:30.0 from step 1 (a:b, percent) and the configuration says 50.0:50.0 from step 1" in said
    assert "the shares of the sources would change" in said
    assert "--data.allow_change true" in said
    assert train(datasets, tmp_path / "run", "--data.allow_change", "true", weights=(1, 1)) == 0
    said = capsys.readouterr().out
    assert "train.max_steps: 10 -> 20" in said
    assert "the learning rate of step 11 is 0.00191 by the new schedule and was 0.0003 by the old one" in said
    after = state(tmp_path / "run")
    assert after["step"] == 20
    assert after["tokens_per_source"] == {"a": (56 + 40) * 32, "b": (24 + 40) * 32}, (
        "what was trained on, not what would be"
    )
    assert records(tmp_path / "run", "train")[20]["tokens"] == 20 * 8 * 32
    assert (tmp_path / "run" / "before-config.yaml.1").is_file(), "the configuration of the first half is kept"


def test_a_checkpoint_that_does_not_name_its_tokenizer_is_refused(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole by its checksums, but nobody can tell what its ids mean."""
    assert train(datasets, tmp_path / "run", **HALF) == 0
    folder = checkpoint.latest(tmp_path / "run", pytest.fail)
    said, manifest = state(tmp_path / "run"), json.loads((folder / "manifest.json").read_text())
    del said["data"]["tokenizer"]
    (folder / "state.json").write_text(json.dumps(said))
    manifest["files"]["state.json"] = checkpoint.describe(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit):
        train(datasets, tmp_path / "other", "--init_from", str(folder), **HALF)
    assert "was trained with another tokenizer than the shards are of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train(datasets, tmp_path / "run", train={"max_steps": 12})
    assert "was trained with tokenizer None" in capsys.readouterr().err


def test_other_shards_are_named_refused_and_allowed(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(datasets, tmp_path / "run", **HALF) == 0
    shutil.copytree(datasets, tmp_path / "others")
    shutil.rmtree(tmp_path / "others" / "b" / "train")
    write_dataset(tmp_path / "others" / "b" / "train", 9_000, 77)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train(tmp_path / "others", tmp_path / "run")
    said = capsys.readouterr().err
    assert f"was trained on other shards of b ({tmp_path / 'others' / 'b' / 'train'}) than are there now" in said
    assert "seen twice or not at all" in said
    assert train(tmp_path / "others", tmp_path / "run", "--data.allow_change", "true") == 0
    assert state(tmp_path / "run")["step"] == 20


def test_a_stage_still_to_come_changes_nothing_that_was(datasets: Path, tmp_path: Path) -> None:
    assert train(datasets, tmp_path / "run", **HALF) == 0

    def stages(first_step: int) -> dict[str, Any]:
        both = tiny_config(datasets, tmp_path)["data"]
        return {**both, "stages": [{"first_step": first_step, "weights": {"a": 1, "b": 1}}]}

    with pytest.raises(SystemExit):
        train(datasets, tmp_path / "run", data=stages(9))
    assert train(datasets, tmp_path / "run", data=stages(11)) == 0
    assert state(tmp_path / "run")["tokens_per_source"] == {"a": (56 + 40) * 32, "b": (24 + 40) * 32}


@pytest.mark.parametrize(
    ("sequences", "taken"), [({"a": 1, "b": 3}, {"a": 34 * 32, "b": 14 * 32}), ({"a": 1}, {"a": 48 * 32})]
)
def test_one_sequence_of_data_is_seen_again_and_again_by_more_ranks_than_there_are_sequences(
    tmp_path: Path, sequences: dict[str, int], taken: dict[str, int]
) -> None:
    """A source of one sequence, beside one of three or alone, on two ranks with micro-batches of two."""
    for seed, (name, number) in enumerate(sequences.items()):
        write_dataset(tmp_path / name / "train", 32 * number + 1, seed, shards=1)
        write_dataset(tmp_path / name / "validation", 33, 10 + seed, shards=1)
    tree = tiny_config(tmp_path, tmp_path / "run", train={"max_steps": 6})
    tree["data"]["sources"] = [source for source in tree["data"]["sources"] if source["name"] in sequences]
    pretrain("train", "--config", write_config(tmp_path / "c.yaml", tree), ranks=2)
    assert sorted(records(tmp_path / "run", "train")) == [1, 2, 3, 4, 5, 6]
    assert state(tmp_path / "run")["tokens_per_source"] == taken
