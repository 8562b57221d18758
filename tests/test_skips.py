"""Updates that are skipped, steps between two lines of metrics, and the end of a run in which nothing is learned."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from statistics import median_low
from typing import Any

import pytest
import torch
from conftest import pretrain, records, tiny_config, trajectory, write_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_going_on import train

from pretrain import checkpoint, history, pictures, preparation, trainer
from pretrain.run import Run
from pretrain.saver import Saver
from pretrain.scheduler import REQUEUE
from pretrain.skips import LEAST, WINDOW, Skips

MOST = 4
NORMS = st.sampled_from([0.5, 0.75, 1.0, 1.5, 9.0, 50.0, 0.0, math.nan, math.inf])


class Reference:
    """The same with lists."""

    def __init__(self, ratio: float):
        self.ratio, self.taken, self.total, self.tally, self.too_many = ratio, [], 0, 0, False

    def judge(self, norm: float) -> float:
        usual = self.taken[-WINDOW:]
        outlier = bool(self.ratio) and len(usual) >= LEAST and norm > self.ratio * median_low(usual)
        usable = math.isfinite(norm) and norm > 0 and not outlier
        self.taken += [norm] if usable else []
        self.total += not usable
        self.tally = max(0, self.tally - 1) if usable else min(10 * MOST, self.tally + 10)
        self.too_many |= self.tally == 10 * MOST
        return float(not usable)

    def taken_up(self) -> None:
        """A run that has ended for it begins to count anew."""
        self.tally = 0 if self.tally == 10 * MOST else self.tally
        self.too_many = False


@given(
    before=st.integers(0, 150),
    norms=st.lists(NORMS, max_size=90),
    ratio=st.sampled_from([0.0, 2.0, 10.0]),
    cut=st.integers(0, 90),
)
@settings(max_examples=15, deadline=None)
def test_each_update_is_judged_as_the_plain_words_say(before: int, norms: list[float], ratio: float, cut: int) -> None:
    """Saved and taken up again on the way, too."""
    skips, reference = Skips(ratio, MOST, torch.device("cpu")), Reference(ratio)
    for number, norm in enumerate([0.5 + i % 3 / 4 for i in range(before)] + norms):
        if number == before + cut:
            skips = Skips(ratio, MOST, torch.device("cpu"), json.loads(json.dumps(skips.state())))
            reference.taken_up()
        assert skips.judge(torch.tensor(norm)).item() == reference.judge(norm)
        assert (skips.total.item(), skips.too_many.item()) == (reference.total, reference.too_many)
        assert skips.state()["tally"] == reference.tally


@pytest.fixture
def gradients_times(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], float]], None]:
    """Every step's gradients in this process are multiplied by what a function of the step says."""

    def arrange(factor: Callable[[int], float]) -> None:
        inner = preparation.prepare

        def prepare(*args: Any, **options: Any) -> Run:
            run = inner(*args, **options)
            backward = run.fabric.backward
            run.fabric.backward = lambda loss: backward(loss * factor(run.step + 1))
            return run

        monkeypatch.setattr(preparation, "prepare", prepare)

    return arrange


LONG: dict[str, Any] = {
    "train": {"max_steps": 90, "global_batch_size": 4, "micro_batch_size": 4, "log_every": 10},
    "validation": {"every_steps": 0},
    "checkpoint": {"every_steps": 70, "keep_last": 0},
}


