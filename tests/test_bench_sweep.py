"""`pretrain bench --sweep`: the search of the best settings, its rows, and what is left of it by Ctrl-C."""

import dataclasses
import json
import os
import signal
import statistics
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, write_config

from pretrain import bench_result, bench_sweep, bench_timing, benchmark, config
from pretrain.bench_sweep import Point


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose data do not exist: random ids need none."""
    folder = tmp_path_factory.mktemp("bench")
    return write_config(folder / "tiny.yaml", tiny_config(Path("/nowhere"), folder / "run"))


def load(out: Path) -> dict:
    return json.loads(out.with_name(f"{out.name}.json").read_text())


def search(
    settings: Path,
    tmp_path: Path,
    speed: "dict | None" = None,
    fits: int = 16,
    sequences: int = 256,
    backends: "dict[str, str] | None" = None,
    compiled: float = 1.3,
    eager_fits: int | None = None,
) -> tuple[bench_sweep.Sweep, Point | None]:
    """A sweep over a machine made of arithmetic: `fits` sequences without checkpointing, four times as many with it.

    compiled: how many times as fast it is then; eager_fits: sequences that fit where it is not compiled.
    """

    class Machine(bench_sweep.Sweep):
        def _time(self, point: Point) -> dict:
            room = fits if point.compile or eager_fits is None else eager_fits
            if point.micro_batch_size > room * (4 if point.checkpointing else 1) * (
                2 if point.recompute == "mlp" else 1
            ):
                return {"problem": "does not fit: out of memory"}
            tokens = 1000 * point.micro_batch_size / (point.micro_batch_size + 4)
            tokens *= compiled if point.compile else 1.0
            tokens *= 0.8 if point.checkpointing else 1.0
            tokens *= {"none": 1.0, "elementwise": 0.99, "mlp": 0.85}[point.recompute]
            tokens *= (speed or {}).get(point.operations, 1.0)
            return {"problem": None, "tokens_per_sec_per_gpu": tokens, "backends": backends or {}}

    args = benchmark._parser().parse_args(["--config", str(settings), "--sweep"])
    chosen = config.load(settings)
    chosen = dataclasses.replace(chosen, train=dataclasses.replace(chosen.train, global_batch_size=sequences))
    machine = Machine(args, chosen, [], tmp_path)
    return machine, machine.best()


def test_the_sweep_finds_the_best_that_fits(settings: Path, tmp_path: Path) -> None:
    machine, best = search(settings, tmp_path, {"torch": 1.1})
    assert {point.operations for point in machine.tried} == {"as configured", "torch"}
    assert best is not None
    assert (best.micro_batch_size, best.compile, best.operations, best.checkpointing) == (16, True, "torch", 0)
    assert any(row["problem"] for row in machine.tried.values())  # 32 was tried
    assert {point.recompute for point in machine.tried} == set(bench_sweep.RECOMPUTE)
    keys = machine.keys(best)
    assert keys[keys.index("--train.micro_batch_size") + 1] == "16"
    assert keys[keys.index("--parallel.compile") + 1] == "true"
    assert keys[keys.index("--model.ops.attention") + 1] == "torch"
    config.parse(["--config", str(settings), "--train.global_batch_size", "256", *keys])  # they are keys


def test_the_sweep_times_no_library_twice(settings: Path, tmp_path: Path) -> None:
    """What auto takes already is no other point; and nothing is asked of a library that it refuses in any case."""
    everything = dict.fromkeys(("attention", "swiglu", "rope", "rms_norm", "cross_entropy"), "torch")
    machine, _ = search(settings, tmp_path, {"torch": 1.1}, backends=everything)
    assert {point.operations for point in machine.tried} == {"as configured"}
    machine, _ = search(settings, tmp_path, {"torch": 1.1}, backends={**everything, "rope": "liger"})
    assert {point.operations for point in machine.tried} == {"as configured", "torch"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_sweep.backends, "installed", lambda backend: "0.8.5")
        eager = machine.keys(Point(8, False, "liger", 0))
        compiled = machine.keys(Point(8, True, "liger", 0))
    assert "--model.ops.cross_entropy" in eager
    assert "--model.ops.cross_entropy" not in compiled, "it would break the graph"
    assert set(eager) - set(compiled) == {"--model.ops.cross_entropy", "false"}


def test_the_sweep_goes_down_until_it_fits(settings: Path, tmp_path: Path) -> None:
    _, best = search(settings, tmp_path, fits=1)
    assert best is not None
    assert best.micro_batch_size <= 4
    machine, nothing = search(settings, tmp_path, fits=0)
    assert nothing is None
    assert all(row["problem"] for row in machine.tried.values())


def test_what_is_compiled_has_a_micro_batch_of_its_own(settings: Path, tmp_path: Path) -> None:
    machine, best = search(settings, tmp_path, eager_fits=4)
    assert best == Point(16, True, "as configured", 0)
    assert Point(8, False, "as configured", 0) in machine.tried
    machine, best = search(settings, tmp_path, compiled=0.9)
    assert best == Point(16, False, "as configured", 0)
    assert [point for point in machine.tried if point.compile] == [Point(16, True, "as configured", 0)], "it is slower"


def test_a_library_has_a_micro_batch_of_its_own_where_nothing_is_compiled(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    kept = bench_sweep.Sweep._best_micro_batch
    monkeypatch.setattr(
        bench_sweep.Sweep, "_best_micro_batch", lambda sweep, point: looked.append(point) or kept(sweep, point)
    )
    for compiled, faster, wanted in ((0.9, 1.1, True), (0.9, 0.9, False), (1.3, 1.1, False)):
        looked.clear()
        search(settings, tmp_path, {"torch": faster}, compiled=compiled)
        point = Point(16, False, "torch", 0)
        assert (point in looked) == wanted


def test_only_what_does_not_fit_is_halved(settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails otherwise is a row like any other, and names no smaller ones."""

    def time_(sweep: bench_sweep.Sweep, point: Point) -> dict:
        good = {"problem": None, "tokens_per_sec_per_gpu": 9.0}
        return {"problem": "failed with status 1: ..."} if point.compile or point.recompute == "mlp" else good

    monkeypatch.setattr(bench_sweep.Sweep, "_time", time_)
    args = benchmark._parser().parse_args(["--config", str(settings), "--sweep"])
    machine = bench_sweep.Sweep(args, config.load(settings), [], tmp_path)
    assert machine.best() == Point(2, False, "as configured", 0)
    assert {point.micro_batch_size for point, row in machine.tried.items() if row["problem"]} == {2}


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        ("refused: data.sources has no manifest", "data.sources has no manifest"),
        ("failed with status -11: it said nothing", "micro-batch 2 eager: failed with status -11: it said nothing"),
    ],
)
def test_what_is_refused_at_first_is_an_error_and_no_table(
    problem: str,
    says: str,
    settings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(bench_sweep.Sweep, "_time", lambda sweep, point: {"problem": problem})
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--config", str(settings), "--sweep", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", f"pretrain bench: error: {says}\n")
    assert list(tmp_path.iterdir()) == []


