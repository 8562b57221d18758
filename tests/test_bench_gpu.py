"""`make bench-gpu` in miniature on the CPU: every part runs, so that nothing but the chip is new where there is a GPU."""

import argparse
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.shard import check_tokenizer
from pretrain import config, data, ops
from pretrain.bench_paper import SHAPES
from pretrain.model import count

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All parts, in a miniature, as a user without an installation starts them."""
    out = tmp_path_factory.mktemp("gpu")
    command = [
        sys.executable,
        ROOT / "benchmarks" / "gpu.py",
        "--device",
        "cpu",
        "--small",
        "--out",
        out,
        "--seconds",
        1600,
        "--parts",
        "operations,step,40gb,resume,peers,kernels,four,documents,fp8,probe,paper,sweep",
    ]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=out, env=alone, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def rows(results: Path, part: str) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((results / f"gpu-cpu-{part}.json").read_text())["rows"]}


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_there_is_one_page_of_everything(results: Path) -> None:
    page = (results / "gpu-cpu.md").read_text()
    assert page.startswith("Not installed: ")
    for heading in (
        "# Operations against",
        "a step by the CPU's: ",
        "# A training step of",
        "through each trainer's code",
        "# GPU hours for 300B",
        "A resume is the same run",
        "documents of 1000 tokens: a step takes",
        "# fp8: the step with its layers' products in float8\n\nNot timed: it needs a GPU.",
        "tokens/s/GPU (",
    ):
        assert heading in page
    assert "12 tried, 0 wrong" in page


def test_an_operation_that_is_wrong_is_called_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    """Be it in the gradient for the queries alone, which is small beside the others."""
    operations = runpy.run_path(str(ROOT / "benchmarks" / "operations.py"))
    cpu, found_by, errors = torch.device("cpu"), operations["found_by"], operations["errors"]

    def too_much(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: None) -> torch.Tensor:
        return ops.attention(q + 0.5 * (q - q.detach()), k, v, causal, mask)

    exact = found_by(ops.REFERENCE, torch.float32, cpu)
    plain = errors(found_by(ops.REFERENCE, torch.bfloat16, cpu), exact)
    assert operations["judged"]("reference", plain, plain)
    wrong = found_by(replace(ops.REFERENCE, attention=too_much), torch.bfloat16, cpu)
    assert not operations["judged"]("wrong", errors(wrong, exact), plain)
    assert "q_proj" in capsys.readouterr().out.splitlines()[-1].split("WRONG: ")[1]


def test_the_resume_is_verified_through_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed to verify-resume, which tests/test_verify_resume.py runs."""
    gpu = runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"))
    seen = []

    def output(command: list[str], seconds: float) -> tuple[str, int]:
        settings = config.load(Path(command[command.index("--config") + 1]))
        (source,) = data.open_sources(settings.data, settings.model.vocab_size)
        check_tokenizer(source.train.directory, source.train.manifest.tokenizer)  # else training refuses it
        seen.append((command[:3], settings.parallel.strategy, source.train.num_sequences(settings.data.seq_len) > 16))
        return "said", 3

    monkeypatch.setitem(gpu["_resume"].__globals__, "_output", output)
    args = argparse.Namespace(device="cpu", config=ROOT / "configs" / "tinyllama-1.1b.yaml")
    assert gpu["_resume"](args, float("inf")) == ("said", False)
    assert seen == [(["-m", "pretrain", "verify-resume"], "full_shard", True)]


def test_the_products_that_are_timed_are_those_of_a_step() -> None:
    """By their FLOPs: forward, and two as large backward."""
    kernels = runpy.run_path(str(ROOT / "benchmarks" / "kernels.py"))
    for name in ("tinyllama-1.1b", "llama-7b", "demo"):
        model, tokens = config.load(ROOT / "configs" / f"{name}.yaml").model, 16 * 2048
        for device in map(torch.device, ("cuda", "cpu")):
            products = kernels["products"](model, tokens, device)
            flops = sum(6 * N * out * width * often for _, N, out, width, often in products)
            assert flops == pytest.approx(6 * count(model).in_products * tokens, rel=1e-12)


@pytest.mark.long
def test_the_step(results: Path) -> None:
    row = rows(results, "step")["cria"]
    assert row["problem"] is None
    assert row["tokens_per_step"] == 2 * 32
    assert len(rows(results, "step")["cria"]["operations"]) == 10


