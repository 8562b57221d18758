"""`train.leave_out`: steps that are not trained, and every other step as it would have been."""

from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from conftest import records, tiny_config, trajectory, write_config
from hypothesis import given
from hypothesis import strategies as st
from test_going_on import state, train

from pretrain import config, going_on, left_out, page
from pretrain.__main__ import main
from pretrain.history import read
from pretrain.mixture import Mixture, Stage
from pretrain.sections import StepRange

OUT: list[dict[str, int]] = [{"first_step": 5, "last_step": 6}, {"first_step": 9, "last_step": 9}]
TRAINED = [1, 2, 3, 4, 7, 8, 10, 11, 12]


def settings(**more: Any) -> dict[str, Any]:
    return {"train": {"max_steps": 12, "leave_out": OUT, **more}, "checkpoint": {"every_steps": 4, "keep_last": 9}}


@given(st.integers(0, 30), st.integers(0, 30), st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), max_size=4))
def test_spans_are_all_steps_but_those_left_out(after: int, last: int, gaps: list[tuple[int, int]]) -> None:
    """gaps: how far each range lies behind the one before, and how many more steps than one it has."""
    ends = list(accumulate(step for gap in gaps for step in gap))
    ranges = [StepRange(first, end) for first, end in zip(ends[::2], ends[1::2])]
    expected = [s for s in range(after + 1, last + 1) if not any(r.first_step <= s <= r.last_step for r in ranges)]
    spans = list(left_out.spans(after, last, ranges))
    assert [step for a, b in spans for step in range(a + 1, b + 1)] == expected
    assert all(a < b for a, b in spans)
    assert left_out.trained_steps(after, last, ranges) == len(expected)


def test_ranges_that_touch_are_one() -> None:
    ranges = [StepRange(2, 3), StepRange(4, 4), StepRange(6, 9), StepRange(10, 12)]
    assert left_out.merged(ranges) == [[2, 4], [6, 12]] == left_out.merged([StepRange(2, 4), StepRange(6, 12)])
    assert left_out.merged([]) == []


