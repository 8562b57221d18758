"""Sharding changes where the weights lie and nothing else: not the initial weights, not the norm of the gradient."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MODEL = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[dict[str, torch.Tensor], dict]]:
    """Number of ranks -> the whole weights after sharding, and facts."""
    result = {}
    for ranks in (1, 2, 3):
        out = tmp_path_factory.mktemp(f"ranks{ranks}")
        start = [sys.executable]
        if ranks > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        script = [str(Path(__file__).parent / "ranks.py"), str(out), json.dumps(MODEL)]
        subprocess.run([*start, *script], check=True, capture_output=True, timeout=200)
        result[ranks] = (torch.load(out / "weights.pt"), json.loads((out / "facts.json").read_text()))
    return result


def test_more_than_one_rank_is_sharded_by_fsdp2(built: dict) -> None:
    assert built[1][1]["strategy"] == "SingleDeviceStrategy"
    assert built[1][1]["sharded"] == 0
    for ranks in (2, 3):
        assert built[ranks][1]["strategy"] == "ModelParallelStrategy"
        assert built[ranks][1]["sharded"] == built[ranks][1]["parameters"] > 20


def test_the_initial_weights_do_not_depend_on_the_sharding(built: dict) -> None:
    for ranks in (2, 3):
        assert built[ranks][0].keys() == built[1][0].keys()
        for name, weight in built[ranks][0].items():
            assert torch.equal(weight, built[1][0][name]), f"{name} on {ranks} ranks"


def test_the_weights_still_have_tinyllamas_statistics_after_sharding(built: dict) -> None:
    D, L = MODEL["hidden_size"], MODEL["num_hidden_layers"]
    for name, weight in built[2][0].items():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected = 1 / math.sqrt(D) / L if residual else math.sqrt(2 / 5 / D)
        error = 5 / math.sqrt(2 * weight.numel())
        assert weight.std().item() == pytest.approx(expected, rel=error), name
        for half in weight.chunk(2):  # what each rank holds
            assert half.std().item() == pytest.approx(expected, rel=1.5 * error), name


def test_the_gradient_norm_is_the_global_one(built: dict) -> None:
    for ranks in (2, 3):
        assert built[ranks][1]["grad_norm"] == pytest.approx(built[1][1]["grad_norm"], rel=1e-5)