@pytest.mark.long
def test_peers_train_the_same_model(results: Path) -> None:
    found = rows(results, "peers")
    ours, theirs = found["cria"], found["transformers (eager)"]
    assert theirs["problem"] is None
    assert abs(ours["first_loss"] - theirs["first_loss"]) < 2e-5
    assert abs(ours["last_loss"] - theirs["last_loss"]) < 2e-4  # after updates: the optimizer is the same too
    assert ours["last_loss"] != ours["first_loss"]
    assert theirs["ratio"] > 0
    for name, row in found.items():
        if name.startswith("litgpt") and importlib.util.find_spec("litgpt") is None:
            assert "litgpt not installed here" in row["problem"]
    assert found["stand-in for TinyLlama's code"]["problem"] == "not timed: its kernels are Triton's and need a GPU"


@pytest.mark.long
def test_the_sweep_names_the_best(results: Path) -> None:
    found = rows(results, "sweep")
    timed = {name: row for name, row in found.items() if row["problem"] is None}
    assert "micro-batch 2 eager" in timed
    assert len(timed) >= 2
    assert timed["micro-batch 2 eager"]["note"].endswith("4 micro-steps a step, 3 timed")
    (best,) = [name for name, row in found.items() if row.get("note", "").startswith("best")]
    assert timed[best]["tokens_per_sec_per_gpu"] == max(row["tokens_per_sec_per_gpu"] for row in timed.values())
    verdict = json.loads((results / "gpu-cpu-sweep.json").read_text())["notes"][0]
    assert verdict.startswith(f"Best: {best}: `--train.micro_batch_size ")


@pytest.mark.long
def test_the_paper_s_table(results: Path) -> None:
    """Hours are extrapolated and say so; the counted parameters are those of the models."""
    found = rows(results, "paper")
    assert [row["paper_a100_hours"] for row in found.values()] == [3456, 4830, 7920]
    for shape in SHAPES:
        row = found[shape.name]
        assert row["problem"] is None
        small = shape.scaled(0.03)
        assert row["parameters"] == small.parameters()
        assert f"hours extrapolated by FLOPs from {small.parameters():,} parameters" in row["note"]
        share = small.flops_per_token(32) / shape.flops_per_token(2048)
        assert row["gpu_hours"] == pytest.approx(300e9 / 3600 / (row["tokens_per_sec_per_gpu"] * share))


def test_the_shapes_are_the_published_ones() -> None:
    tinyllama, pythia, mpt = (shape.parameters() for shape in SHAPES)
    assert tinyllama == 1_100_048_384
    assert pythia == 1_011_781_632  # arXiv 2304.01373, table 1
    assert mpt == pytest.approx(1.31e9, rel=0.01)


def test_without_a_gpu_it_is_one_line() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "bench-gpu: error: no CUDA device here; --device cpu --small runs all of it in miniature\n"


def test_what_there_is_no_time_for_keeps_what_an_earlier_call_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it has not failed; the page is made of all that there is."""
    gpu = runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"))
    kept = [tmp_path / f"gpu-cpu-{part}.md" for part in ("operations", "peers", "peers-more", "sweep")]
    for page in kept:
        page.write_text(f"# of {page.stem}\n")
    words = ["gpu.py", "--device", "cpu", "--small", "--out", str(tmp_path), "--parts", "resume,peers", "--seconds"]
    monkeypatch.setattr(sys, "argv", [*words, "1"])
    assert gpu["main"]() == 0
    assert "no time was left for resume, peers: ask for them by themselves" in capsys.readouterr().out
    assert all(page.exists() for page in kept)
    monkeypatch.setitem(gpu["_run"].__globals__, "_resume", lambda args, seconds: ("it said so", False))
    monkeypatch.setattr(sys, "argv", [*words[:-2], "resume", "--seconds", "100"])
    assert gpu["main"]() == 1
    headings = [line for line in (tmp_path / "gpu-cpu.md").read_text().splitlines() if line.startswith("# ")]
    assert headings[0] == "# of gpu-cpu-operations"
    assert headings[1].startswith("# A killed run")
    del headings[1]
    assert headings == [f"# of {page.stem}" for page in kept]
