"""`pretrain bench --peers` and `--paper`: other trainers train the same model, on as many tokens an update."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from conftest import tiny_config, write_config

from pretrain import bench_paper, bench_peers, bench_step, benchmark, config
from pretrain.sections import ParallelConfig


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose data do not exist: random ids need none."""
    folder = tmp_path_factory.mktemp("bench")
    return write_config(folder / "tiny.yaml", tiny_config(Path("/nowhere"), folder / "run"))


def load(out: Path) -> dict:
    return json.loads(out.with_name(f"{out.name}.json").read_text())


def test_a_peer_trains_the_same_model_and_the_result_says_how_fast(
    settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers, which every installation has, in a process of its own, in turns with ours."""
    out = settings.parent / "peers"
    argv = [
        "--config",
        settings,
        "--peers",
        "--rows",
        "transformers (eager)",
        "--steps",
        3,
        "--warmup",
        1,
        "--out",
        out,
    ]
    assert benchmark.main(list(map(str, argv))) == 0
    rows = {row["name"]: row for row in load(out)["rows"]}
    ours, theirs = rows["cria"], rows["transformers (eager)"]
    assert (ours["problem"], theirs["problem"]) == (None, None)
    assert not {"as_logged_tokens_per_sec_per_gpu", "data_wait_pct"} & ours.keys(), "they would count the others' turns"
    assert theirs["first_loss"] == pytest.approx(ours["first_loss"], abs=bench_peers.LOSS_TOLERANCE["fp32"])
    assert theirs["ratio"] == pytest.approx(bench_peers._ratio(ours, theirs, in_turns=True))
    assert "times the fastest peer (transformers (eager))" in capsys.readouterr().out


def test_the_papers_table_from_a_small_part_of_each_model(settings: Path) -> None:
    out = settings.parent / "paper"
    argv = ["--config", settings, "--paper", "--scale", 0.01, "--steps", 1, "--warmup", 1, "--out", out]
    assert benchmark.main(list(map(str, argv))) == 0
    rows = load(out)["rows"]
    assert [row["paper_a100_hours"] for row in rows] == [3456, 4830, 7920]
    assert all(row["problem"] is None and row["tokens_per_sec_per_gpu"] > 0 for row in rows)
    assert rows[0]["tokens_per_step"] == 4 * 2 * 32
    assert [4 * 2 * 32 / row["step_time_s"] for row in rows] == [row["tokens_per_sec_per_gpu"] for row in rows]
    assert "Each model is updated once every 8 x 32 tokens, 4 micro-batches of ours." in load(out)["notes"]


def test_a_smaller_micro_batch_of_the_papers_takes_as_many_tokens_an_update(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def peer(bench: bench_peers.Bench, variant: bench_peers.Variant, micro_batch_size: int) -> dict:
        tried.append((bench.settings.train.global_batch_size, micro_batch_size))
        return {"problem": "does not fit: out of memory"}

    args = benchmark._parser().parse_args(["--config", str(settings), "--paper", "--warmup", "1", "--steps", "2"])
    chosen = config.load(settings)
    chosen = dataclasses.replace(
        chosen, train=dataclasses.replace(chosen.train, micro_batch_size=14, global_batch_size=56)
    )
    monkeypatch.setattr(bench_peers.Bench, "peer", peer)
    bench = bench_peers.Bench(args, chosen, tmp_path, in_turns=False)
    for shape in bench_paper.SHAPES[1:]:
        bench_paper._time(bench, shape, 32)
    assert tried == [(56, n) for n in (14, 7, 2, 1, 2, 1)]


def test_a_peer_that_accumulates_trains_the_same_model(settings: Path, tmp_path: Path) -> None:
    """Ours in two micro-batches, and transformers' in one, two and four: the same losses, before and after an update."""
    args = benchmark._parser().parse_args(["--config", str(settings), "--peers", "--warmup", "1", "--steps", "2"])
    chosen = config.load(settings)
    chosen = dataclasses.replace(chosen, train=dataclasses.replace(chosen.train, global_batch_size=4))
    bench = bench_peers.Bench(args, chosen, tmp_path, in_turns=False)
    bench.hand_over()
    (eager,) = (variant for variant in bench_peers.VARIANTS if variant.name == "transformers (eager)")
    rows = [bench.cria("cria", []).row()]
    for micro_batch_size in (4, 2, 1):
        bench._start(sys.executable, eager, micro_batch_size, None).row()
        rows.append(json.loads((tmp_path / "transformers-(eager).json").read_text()))
    for row in rows:
        assert row["first_loss"] == pytest.approx(rows[0]["first_loss"], abs=2e-5)
        assert row["last_loss"] == pytest.approx(rows[0]["last_loss"], abs=2e-4)
        assert row["first_grad_norm"] == pytest.approx(rows[0]["first_grad_norm"], rel=1e-4)
        assert row["tokens_per_sec_per_gpu"] == pytest.approx(4 * 32 / row["step_time_s"])
    assert abs(rows[0]["last_loss"] - rows[0]["first_loss"]) > 1e-3


def test_another_model_does_not_count(settings: Path) -> None:
    args = benchmark._parser().parse_args(["--config", str(settings), "--peers"])

    def row(name: str, loss: float, tokens: float) -> dict:
        figures = {"tokens_per_sec_per_gpu": tokens, "seconds": [1 / tokens] * 3, "first_loss": loss}
        return {"name": name, "problem": None, "note": "v", "first_grad_norm": 2.0, **figures}

    rows = [row("cria", 5.0, 100), row("transformers (eager)", 5.0001, 80), row("litgpt (compiled)", 5.1, 900)]
    rows.append(row("torchtitan (eager)", float("nan"), 900))
    rows.append({**row("transformers (compiled)", 5.0, 900), "first_grad_norm": 2.03})
    result = bench_peers._compared(rows, args, config.load(settings), in_turns=True)
    same, other, nothing, backward = result.rows[1:]
    assert backward["problem"] == "does not train the same model: its first gradient's norm is 2.03000, off by 1.5%"
    assert same["problem"] is None
    assert same["ratio"] == pytest.approx(1.25)
    assert same["note"] == "its default, its best, v"
    assert other["problem"].startswith("does not train the same model")
    assert nothing["problem"].startswith("does not train the same model")
    assert "Ours (cria) is 1.250 times the fastest peer (transformers (eager))." in result.notes
    rows = [{**row("cria", 5.0, 100), "step_time_spread_pct": 4.0}, row("transformers (eager)", 5.0, 98)]
    verdict = bench_peers._compared(rows, args, config.load(settings), in_turns=True).notes[-1]
    assert verdict.endswith(
        " is 1.020 times the fastest peer (transformers (eager)), which is within the spread of ours, 4.0%."
    )


def test_ours_does_not_count_where_it_agrees_with_nobody(settings: Path) -> None:
    args = benchmark._parser().parse_args(["--config", str(settings), "--peers"])
    figures = {"problem": None, "tokens_per_sec_per_gpu": 9.0, "seconds": [1.0], "first_grad_norm": 2.0, "note": "v"}
    losses = {"cria": 5.0, "cria (compiled)": 5.0, "transformers (eager)": 5.1, "litgpt (compiled)": 5.1}
    rows = [{"name": name, "first_loss": loss, **figures} for name, loss in losses.items()]
    result = bench_peers._compared(rows, args, config.load(settings), in_turns=False)
    assert all(row["problem"] for row in result.rows)
    assert result.rows[1]["problem"] == "agrees with no peer that was timed"


def test_steps_are_paired_where_peers_took_turns_and_nowhere_else() -> None:
    ours, other = {"seconds": [1.0, 2.0, 4.0]}, {"seconds": [4.0, 4.0, 4.0]}
    assert bench_peers._ratio(ours, other, in_turns=True) == 2
    ours, other = {"seconds": [1.0, 2.0, 9.0]}, {"seconds": [9.0, 2.0, 4.0]}
    assert bench_peers._ratio(ours, other, in_turns=True) == 1
    assert bench_peers._ratio(ours, other, in_turns=False) == 2


def test_ours_first_and_ours_last_are_one_row_of_more_steps(settings: Path) -> None:
    """Else the better of two tries would be held against one of each peer."""
    args = benchmark._parser().parse_args(["--config", str(settings), "--peers"])

    def row(name: str, seconds: float) -> dict:
        figures = {"tokens_per_sec_per_gpu": 100 / seconds, "seconds": [seconds] * 4, "first_loss": 5.0}
        figures["first_grad_norm"] = 2.0
        return {"name": name, "problem": None, "note": "v", **figures}

    rows = [row("cria", 1.0), row("cria (compiled)", 1.3), row("transformers (eager)", 2.0), row("cria (again)", 1.4)]
    result = bench_peers._compared(rows, args, config.load(settings), in_turns=False)
    assert [row["ratio"] for row in result.rows] == pytest.approx([1 / 1.2, 1.3 / 1.2, 2 / 1.2, 1.4 / 1.2])
    assert "Drift, ours last against ours first: -28.6%." in result.notes


def test_every_precision_has_a_tolerance() -> None:
    assert set(bench_peers.LOSS_TOLERANCE) == set(get_args(get_type_hints(ParallelConfig)["precision"]))


def test_random_data_are_the_same_every_time_and_never_all_one(settings: Path, tmp_path: Path) -> None:
    chosen = config.load(settings)
    chosen = dataclasses.replace(chosen, train=dataclasses.replace(chosen.train, global_batch_size=2))
    a, b = (bench_step.batches(bench_step.with_random_data(chosen, tmp_path / name), 3) for name in "ab")
    assert a.shape == (3, 2, 33)
    assert torch.equal(a, b)
    assert len(a.unique()) > 100


def test_ctrl_c_keeps_the_rows_of_the_paper_and_ends_who_takes_turns(
    settings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ctrl_c(*_: object) -> None:
        raise KeyboardInterrupt

    out = settings.parent / "stopped-paper"
    with monkeypatch.context() as patch:
        patch.setattr(bench_peers.Bench, "peer", ctrl_c)
        argv = ["--config", settings, "--paper", "--scale", 0.01, "--steps", 1, "--warmup", 1, "--out", out]
        assert benchmark.main(list(map(str, argv))) == 130
    (row,) = load(out)["rows"]
    assert row["gpu_hours"] > 0
    started = []
    monkeypatch.setattr(bench_peers, "take_turns", lambda children: (started.extend(children), ctrl_c()))
    out = settings.parent / "stopped-peers"
    argv = ["--config", str(settings), "--peers", "--rows", "transformers (eager)", "--out", str(out)]
    assert benchmark.main(argv) == 130
    assert [child._process.wait(60) for child in started] == [-9, -9]
    assert not out.with_suffix(".json").exists()
