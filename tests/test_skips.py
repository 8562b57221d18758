"""Updates that are left out, steps between two lines of metrics, and the end of a run in which nothing is learned."""

import json
import math
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

from pretrain import checkpoint, history, preparation
from pretrain.run import Run
from pretrain.skips import LEAST, WINDOW, Skips

NORMS = st.sampled_from([0.5, 0.75, 1.0, 1.5, 9.0, 50.0, 0.0, math.nan, math.inf])


class Reference:
    """The same with lists."""

    def __init__(self, ratio: float):
        self.ratio, self.taken, self.total, self.tally = ratio, [], 0, 0

    def judge(self, norm: float) -> float:
        usual = self.taken[-WINDOW:]
        outlier = bool(self.ratio) and len(usual) >= LEAST and norm > self.ratio * median_low(usual)
        usable = math.isfinite(norm) and norm > 0 and not outlier
        self.taken += [norm] if usable else []
        self.total += not usable
        self.tally = max(0, self.tally - 1) if usable else self.tally + 10
        return float(not usable)


@given(
    before=st.integers(0, 150),
    norms=st.lists(NORMS, max_size=90),
    ratio=st.sampled_from([0.0, 2.0, 10.0]),
    cut=st.integers(0, 90),
)
@settings(max_examples=40, deadline=None)
def test_each_update_is_judged_as_the_plain_words_say(before: int, norms: list[float], ratio: float, cut: int) -> None:
    """Saved and taken up again on the way, too."""
    skips, reference = Skips(ratio, torch.device("cpu")), Reference(ratio)
    for number, norm in enumerate([0.5 + i % 3 / 4 for i in range(before)] + norms):
        if number == before + cut:
            skips = Skips(ratio, torch.device("cpu"), json.loads(json.dumps(skips.state())))
        assert skips.judge(torch.tensor(norm)).item() == reference.judge(norm)
        assert (skips.total.item(), 10 * skips.lately().item()) == (reference.total, pytest.approx(reference.tally))


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
    "train": {"max_steps": 90, "global_batch_size": 4, "log_every": 10},
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
    assert [one["step"] for one in in_parts.steps] == [*range(1, 91)]
    figures = [[(one["step"], one.get(f)) for one in past.steps] for past in (everywhere, in_parts) for f in ("loss",)]
    assert [step for (step, a), (_, b) in zip(*figures) if abs(a - b) > 1e-5 * a] == []
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
        assert [one["step"] for one in past.steps] == [*range(1, 21)]
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


def test_a_rare_step_without_an_update_ends_no_run(
    datasets: Path, tmp_path: Path, gradients_times: Callable[..., None]
) -> None:
    gradients_times(lambda step: math.nan if step % 12 == 0 else 1.0)
    assert train(datasets, tmp_path / "run", **LONG | {"train": LONG["train"] | {"max_skipped_steps": 2}}) == 0
    assert records(tmp_path / "run", "train")[90]["skipped_steps"] == 7
