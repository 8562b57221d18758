"""Run under torchrun by test_parallel.py: shard a model over the ranks and write down what it is."""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from pretrain import parallel
from pretrain.config import ModelConfig, ParallelConfig
from pretrain.optim import clip_gradients


def main(out: Path, model_config: ModelConfig) -> None:
    """Build, save the whole initial weights, then one backward on different data a rank, and save the gradient's norm."""
    settings = ParallelConfig(accelerator="cpu", precision="fp32", compile=False)
    fabric = parallel.launch(settings, [])
    model = parallel.unwrap(parallel.build(fabric, model_config, settings, seed=7))
    sharded = [isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in model.parameters()]
    whole = {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for name, p in model.named_parameters()
    }
    tokens = torch.randint(0, model_config.vocab_size, (6, 17), generator=torch.Generator().manual_seed(3))
    mine = tokens.chunk(fabric.world_size)[fabric.global_rank]
    fabric.backward(model(mine[:, :-1], mine[:, 1:]))
    norm = clip_gradients(model, 1.0)
    if fabric.is_global_zero:
        torch.save(whole, out / "weights.pt")
        facts = {"sharded": sum(sharded), "parameters": len(sharded), "grad_norm": norm.item()}
        (out / "facts.json").write_text(json.dumps({**facts, "strategy": type(fabric.strategy).__name__}))
    parallel.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), ModelConfig(**json.loads(sys.argv[2])))
