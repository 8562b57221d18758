"""Whole runs on one GPU: stopped and started again they are the same to the bit, and begin the same: make test-gpu."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, pretrain, tiny_config, write_config

from pretrain import parallel
from pretrain.sections import ModelConfig, ParallelConfig

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("strategy", ["single", "full_shard"])
def test_a_resume_is_the_same_run(strategy: str, datasets: Path, tmp_path: Path) -> None:
    """Compiled, in bf16, killed once, saved in the background.

    full_shard on one rank goes through DTensor and FSDP2; but in a world of one FSDP2 sends nothing through NCCL.
    """
    here = {"accelerator": "cuda", "precision": "bf16", "compile": True, "strategy": strategy}
    file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run", parallel=here))
    done = pretrain("verify-resume", "--config", file, "--steps", 16, "--kills", 1, "--out", tmp_path / "out")
    assert "A resume is the same run" in done.stdout
    assert done.stdout.count("bit-identical") == 2
    started = (tmp_path / "out" / "killed" / "output.txt").read_text()
    assert started.count(f"strategy {strategy}") == 2


def test_the_first_weights_do_not_depend_on_where_they_are_kept() -> None:
    shape = ModelConfig(**TINY_MODEL)
    first = []
    for settings in (
        ParallelConfig(accelerator="cuda", strategy="single", compile=False),
        ParallelConfig(accelerator="cuda", strategy="full_shard", compile=False),
        ParallelConfig(accelerator="cuda", strategy="full_shard", compile=False, cpu_offload=True),
    ):
        fabric, _ = parallel.launch(settings, shape, [])
        model = parallel.unwrap(parallel.build(fabric, shape, settings, seed=1))
        weights = {name: p.detach() for name, p in model.named_parameters()}
        first.append({name: (p.to_local() if hasattr(p, "to_local") else p).cpu() for name, p in weights.items()})
    parallel.leave()
    for other in first[1:]:
        assert other.keys() == first[0].keys()
        assert all(torch.equal(other[name], first[0][name]) for name in other)


@pytest.mark.parametrize("recompute", ["none", "mlp"])
@pytest.mark.parametrize("strategy", ["single", "full_shard"])
def test_the_plan_knows_the_memory(strategy: str, recompute: str, tmp_path: Path) -> None:
    """Of a step with two micro-steps, compiled: too much by a fifth at most, and never too little."""
    size = ("--train.micro_batch_size", 16, "--grad_accum_steps", 2, "--steps", 2, "--warmup", 1)
    how = ("--parallel.strategy", strategy, "--parallel.recompute", recompute)
    pretrain("bench", "--config", ROOT / "configs" / "llama-120m.yaml", *size, *how, "--out", tmp_path / "out")
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert 0.97 < row["planned_mem_gib"] / row["peak_mem_gib"] < 1.2