def test_every_other_step_is_what_it_would_have_been(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(datasets, whole, train={"max_steps": 12}) == train(datasets, run, **settings()) == 0
    assert "left out, by train.leave_out: 5 to 6" in capsys.readouterr().out
    of_all, of_run = (records(run_dir, "train") for run_dir in (whole, run))
    assert [*of_run] == TRAINED
    for figure in ("data_hash", "lr"):
        assert {step: of_run[step][figure] for step in TRAINED} == {step: of_all[step][figure] for step in TRAINED}
    assert [of_run[step]["loss"] == of_all[step]["loss"] for step in TRAINED] == [True] * 4 + [False] * 5
    a_step = of_all[1]["tokens"]
    assert [of_run[step]["tokens"] for step in TRAINED] == [n * a_step for n in range(1, 10)]
    saved = state(run)
    assert (saved["step"], saved["updates"], sum(saved["tokens_per_source"].values())) == (12, 9, 9 * a_step)
    assert of_run[12]["skipped_steps"] == 0
    assert ("steps left out", "5 to 6, 9") in page.key_figures(read(run))

    main(["order", "--config", str(run / "config.yaml"), "--step", "6"])
    assert "which train.leave_out leaves out" in capsys.readouterr().out.replace("\n", " ")
    main(["order", "--config", str(run / "config.yaml"), "--summary"])
    said = capsys.readouterr().out
    assert f"9 steps, {9 * a_step:,} tokens (train.leave_out: without steps 5 to 6, 9)" in said
    for tokens in saved["tokens_per_source"].values():
        assert f"{tokens:,}" in said


def test_a_resume_beside_a_range_is_the_same_run(datasets: Path, tmp_path: Path) -> None:
    """It ends before a range, within its reach, and behind it."""
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    assert train(datasets, straight, **settings()) == 0
    for last in (4, 7, 8, 0):
        assert train(datasets, parts, **settings(stop_after_step=last)) == 0
    assert [line for line in trajectory(parts) if len(line) > 2] == [
        line for line in trajectory(straight) if len(line) > 2
    ]
    assert [*records(parts, "start")] == [0, 4, 7, 8]
    assert all(record["skipped_steps"] == 0 for record in records(parts, "train").values())


def test_where_a_milestone_is_left_out_the_next_checkpoint_stays_for_good(datasets: Path, tmp_path: Path) -> None:
    left_out = {"leave_out": [{"first_step": 4, "last_step": 4}], "max_steps": 12}
    saved = {"every_steps": 2, "keep_every": 4, "keep_last": 1}
    assert train(datasets, tmp_path / "run", train=left_out, checkpoint=saved) == 0
    kept = [folder.name for folder in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert kept == ["step-00000006", "step-00000008", "step-00000012"]


def test_a_run_goes_back_to_leave_out_what_it_has_trained(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert train(datasets, straight, **settings()) == 0
    assert train(datasets, run, train={"max_steps": 12}, checkpoint={"every_steps": 4, "keep_last": 9}) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train(datasets, run, **settings(max_steps=14))
    assert (
        "was trained with no steps left out and the configuration leaves out 5 to 6, 9 of the steps until then; steps "
        "that lie behind were trained or left out already; for another choice --resume a checkpoint before them"
    ) in capsys.readouterr().err
    back = ("--resume", str(run / "checkpoints" / "step-00000004"))
    assert train(datasets, run, *back, **settings()) == 0
    there, here = read(straight), read(run)  # which knows that what lies behind the return is no part of the run
    for of_run, of_straight in ((here.train, there.train), (here.validation, there.validation)):
        figures = ("step", "data_hash", "loss", "grad_norm", "lr", "tokens", "losses")
        assert [[r.get(f) for f in figures] for r in of_run] == [[r.get(f) for f in figures] for r in of_straight]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train(datasets, run, train={"max_steps": 14})
    assert "was trained with 5 to 6, 9 left out and the configuration leaves out no steps" in capsys.readouterr().err
    still_to_come = {"leave_out": [*OUT, {"first_step": 13, "last_step": 13}], "max_steps": 14}
    assert train(datasets, run, train=still_to_come) == 0
    assert [*records(run, "train")][-2:] == [12, 14]


def test_a_checkpoint_of_before_there_was_such_a_key_goes_on(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        of_now = going_on.facts

        def without(*args: Any) -> dict[str, dict[str, Any]]:
            found = of_now(*args)
            del found["data"]["leave_out"]
            return found

        patch.setattr(going_on, "facts", without)
        assert train(datasets, run, train={"max_steps": 4}) == 0
    assert "leave_out" not in state(run)["data"]
    assert train(datasets, run, **settings()) == 0
    assert [*records(run, "train")] == TRAINED


@pytest.mark.parametrize(
    ("train_section", "said"),
    [
        (
            {"leave_out": [{"first_step": 5, "last_step": 4}]},
            "must rise from step 1 on and not overlap; they are 5 to 4",
        ),
        (
            {"leave_out": [{"first_step": 0, "last_step": 4}]},
            "must rise from step 1 on and not overlap; they are 0 to 4",
        ),
        ({"leave_out": [OUT[1], OUT[0]]}, "not overlap; they are 9, 5 to 6"),
        ({"leave_out": [OUT[0], {"first_step": 6, "last_step": 7}]}, "not overlap; they are 5 to 6, 6 to 7"),
        ({"leave_out": OUT, "max_steps": 9}, "step 9 (train.max_steps) is one that must be trained"),
        ({"leave_out": OUT, "max_steps": 20, "stop_after_step": 6}, "step 6 (train.stop_after_step) is one that must"),
    ],
)
def test_what_cannot_be_left_out(datasets: Path, tmp_path: Path, train_section: dict[str, Any], said: str) -> None:
    file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run", train=train_section))
    with pytest.raises(ValueError, match=r"train\.leave_out: ") as error:
        config.load(file)
    assert said in str(error.value)


def test_the_checkpoint_before_a_decay_is_never_left_out(datasets: Path, tmp_path: Path) -> None:
    tree = tiny_config(datasets, tmp_path / "run", train={"leave_out": OUT, "max_steps": 12})
    tree["optim"] |= {"lr_decay": "linear", "lr_decay_steps": 3}
    with pytest.raises(ValueError, match=r"step 9 \(the last step before optim.lr_decay_steps\) is one that must"):
        config.load(write_config(tmp_path / "c.yaml", tree))


def test_ranges_behind_the_end_do_no_harm(datasets: Path, tmp_path: Path) -> None:
    """A shorter run of the same configuration, as verify-resume makes it."""
    assert train(datasets, tmp_path / "run", **settings(max_steps=4)) == 0
    assert Mixture([10], [Stage(1, (Fraction(1),))], ["a"], 4).taken([]) == [0]
