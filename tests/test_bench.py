"""`pretrain bench`: the step, its figures and their comparison; memory that does not suffice."""

import json
import resource
import statistics
from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY_MODEL, pretrain, tiny_config, write_config
from lightning.fabric import Fabric

from pretrain import (
    bench_peers,
    bench_profile,
    bench_result,
    bench_step,
    bench_sweep,
    bench_timing,
    benchmark,
    config,
    metrics,
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose data do not exist: random ids need none."""
    folder = tmp_path_factory.mktemp("bench")
    return write_config(folder / "tiny.yaml", tiny_config(Path("/nowhere"), folder / "run"))


@pytest.fixture(scope="module")
def stepped(settings: Path) -> Path:
    """One `pretrain bench`, with a profile."""
    out = settings.parent / "step"
    argv = ["--config", settings, "--steps", 4, "--warmup", 2, "--profile", "--out", out]
    assert benchmark.main(list(map(str, argv))) == 0
    return out


def load(out: Path) -> dict:
    return json.loads(out.with_name(f"{out.name}.json").read_text())


def test_a_step_is_timed_as_a_run_logs_it(stepped: Path, settings: Path) -> None:
    """The median of real steps of the configured batch; and the run's own metrics, from the same function, say the mean."""
    (row,) = load(stepped)["rows"]
    assert row["problem"] is None
    assert len(row["seconds"]) == 4
    assert row["tokens_per_step"] == 8 * 32
    assert row["grad_accum_steps"] == 4
    assert row["step_time_s"] == statistics.median(row["seconds"])
    same = metrics.throughput(256, row["step_time_s"], 1, row["flops_per_token"], torch.device("cpu"))
    assert {name: row[name] for name in same} == same
    assert row["mfu_m1_pct"] is None  # a CPU's peak is not known
    logged = metrics.throughput(256, statistics.mean(row["seconds"]), 1, row["flops_per_token"], torch.device("cpu"))
    assert row["as_logged_tokens_per_sec_per_gpu"] <= logged["tokens_per_sec_per_gpu"]
    assert 0 <= row["data_wait_pct"] <= 100
    assert abs(row["first_loss"] - torch.tensor(float(TINY_MODEL["vocab_size"])).log()) < 0.3  # random ids
    assert not Path(config.load(settings).run_dir).exists()  # it leaves no run


def test_a_profile_is_a_trace_and_ten_operations(stepped: Path) -> None:
    trace = json.loads(stepped.with_name("step.trace.json").read_text())
    assert any("aten::mm" in str(event.get("name")) for event in trace["traceEvents"])
    operations = load(stepped)["rows"][0]["operations"]
    assert len(operations) == 10
    assert [o["ms"] for o in operations] == sorted((o["ms"] for o in operations), reverse=True)
    assert 0 < sum(o["pct"] for o in operations) <= 100
    page = stepped.with_name("step.md").read_text()
    assert "aten::mm" in page
    assert "| cria |" in page
    assert "M1 = 6 N" in page


def test_known_chips_have_an_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TinyLlama's 24k tokens/s on an A100 are 59% by its own formula, 52% with causal attention; an unknown chip has none."""
    flops = {"m1": 7.708e9, "m3": 6.760e9}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    found = metrics.throughput(24_000 * 2, 1.0, 2, flops, torch.device("cuda"))
    assert found["tokens_per_sec_per_gpu"] == 24_000
    assert found["mfu_m1_pct"] == pytest.approx(59.3, abs=0.05)
    assert found["mfu_m3_pct"] == pytest.approx(52.0, abs=0.05)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB MIG 1g.5gb")
    assert metrics.throughput(24_000, 1.0, 1, flops, torch.device("cuda"))["mfu_m1_pct"] is None


def test_two_ranks_talk(settings: Path) -> None:
    out = settings.parent / "two"
    pretrain("bench", "--config", settings, "--steps", 2, "--warmup", 1, "--out", out, ranks=2)
    (row,) = load(out)["rows"]
    assert row["world_size"] == 2
    assert row["grad_accum_steps"] == 2
    assert row["tokens_per_sec"] == pytest.approx(2 * row["tokens_per_sec_per_gpu"])
    assert 0 < row["communication_pct"] <= 100


def test_ranks_of_a_call_share_a_folder_that_no_other_call_removes(
    settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scratch(rank: str, **call: str) -> AbstractContextManager[config.Config]:
        for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": rank, **call}.items():
            monkeypatch.setenv(name, value)
        return bench_step._scratch(config.load(settings), bench_step.Timing())

    with scratch("0", MASTER_PORT="1111") as changed:
        folder = Path(changed.run_dir)
        folder.mkdir(parents=True)
        with scratch("1", MASTER_PORT="1111") as changed:
            assert Path(changed.run_dir) == folder
        assert folder.exists(), "rank 0 removes it"
        with scratch("0", MASTER_PORT="2222") as changed:
            Path(changed.run_dir).mkdir()
            assert Path(changed.run_dir) != folder
        assert not Path(changed.run_dir).exists()
        assert folder.exists()
        monkeypatch.setenv("RANK", "0")
    assert not folder.exists()


def test_the_run_s_own_data(datasets: Path, tmp_path: Path) -> None:
    real = write_config(tmp_path / "real.yaml", tiny_config(datasets, tmp_path / "run"))
    argv = ["--config", real, "--data", "real", "--steps", 1, "--warmup", 1, "--grad_accum_steps", 2]
    argv += ["--train.stop_after_step", 1]  # which is of the run
    assert benchmark.main([*map(str, argv), "--out", str(tmp_path / "real")]) == 0
    (row,) = load(tmp_path / "real")["rows"]
    assert row["tokens_per_step"] == 2 * 2 * 32  # two micro-batches instead of four


def test_steps_that_the_run_leaves_out_are_timed(datasets: Path, tmp_path: Path) -> None:
    """They are of the run: a bench takes as many steps as it was asked for, on what the order has in the first ones."""
    rows = []
    for name, left_out in (("all", []), ("out", [{"first_step": 1, "last_step": 15}])):
        changed = tiny_config(datasets, tmp_path / "run", train={"leave_out": left_out})
        file = write_config(tmp_path / f"{name}.yaml", changed)
        argv = ["--config", file, "--data", "real", "--steps", 2, "--warmup", 1, "--out", tmp_path / name]
        argv += ["--train.max_steps", 16, "--optim.warmup_steps", 2]
        assert benchmark.main(list(map(str, argv))) == 0
        rows += load(tmp_path / name)["rows"]
    assert [row["problem"] for row in rows] == [None, None]
    assert rows[0]["last_loss"] == rows[1]["last_loss"]


def test_what_random_ids_do_not_tell_of_documents_is_said(settings: Path, stepped: Path, tmp_path: Path) -> None:
    argv = ["--config", settings, "--steps", 1, "--warmup", 1, "--out", tmp_path / "out"]
    argv += ["--data.intra_document", "true"]
    assert benchmark.main(list(map(str, argv))) == 0
    says = "random ids have an EOS only every 320 tokens"
    assert [says in note for note in load(tmp_path / "out")["notes"]].count(True) == 1
    assert says in (tmp_path / "out.md").read_text()
    assert says not in stepped.with_name("step.md").read_text()
    chosen = config.parse(["--config", str(settings), "--data.intra_document", "true"])
    assert bench_result.of_documents(chosen, "real") == []


def test_memory_that_does_not_suffice_is_a_row(settings: Path) -> None:
    out = settings.parent / "large"
    argv = ["--config", str(settings), "--steps", "1", "--warmup", "1", "--out", str(out)]
    assert benchmark.main([*argv, "--model.vocab_size", str(2**18), "--model.hidden_size", str(2**20)]) == 1
    (row,) = load(out)["rows"]
    assert row["problem"].startswith("does not fit: out of memory, ")
    assert benchmark.main([*argv, "--memory_limit_gib", "0.01"]) == 1
    (row,) = load(out)["rows"]
    assert "the limit is 0.01 GiB" in row["problem"]


@pytest.mark.parametrize("factor", [0.0, float("nan")])
def test_a_step_that_trains_nothing_has_no_speed(
    factor: float, settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a compiler's mistake loses the gradient."""
    backward = Fabric.backward
    monkeypatch.setattr(Fabric, "backward", lambda self, loss: backward(self, loss * factor))
    out = tmp_path / "out"
    assert benchmark.main(["--config", str(settings), "--steps", "2", "--warmup", "1", "--out", str(out)]) == 1
    (row,) = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert row["problem"] == "trains nothing: 3 updates were skipped, for their gradient was 0 or not finite"


def test_peak_memory_is_that_of_the_fullest_rank(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_timing, "memory", lambda device: {"peak_mem_gib": 1.0, "reserved_mem_gib": 1.0})
    reduced = bench_step.ranks.all_reduce_max
    another = lambda tensor: reduced(tensor).clamp(min=3.0 if tensor.dtype == torch.float64 else None, max=1e9)  # noqa: E731
    monkeypatch.setattr(bench_step.ranks, "all_reduce_max", another)
    row = bench_step.measure(config.load(settings), bench_step.Timing(steps=1, warmup=1, memory_limit_gib=2.0))
    assert row["peak_mem_gib"] == 3.0
    assert row["problem"] == "does not fit: 3.00 GiB resident at the peak, the limit is 2 GiB"


def test_what_runs_out_of_memory_is_told_from_what_is_wrong() -> None:
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 39.50 GiB of which ..."
    told = bench_timing.out_of_memory(torch.OutOfMemoryError(said))
    assert told == "does not fit: out of memory, 2.00 GiB more were asked for"
    assert bench_timing.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_slower_than_before_is_status_1(stepped: Path, settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def again(change: float, *keys: str, **subject: object) -> int:
        before = load(stepped)
        before["rows"][0]["tokens_per_sec_per_gpu"] *= change
        before["subject"] |= subject
        earlier = settings.parent / "earlier.json"
        earlier.write_text(json.dumps(before))
        argv = ["--config", str(settings), "--steps", "2", "--warmup", "1", "--out", str(settings.parent / "again")]
        return benchmark.main([*argv, "--compare", str(earlier), *keys])

    assert again(1e-6) == 0
    assert again(1e6) == 1
    assert "SLOWER by more than 5%, or gone: cria" in capsys.readouterr().out
    assert again(1e6, "--noise_pct", "100") == 0
    for keys, subject in ((["--model.hidden_size", "32"], {}), ([], {"chip": "another"})):
        with pytest.raises(SystemExit) as stopped:
            again(1.0, *keys, **subject)
        assert stopped.value.code == 2
        assert "cannot be compared" in capsys.readouterr().err


def test_a_row_that_lost_its_figures_is_slower(stepped: Path) -> None:
    before = load(stepped)
    earlier = bench_result.Earlier.read(stepped.with_name("step.json"))
    for rows, says in (([{"name": "cria", "problem": "does not fit"}], "does not fit"), ([], "now missing")):
        result = bench_result.Result("step", "t", before["subject"], rows)
        lines, lost = bench_result.compare(result, earlier, 5.0, all_asked_for=True)
        assert lost == ["cria"]
        assert says in lines[0]
    lines, lost = bench_result.compare(result, earlier, 5.0, all_asked_for=False)
    assert (lost, lines[0].endswith("now not timed")) == ([], True)


def test_a_result_is_compared_with_what_its_file_held_before(stepped: Path, settings: Path) -> None:
    """The default output of today is the earlier result of tomorrow, and is saved over."""
    before = load(stepped)
    before["rows"][0]["tokens_per_sec_per_gpu"] *= 1e6
    same = settings.parent / "same.json"
    same.write_text(json.dumps(before))
    argv = ["--config", settings, "--steps", 1, "--warmup", 1, "--out", same.with_suffix(""), "--compare", same]
    assert benchmark.main(list(map(str, argv))) == 1
    assert load(same.with_suffix(""))["rows"][0]["tokens_per_sec_per_gpu"] < 1e6


KINDS = ([], ["--sweep"], ["--peers"], ["--paper"])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "".join(kind) or "step")
def test_what_cannot_be_compared_is_refused_before_anything_is_timed(
    kind: list[str], settings: Path, stepped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def timed(*_: object, **__: object) -> None:
        raise AssertionError("it was timed")

    monkeypatch.setattr(bench_step, "measure", timed)
    for module in (bench_sweep, bench_peers):
        monkeypatch.setattr(module, "Child", timed)
    earlier = settings.parent / "another.json"
    text = json.dumps(load(stepped))
    cases = [(["--data", "real"], text, "data was random and is real")] if kind in KINDS[:2] else []
    if kind != ["--peers"]:
        cases.append((["--data.intra_document", "true"], text, "intra_document was False and is True"))
    cases += [
        (["--train.z_loss", "0.1"], text, "z_loss was 0.0 and is 0.1"),
        (["--train.deterministic", "true"], text, "deterministic was False and is True"),
        ([], text.replace('"kind"', '"kin"'), "is not a result of pretrain bench: KeyError('kind')"),
        ([], json.dumps({**json.loads(text), "rows": []}), "no row with figures"),
        ([], text.replace('"tokens_per_sec_per_gpu": ', '"tokens_per_sec_per_gpu": 0, "was": '), "has 0 tokens/s/GPU"),
    ]
    for keys, holds, says in cases:
        earlier.write_text(holds.replace('"kind": "step"', f'"kind": "{"".join(kind)[2:] or "step"}"'))
        with pytest.raises(SystemExit) as stopped:
            benchmark.main(["--config", str(settings), *kind, "--compare", str(earlier), *keys])
        said = capsys.readouterr().err
        assert stopped.value.code == 2
        assert said.count("\n") == 1
        assert says in said


def test_what_an_older_version_did_not_note_is_no_difference(stepped: Path, settings: Path, tmp_path: Path) -> None:
    older = load(stepped)
    for key in ("data", "intra_document", "deterministic", "z_loss"):
        del older["subject"][key]
    (tmp_path / "older.json").write_text(json.dumps(older))
    earlier = bench_result.Earlier.read(tmp_path / "older.json")
    now = bench_result.Result("step", "t", bench_result.subject(config.load(settings), 1), load(stepped)["rows"])
    earlier.check("step", now.subject)
    lines, lost = bench_result.compare(now, earlier, 5.0, all_asked_for=True)
    assert lost == []
    assert "does not say data, deterministic, intra_document, z_loss: taken as the same" in lines[0]
    recorded = Path(__file__).parent.parent / "benchmarks" / "results" / "peers_cpu.json"
    assert bench_result.Earlier.read(recorded).figures["cria"] > 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--steps", "few"], "argument --steps: invalid int value: 'few' (pretrain bench --help"),
        (["--sweep", "--peers"], "argument --peers: not allowed with argument --sweep"),
        (["--memory_limit_gib", "-1"], "--memory_limit_gib is -1; it must be above 0"),
        (["--memory_limit_gib", "nan"], "--memory_limit_gib is nan; it must be above 0"),
        (["--sweep", "--budget_s", "nan"], "--budget_s is nan; it must be above 0"),
        (["--noise_pct", "-1"], "--noise_pct is -1; it must be at least 0"),
        (["--noise_pct", "nan"], "--noise_pct is nan; it must be at least 0"),
        (["--noise_pct", "2"], "--noise_pct is for --compare, and there is none"),
        (["--compare", "/nowhere.json"], "/nowhere.json is missing"),
        (["--out", "/proc/nowhere/out"], "--out /proc/nowhere/out: nothing can be written there"),
        (["--out", "/proc/out"], "--out /proc/out: nothing can be written there"),
        (["--profile", "--peers"], "--profile is for the step alone; --peers would not heed it"),
        (["--data", "real", "--paper"], "--data is for the step alone or --sweep; --paper would not heed it"),
        (["--scale", "0.5"], "--scale is for --paper; the step alone would not heed it"),
        (["--modle.hidden_size", "3"], "modle.hidden_size"),
        (
            ["--peers", "--peers_python", "/nope"],
            "--peers_python /nope is no program; give the Python of an environment",
        ),
        (["--peers", "--peers_python", "/tmp"], "--peers_python /tmp is no program; give the Python of an environment"),
        (["--peers", "--data.intra_document", "true"], "no peer keeps attention within documents"),
    ],
)
def test_what_is_wrong_is_one_line(settings: Path, argv: list[str], says: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--config", str(settings), *argv])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("pretrain bench: error: ")
    assert says in said


def test_a_sweep_under_torchrun_is_refused(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    args = benchmark._parser().parse_args(["--config", str(settings), "--sweep"])
    with pytest.raises(ValueError, match="start it without torchrun, with --ranks 4"):
        benchmark._check_and_complete(args, config.load(settings))


def test_out_may_be_named_with_its_suffix(settings: Path) -> None:
    for given in ("a.b", "a.b.json", "a.b.md"):
        args = benchmark._parser().parse_args(["--config", str(settings), "--out", str(settings.parent / given)])
        benchmark._check_and_complete(args, config.load(settings))
        assert args.out == settings.parent / "a.b"


def test_rows_that_all_ran_on_the_same_are_not_listed() -> None:
    rows = [{"name": name, "problem": None, "kernels": {"rope": "PyTorch"}} for name in "ab"]
    failed = {"name": "c", "problem": "does not fit"}
    said = [
        bench_result.Result("sweep", "t", {}, shown).markdown().splitlines()[-1]
        for shown in ([*rows, failed], [*rows, {**rows[0], "name": "d", "kernels": {}}], rows[:1])
    ]
    assert said == ["- All ran on: rope: PyTorch.", "- a, b ran on: rope: PyTorch.", "- a ran on: rope: PyTorch."]


def test_a_save_for_which_the_disk_has_no_room_leaves_the_rows_of_the_one_before(tmp_path: Path) -> None:
    result = bench_result.Result("sweep", "t", {}, [{"name": "first", "problem": None}])
    result.save(tmp_path / "sweep")
    result.rows.append({"name": "second", "problem": "x" * 4096})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            result.save(tmp_path / "sweep")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [row["name"] for row in load(tmp_path / "sweep")["rows"]] == ["first"]
    assert "| first |" in (tmp_path / "sweep.md").read_text()


def test_kernels_are_told_apart_by_their_names() -> None:
    """Those of an H200 under PyTorch 2.11, as its libraries call them."""
    kinds = {
        "nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_TNT": "products",
        "cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x1_tn_align8": "products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128": "attention",
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64>>": "attention",
        "triton_red_fused__to_copy_mul_0": "Triton",
        "triton_poi_fused__scaled_dot_product_flash_attention_transpose_3": "Triton",
        "liger_cross_entropy_kernel": "Triton",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer and clipping",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL": "communication",
        "void at::native::elementwise_kernel<128, 4>": "other",
    }
    assert {name: bench_profile.kind(name) for name in kinds} == kinds
    events = [Mock(time_range=Mock(start=start, end=end)) for start, end in ((0, 400), (300, 600), (900, 1000))]
    for event, name in zip(events, kinds):
        event.name = name
    found = bench_profile._groups(events, 1000, 2)
    assert found == {"groups": {"products": 0.35, "attention": 0.05}, "idle_pct": pytest.approx(30)}


def test_intervals() -> None:
    assert bench_profile.merged([(3, 4), (0, 2), (1, 2.5), (4, 5)]) == [(0, 2.5), (3, 5)]
    assert bench_profile.merged([]) == []