def test_an_outlier_updates_nothing_is_said_and_a_resume_judges_alike(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], gradients_times: Callable[..., None]
) -> None:
    gradients_times(lambda step: {20: 100.0, 75: 100.0, 77: math.nan, 83: 5.0}.get(step, 1.0))
    run, parts = tmp_path / "run", tmp_path / "parts"
    assert train(datasets, run, **LONG) == 0
    said = capsys.readouterr().out
    assert "nothing was updated in step 75 (gradient norm " in said
    assert ", 77 (gradient norm nan); 2 such steps in all" in said
    assert said.count("nothing was updated") == 1, "the one of step 20 comes before there are enough to compare with"
    state = checkpoint.read_state(checkpoint.latest(run, pytest.fail))
    assert (state["updates"], state["skips"]["total"]) == (88, 2)
    assert {step: r["skipped_steps"] for step, r in records(run, "train").items()}[80] == 2
    lines = records(run, "steps")
    assert [line["skipped"] for line in lines.values()] == [[]] * 7 + [[75, 77], []]
    stop_between = {**LONG, "train": LONG["train"] | {"stop_after_step": 73}}
    assert train(datasets, parts, **stop_between) == 0
    assert train(datasets, parts, **LONG) == 0
    everywhere, in_parts = history.read(run), history.read(parts)
    assert [step for step, *_ in in_parts.steps] == [*range(1, 91)]
    losses = [past.series("loss")[1].tolist() for past in (everywhere, in_parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert [line for line in trajectory(parts) if line[0] != 73] == trajectory(run)


def test_between_two_lines_of_metrics_every_step_is_known(datasets: Path, tmp_path: Path) -> None:
    """As it is with a line for each, on two ranks, too; where a stop comes between two lines the rest is written."""
    each, seldom, two = (tmp_path / name for name in ("each", "seldom", "two"))
    assert train(datasets, each) == 0
    assert train(datasets, seldom, train={"log_every": 7, "stop_after_step": 0, "max_steps": 20}) == 0
    file = write_config(tmp_path / "two.yaml", tiny_config(datasets, two, train={"log_every": 6}))
    pretrain("train", "--config", file, ranks=2)
    every = records(each, "train")
    for run_dir in (seldom, two):
        past = history.read(run_dir)
        assert [step for step, *_ in past.steps] == [*range(1, 21)]
        for figure in ("loss", "grad_norm"):
            expected = [every[step][figure] for step in range(1, 21)]
            assert past.series(figure)[1].tolist() == pytest.approx(expected, rel=1e-5 if run_dir == seldom else 1e-3)
    assert records(each, "steps") == {}, "the lines say all"


def test_a_run_that_learns_one_step_in_ten_does_not_go_on_for_days(
    datasets: Path, tmp_path: Path, gradients_times: Callable[..., None]
) -> None:
    """Though never `max_skipped_steps` in a row are without an update, and each line of metrics looks well."""
    gradients_times(lambda step: 1.0 if step % 10 == 0 else math.nan)
    with pytest.raises(FloatingPointError, match=r"up to step 19, whose gradient norm was nan, updated nothing"):
        train(datasets, tmp_path / "run", **LONG)
    assert [step for step, _ in checkpoint.committed(tmp_path / "run")] == [20]


def test_what_has_ended_a_run_ends_no_later_start_that_is_sound(
    datasets: Path, tmp_path: Path, gradients_times: Callable[..., None]
) -> None:
    """The first line after it would still have the old tally against it, and no step to name."""
    gradients_times(lambda step: math.nan if 2 <= step <= 19 else 1.0)
    shorter = LONG | {"train": LONG["train"] | {"max_steps": 50}}
    with pytest.raises(FloatingPointError, match=r"up to step 19, .*leave_out leaves them out"):
        train(datasets, tmp_path / "run", **shorter)
    assert train(datasets, tmp_path / "run", **shorter) == 0
    assert records(tmp_path / "run", "train")[50]["skipped_steps"] == 18


def test_a_checkpoint_of_before_norms_were_kept_goes_on_with_its_count(
    datasets: Path, tmp_path: Path, gradients_times: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients_times(lambda step: math.nan if step in (3, 4) else 1.0)
    with monkeypatch.context() as patch:
        inner = Saver.save
        patch.setattr(
            Saver,
            "save",
            lambda self, step, m, o, state: inner(self, step, m, o, {k: state[k] for k in state if k != "skips"}),
        )
        assert train(datasets, tmp_path / "run", train={"max_steps": 5}) == 0
    assert train(datasets, tmp_path / "run", train={"max_steps": 7}) == 0
    assert records(tmp_path / "run", "train")[7]["skipped_steps"] == 2


@pytest.mark.parametrize("last", [11, 13])
def test_where_a_stop_comes_between_two_lines_the_steps_since_are_written(
    last: int, datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where a save does: a run that is killed goes on from there, and knows nothing of them."""
    with monkeypatch.context() as patch:
        rate = trainer.learning_rate

        def warned(step: int, *rest: Any) -> float:
            if step == last:
                os.kill(os.getpid(), signal.SIGTERM)
            return rate(step, *rest)

        patch.setattr(trainer, "learning_rate", warned)
        assert train(datasets, tmp_path / "run", train={"log_every": 10}) == REQUEUE
    assert [step for step, *_ in history.read(tmp_path / "run").steps] == [*range(1, last + 1)]
    with monkeypatch.context() as patch:
        step_of = trainer.optimizer_step
        patch.setattr(trainer, "optimizer_step", lambda run, m: step_of(run, m) if run.step < 18 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(datasets, tmp_path / "run", train={"log_every": 10})
    assert [step for step, *_ in history.read(tmp_path / "run").steps] == [*range(1, 16)], "saved after step 15"
    assert train(datasets, tmp_path / "run", train={"log_every": 10}) == 0
    assert [step for step, *_ in history.read(tmp_path / "run").steps] == [*range(1, 21)]


def test_a_run_that_ends_before_its_first_line_has_a_report(datasets: Path, tmp_path: Path) -> None:
    seldom = {"log_every": 100, "stop_after_step": 13, "max_steps": 20}
    assert train(datasets, tmp_path / "run", train=seldom, checkpoint={"every_steps": 6}) == 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines() if json.loads(line)["kind"] not in ("train", "stop")]
    metrics.write_text("\n".join(kept) + "\n")
    past = history.read(tmp_path / "run")
    assert past.status.startswith("step 13 of 20; no end is recorded")
    assert {"loss", "grad_norm"} <= {file.stem for file in pictures.draw(past, tmp_path, None).values()}


def test_a_rare_step_without_an_update_ends_no_run(
    datasets: Path, tmp_path: Path, gradients_times: Callable[..., None]
) -> None:
    gradients_times(lambda step: math.nan if step % 12 == 0 else 1.0)
    assert train(datasets, tmp_path / "run", **LONG | {"train": LONG["train"] | {"max_skipped_steps": 2}}) == 0
    assert records(tmp_path / "run", "train")[90]["skipped_steps"] == 7