def test_the_verdict_names_what_lies_within_the_spread_of_the_best(settings: Path, tmp_path: Path) -> None:
    machine, _ = search(settings, tmp_path)
    rows = {"eager": (96.0, 1.0), "compiled": (100.0, 5.0)}
    points = {name: Point(2, name == "compiled", "as configured", 0) for name in rows}
    machine.tried = {
        points[name]: {"problem": None, "tokens_per_sec_per_gpu": tokens, "step_time_spread_pct": spread}
        for name, (tokens, spread) in rows.items()
    }
    verdict = bench_sweep._result(machine._args, machine, points["compiled"], {}).notes[0]
    assert verdict.endswith("`. Within its spread of 5.0% lie as well: micro-batch 2 eager.")
    machine.tried[points["compiled"]]["step_time_spread_pct"] = 3.0
    assert "spread" not in bench_sweep._result(machine._args, machine, points["compiled"], {}).notes[0]


def test_the_verdict_says_why_there_is_none(settings: Path, tmp_path: Path) -> None:
    machine, _ = search(settings, tmp_path, fits=0)
    args = machine._args
    assert bench_sweep._result(args, machine, None, {}).notes[0] == "Nothing that was tried fits."
    machine.tried[Point(2, True, "torch", 0)] = {"problem": "trains nothing: ..."}
    assert bench_sweep._result(args, machine, None, {}).notes[0] == "Nothing that was tried could be timed."
    machine.tried = {Point(2, True, "torch", 0): {"problem": "not asked for (--rows)"}}
    result = bench_sweep._result(args, machine, None, {})
    assert (result.rows, result.notes[0][:36]) == ([], "Nothing that was come to has a name ")


def test_the_sweep_tries_what_training_takes(settings: Path, tmp_path: Path) -> None:
    machine, best = search(settings, tmp_path, sequences=24)
    assert best is not None
    assert {point.micro_batch_size for point in machine.tried} == {2, 4, 8}  # 16 would fit
    machine, best = search(settings, tmp_path, fits=1, sequences=6)
    assert {point.micro_batch_size for point in machine.tried} == {1, 2}


