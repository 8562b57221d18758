"""Broken weights: none is saved, none is loaded, and who has them is named."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from conftest import records, tiny_config, trajectory, write_config
from test_going_on import train

from pretrain import checkpoint, config, leaving, parallel, preparation, soundness, trainer
from pretrain.run import Run
from pretrain.scheduler import LATER

BROKEN = "model.layers.1.mlp.up_proj.weight"


def spoil(run: Run, number: float = float("nan"), name: str = BROKEN) -> None:
    parameter = dict(run.llama.named_parameters())[name].detach()
    soundness._local(parameter).view(-1)[5] = number


@pytest.fixture
def broken_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """One weight of the run in this process is not finite after a step."""

    def arrange(step: int, name: str = BROKEN) -> None:
        inner = trainer.optimizer_step

        def and_spoil(run: Run, micro_batches: Any) -> Any:
            result = inner(run, micro_batches)
            if run.step == step:
                spoil(run, name=name)
            return result

        monkeypatch.setattr(trainer, "optimizer_step", and_spoil)

    return arrange


def test_broken_weights_are_not_saved_and_the_next_start_does_without_them(
    datasets: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken_after: Callable[..., None]
) -> None:
    sections: dict[str, Any] = {"train": {"max_steps": 20}, "checkpoint": {"every_steps": 5, "keep_last": 2}}
    sections["validation"] = {"every_steps": 0}
    broken_after(12)
    # The optimizer's second moment of a weight without a finite gradient stays as it was: only the weight is named.
    with pytest.raises(FloatingPointError, match=rf"after step 15 model.{BROKEN} of rank 0 on \S+ is not finite"):
        train(datasets, tmp_path / "run", **sections)
    assert [step for step, _ in checkpoint.committed(tmp_path / "run")] == [10, 5]
    monkeypatch.undo()
    assert train(datasets, tmp_path / "run", **sections) == 0
    of_run, of_straight = (
        [line for line in trajectory(folder) if len(line) > 2] for folder in (tmp_path / "run", straight)
    )
    assert of_run == of_straight


def test_a_validation_loss_that_is_no_number_ends_a_run_with_broken_weights(
    datasets: Path, tmp_path: Path, broken_after: Callable[..., None]
) -> None:
    broken_after(6)
    validated = {"validation": {"every_steps": 6}, "checkpoint": {"every_steps": 20}}
    with pytest.raises(FloatingPointError, match=rf"after step 6 model.{BROKEN}"):
        train(datasets, tmp_path / "run", **validated)


def test_skipped_steps_are_no_fault_of_the_documents_where_weights_are_broken(
    datasets: Path, tmp_path: Path, broken_after: Callable[..., None]
) -> None:
    broken_after(6)
    sections = {"train": {"max_skipped_steps": 2}, "checkpoint": {"every_steps": 20}, "validation": {"every_steps": 0}}
    with pytest.raises(FloatingPointError, match=rf"after step 8 model.{BROKEN}"):
        train(datasets, tmp_path / "run", **sections)
    assert checkpoint.committed(tmp_path / "run") == []


def test_broken_weights_are_not_taken_up(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    broken_after: Callable[..., None],
) -> None:  # fmt: skip
    broken_after(5)
    with monkeypatch.context() as patch:
        patch.setattr(leaving, "check", lambda run: None)  # as before there was one
        assert train(datasets, tmp_path / "old", train={"max_steps": 5}, validation={"every_steps": 0}) == 0
    saved = tmp_path / "old" / "checkpoints" / "step-00000005"
    capsys.readouterr()
    for run_dir, words in ((tmp_path / "old", ()), (tmp_path / "new", ("--init_from", str(saved)))):
        with pytest.raises(SystemExit):
            train(datasets, run_dir, *words)
        assert f"model.{BROKEN}".replace("model.model", "model") in (said := capsys.readouterr().err)
        assert "is not finite" in said
        assert str(saved) in said


def replicas(
    datasets: Path, folder: Path, ranks: int, shard_size: int, spoilt: Callable[[int, Run], None]
) -> list[str]:
    """What each rank of a hybrid run of 12 steps, saved every 4, says at its end; `spoilt` is called after step 9."""
    sections: dict[str, Any] = {
        "train": {"max_steps": 12, "global_batch_size": 12, "micro_batch_size": 1},
        "parallel": {"strategy": "hybrid", "shard_size": shard_size},
        "validation": {"every_steps": 0},
        "checkpoint": {"every_steps": 4, "keep_last": 0},
    }
    settings = config.load(write_config(folder / "c.yaml", tiny_config(datasets, folder / "run", **sections)))

    def body(rank: int) -> int:
        run = preparation.prepare(settings)
        inner = trainer.optimizer_step

        def and_spoil(run: Run, micro_batches: Any) -> Any:
            result = inner(run, micro_batches)
            if run.step == 9:
                spoilt(rank, run)
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "optimizer_step", and_spoil)
            with pytest.raises(FloatingPointError) as error:
                trainer.train(run)
        (folder / f"{rank}").write_text(json.dumps(str(error.value)))
        parallel.leave()
        return 0

    output = folder / "output.txt"
    assert forks.finish(forks.fork_ranks(ranks, output, body)) == [0] * ranks, output.read_text()
    assert [step for step, _ in checkpoint.committed(folder / "run")] == [8, 4]
    saves = records(folder / "run", "save")
    assert [saves[step]["problem"] for step in (4, 8)] == [None, None], "the one that was being written is waited for"
    return [json.loads((folder / str(rank)).read_text()) for rank in range(ranks)]


def of_rank(guilty: int, number: float) -> Callable[[int, Run], None]:
    return lambda rank, run: spoil(run, number=number) if rank == guilty else None


def test_of_three_replicas_the_odd_one_is_named() -> None:
    """Of two nobody knows which is right."""
    said = soundness._who_differs("w", {0: ("a", 7), 1: ("b", 8), 2: ("c", 7)})
    assert said == "w of rank 1 on b differs from that of the 2 other replicas: it computes wrongly"
    said = soundness._who_differs("w", {0: ("a", 7), 2: ("b", 8)})
    assert said == "w differs between the replicas rank 0 on a, rank 2 on b: one of them computes wrongly"


def test_replicas_of_shards_are_compared_shard_by_shard(datasets: Path, tmp_path: Path) -> None:
    """Rank 3 holds what rank 1 holds, and neither rank 0 nor rank 2. Undisturbed ones agree to the bit: the saves before."""
    (said,) = set(replicas(datasets, tmp_path, 4, 2, of_rank(3, 0.25)))
    assert re.match(rf"after step 12 model.{BROKEN} differs between the replicas rank 1 on \S+, rank 3 on ", said)


def test_the_optimizers_state_is_looked_at_too(datasets: Path, tmp_path: Path) -> None:
    def spoilt(rank: int, run: Run) -> None:
        if rank == 1:
            parameter = dict(run.llama.named_parameters())[BROKEN]
            soundness._local(run.optimizer.state[parameter]["exp_avg_sq"]).view(-1)[3] = float("inf")

    (said,) = set(replicas(datasets, tmp_path, 2, 1, spoilt))
    assert said.startswith(f"after step 12 optimizer.exp_avg_sq.{BROKEN} of rank 1 on ")


def test_replicas_that_read_a_checkpoint_unlike_are_no_fault_of_the_checkpoint(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not set aside, and the start is tried again elsewhere."""
    assert train(datasets, tmp_path / "run", train={"max_steps": 5}, validation={"every_steps": 0}) == 0
    monkeypatch.setattr(soundness, "unlike_replicas", lambda tensors: "w differs between the replicas")
    monkeypatch.setenv("CRIA_RESTARTS", "1")
    with pytest.raises(SystemExit) as stopped:
        train(datasets, tmp_path / "run")
    assert stopped.value.code == LATER
    assert [step for step, _ in checkpoint.committed(tmp_path / "run")] == [5]


def test_a_rank_without_rows_of_a_tensor_is_no_problem() -> None:
    sound = {"a": torch.ones(3, 2), "b": torch.ones(0, 2)}
    assert soundness.problem(sound) is None
    assert soundness.problem({"b": torch.ones(0)}) is None
    broken = {**sound, "c": torch.tensor([1.0, -torch.inf]), "d": torch.tensor([torch.nan])}
    assert str(soundness.problem(broken)).startswith("c and 1 more of rank 0 on ")
