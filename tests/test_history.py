"""Reading a run's metrics: the last record of a step counts, half lines are counted out, figures are the file's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import FINISHED, run_dir, start, train, validation, write  # noqa: F401  run_dir: a fixture

from pretrain import history
from pretrain.report import main


@given(
    written=st.lists(
        st.tuples(st.sampled_from(["train", "validation"]), st.integers(0, 9), st.floats(0, 10)), min_size=1
    ),
    cut=st.integers(1, 30),
)
@settings(max_examples=50, deadline=None)
def test_of_each_kind_and_step_the_last_record_counts(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[str, int, float]], cut: int
) -> None:
    records = [{"kind": kind, "step": step, "loss": loss, "losses": {"a": loss}} for kind, step, loss in written]
    torn = json.dumps(records[-1])[:-cut]
    past = history.read(write(tmp_path_factory.mktemp("run"), records, tail=torn))
    last = {(kind, step): loss for kind, step, loss in written}
    for kind, series in (("train", past.series("loss")), ("validation", past.validation_series("a"))):
        expected = sorted((step, loss) for (k, step), loss in last.items() if k == kind)
        assert list(zip(*series)) == expected
    assert past.torn_lines == 1


def test_torn_and_foreign_lines_anywhere_are_counted_and_left_out(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", FINISHED)
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    torn = [*lines[:10], '{"kind": "train", "step": 10, "lo\n', "17\n", "\xff\n", '{"kind": "train"}\n', *lines[10:]]
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "metrics.jsonl").write_text("".join(torn), encoding="latin-1")
    a, b = history.read(tmp_path / "whole"), history.read(tmp_path / "torn")
    assert (a.torn_lines, b.torn_lines) == (0, 4)
    assert (a.starts, a.train, a.validation, a.stop) == (b.starts, b.train, b.validation, b.stop)


@pytest.mark.parametrize(
    "line",
    [
        *(
            start(150, **{name: "x"})
            for name in ("sources", "versions", "time", "max_steps", "parameters", "world_size")
        ),
        start(150, sources=["prose"]),
        start(150, sources={"prose": 3}),
        start(150, sources={"prose": {"share": "x"}}),
        *(train(150, **{name: "x"}) for name in ("peak_mem_gib", "loss", "tokens_per_sec", "skipped_steps")),
        {"kind": "validation", "step": 150},
        {"kind": "validation", "step": 150, "losses": {"prose": "x"}},
        {"kind": "train", "step": "150"},
    ],
    ids=str,
)
def test_a_record_of_another_shape_counts_as_torn(run_dir: Path, line: dict[str, Any]) -> None:  # noqa: F811
    whole = history.read(run_dir)
    main([str(write(run_dir, FINISHED, tail=json.dumps(line) + "\n" + "[" * 100_000))])
    past = history.read(run_dir)
    assert past.torn_lines == 2
    assert (past.starts, past.train, past.validation, past.stop) == (
        whole.starts,
        whole.train,
        whole.validation,
        whole.stop,
    )


@pytest.mark.parametrize(
    ("records", "status"),
    [
        (FINISHED, "step 200 of 200; finished"),
        ([*FINISHED, start(200)], "step 200 of 200; no end is recorded: it is running, or was killed"),
        ([start(), train(7), {"kind": "stop", "step": 7, "reason": "SIGTERM"}], "step 7 of 200; stopped by SIGTERM"),
        ([train(7)], "step 7; no end is recorded: it is running, or was killed"),
    ],
)
def test_the_status_is_that_of_the_last_process(tmp_path: Path, records: list[dict[str, Any]], status: str) -> None:
    assert history.read(write(tmp_path, records)).status == status


def test_figures_are_the_files(tmp_path: Path) -> None:
    past = history.read(write(tmp_path, FINISHED))
    assert past.resumes == [100]
    assert past.typical("tokens_per_sec") == np.median([1000.0 + step for step in range(2, 201)]), "without the first"
    assert past.typical("mfu_m1_pct") is None
    prose, code = past.source_lines()
    assert (prose.name, prose.train_tokens, prose.share) == ("prose", 7_654_321, 0.7)
    assert (prose.loss_before, prose.loss_after, prose.unigram_entropy, prose.below_entropy) == (9.0, 6.0, 6.5, True)
    assert (code.loss_before, code.loss_after, code.unigram_entropy, code.below_entropy) == (8.0, 3.0, 2.5, False)


def test_before_is_before_the_first_step_and_after_is_after_it(tmp_path: Path) -> None:
    only_before = history.read(write(tmp_path, [start(), validation(0, 9.0, 8.0)])).source_lines()[0]
    assert (only_before.loss_before, only_before.loss_after, only_before.below_entropy) == (9.0, None, None)
    only_after = history.read(write(tmp_path, [start(), validation(50, 9.0, 8.0)])).source_lines()[0]
    assert (only_after.loss_before, only_after.loss_after, only_after.below_entropy) == (None, 9.0, False)


def test_one_line_is_its_own_median(tmp_path: Path) -> None:
    assert history.read(write(tmp_path, [train(1)])).typical("tokens_per_sec") == 100.0


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950, "950"), (999.9, "1k"), (12_345, "12.3k"), (2_097_152, "2.1M"), (999_999_999, "1B"), (3e12, "3T")],
)
def test_counts_are_short(number: float, text: str) -> None:
    assert history.short(number) == text