def test_a_sweep_s_row_is_a_whole_step(settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three of its four micro-steps are run, so that gradients are there at the peak and one update is paid by four."""
    out = settings.parent / "whole"
    argv = ["--config", settings, "--sweep", "--rows", "micro-batch 2 eager", "--steps", 3, "--warmup", 1, "--out", out]
    assert benchmark.main(list(map(str, argv))) == 0
    row = next(row for row in load(out)["rows"] if row["name"] == "micro-batch 2 eager")
    assert (row["grad_accum_steps"], row["timed_micro_steps"], row["tokens_per_step"]) == (4, 3, 8 * 32)
    assert len(row["seconds"]) == len(row["second_micro_step_seconds"]) == 3
    assert all(one < all_three for one, all_three in zip(row["second_micro_step_seconds"], row["seconds"]))
    whole_s = statistics.median(row["seconds"]) + statistics.median(row["second_micro_step_seconds"])
    assert row["step_time_s"] == pytest.approx(whole_s)
    assert row["tokens_per_sec_per_gpu"] == pytest.approx(8 * 32 / whole_s)
    assert "4 micro-steps a step, 3 timed" in capsys.readouterr().out


def test_a_micro_step_begins_when_its_batch_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(bench_timing.time, "perf_counter", lambda: now[0])
    timer = bench_timing.Timer(torch.device("cpu"))
    batches = timer.marked(iter(range(12)))
    for timed in (False, True):
        for step in timer.steps(2, timed):
            for seconds in (1, 2, 4):
                next(batches)
                now[0] += (step + 1) * seconds
            now[0] += 8
    assert timer.seconds() == [15, 22]
    assert timer.micro_step_seconds(1) == [2, 4]
    assert list(batches) == []


def test_no_time_left_is_said(settings: Path, tmp_path: Path) -> None:
    args = benchmark._parser().parse_args(["--config", str(settings), "--sweep", "--budget_s", "1"])
    machine = bench_sweep.Sweep(args, config.load(settings), [], tmp_path)
    assert machine.best() is None
    assert {row["problem"] for row in machine.tried.values()} == {"not timed: no time left"}
    assert {point.micro_batch_size for point in machine.tried} == {2}, "it may fit"
    best = Point(2, False, "as configured", 0)
    machine.tried = {
        best: {"problem": None, "tokens_per_sec_per_gpu": 1.0},
        **{point: row for point, row in machine.tried.items() if point != best},
    }
    verdict = bench_sweep._result(args, machine, best, {}).notes[0]
    assert verdict.endswith(
        f". Of {len(machine.tried)} rows tried, {len(machine.tried) - 1} not timed: --budget_s was over."
    )


@pytest.mark.parametrize(("number", "says"), [(signal.SIGINT, ""), (signal.SIGTERM, " by SIGTERM")])
def test_ctrl_c_and_sigterm_keep_the_rows_of_a_sweep(
    number: signal.Signals,
    says: str,
    settings: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = iter([{"problem": None, "tokens_per_sec_per_gpu": 5.0}, {"problem": "does not fit"}])

    def time_(sweep: bench_sweep.Sweep, point: Point) -> dict:
        for row in figures:
            return row
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")

    monkeypatch.setattr(bench_sweep.Sweep, "_time", time_)
    out = settings.parent / "stopped"
    assert benchmark.main(["--config", str(settings), "--sweep", "--out", str(out)]) == 128 + number
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "as before"
    assert [row["problem"] for row in load(out)["rows"]] == [None, "does not fit"]
    said = capsys.readouterr()
    assert said.err == f"pretrain bench: interrupted{says}\n"
    assert said.out.startswith("micro-batch 2 eager: 5 tokens/s/GPU\nmicro-batch 4 eager: does not fit\n# ")
    for text in (said.out, out.with_suffix(".md").read_text()):
        assert f"- {bench_result.UNFINISHED}\n- Best: micro-batch 2 eager: " in text
        assert "does not fit" in text


def test_a_disk_that_is_full_in_the_end_does_not_take_the_table(
    settings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bench_result.Result, "save", full)
    monkeypatch.setattr(
        bench_sweep.Sweep, "_time", lambda sweep, point: {"problem": None, "tokens_per_sec_per_gpu": 1.0}
    )
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--config", str(settings), "--sweep"])
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert "| micro-batch 2 eager | 1 |" in said.out
    assert said.err == "pretrain bench: error: [Errno 28] No space left on device\n"
