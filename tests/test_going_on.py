"""A second start with other words: --resume that a scheduler repeats, another mixture, stages still to come."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import pretrain, records, tiny_config, write_config, write_dataset

from pretrain import checkpoint
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


def test_a_scheduler_that_repeats_the_command_does_not_go_back_again(
    datasets: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    back = ("--resume", str(straight / "checkpoints" / "step-00000005"))
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


def test_a_checkpoint_that_does_not_name_its_tokenizer_is_taken(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of an earlier version; to go on from, and to begin with."""
    assert train(datasets, tmp_path / "run", **HALF) == 0
    folder = checkpoint.latest(tmp_path / "run", pytest.fail)
    said, manifest = state(tmp_path / "run"), json.loads((folder / "manifest.json").read_text())
    del said["data"]["tokenizer"]
    (folder / "state.json").write_text(json.dumps(said))
    manifest["files"]["state.json"] = checkpoint.describe(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert train(datasets, tmp_path / "other", "--init_from", str(folder), **HALF) == 0
    assert train(datasets, tmp_path / "run", train={"max_steps": 12}) == 0
    assert "resumed after step 10" in capsys.readouterr().out


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
