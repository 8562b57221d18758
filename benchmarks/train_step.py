"""One training step on the CPU: Cria's model against transformers', same weights, batch and optimizer, in one run.

    python benchmarks/train_step.py [--config configs/demo.yaml] [--rounds 15]

The two take turns, a step each, so that a machine whose speed drifts slows both. The ratio is the median over the rounds.
The result, with the machine, the versions and every raw time, goes to benchmarks/results/train_step_cpu.json.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from pretrain import config, hf
from pretrain.model import Llama
from pretrain.optim import clip_gradients, make_optimizer, step_if_finite

RESULTS = Path(__file__).parent / "results" / "train_step_cpu.json"


def make_models(settings: config.Config) -> tuple[nn.Module, nn.Module]:
    """Ours and transformers', fp32, with the same weights."""
    with torch.device("meta"):
        ours = Llama(settings.model)
    ours.materialize(torch.device("cpu"))
    ours.init_weights(settings.seed)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**hf.to_hf_config(settings.model, torch.float32, None, None))
    )
    theirs.load_state_dict(ours.state_dict(), strict=not settings.model.tie_word_embeddings)
    return ours, theirs.train()


def make_step(
    model: nn.Module, loss_of: Callable[[Tensor], Tensor], settings: config.Config
) -> Callable[[Tensor], float]:
    """A whole optimizer step on a batch (B, T + 1): forward, backward, clipping, AdamW. Returns the loss."""
    optimizer = make_optimizer(model, settings.optim)

    def step(batch: Tensor) -> float:
        loss = loss_of(batch)
        loss.backward()
        step_if_finite(optimizer, clip_gradients(model, settings.optim.max_grad_norm))
        optimizer.zero_grad()
        return loss.item()

    return step


def compare(settings: config.Config, rounds: int) -> dict:
    """Time both, in turns; the first three rounds warm up."""
    ours, theirs = make_models(settings)
    steps = {
        "cria": make_step(ours, lambda batch: ours(batch[:, :-1], batch[:, 1:]), settings),
        # The usual labels=input_ids computes one position more than is counted; this is transformers at its best.
        "transformers": make_step(
            theirs,
            lambda batch: F.cross_entropy(theirs(input_ids=batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()),
            settings,
        ),
    }
    shape = (settings.train.micro_batch_size, settings.data.seq_len + 1)
    generator = torch.Generator().manual_seed(1)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(3 + rounds):
        batch = torch.randint(0, settings.model.vocab_size, shape, generator=generator)
        for name, step in steps.items():
            started = time.perf_counter()
            losses[name].append(step(batch))
            seconds[name].append(time.perf_counter() - started)
    drift = max(abs(a - b) for a, b in zip(*losses.values()))
    assert drift < 1e-3, f"the two did not train the same model: their losses differ by {drift}"
    timed = {name: values[3:] for name, values in seconds.items()}
    tokens = shape[0] * settings.data.seq_len
    return {
        "ratio": statistics.median(b / a for a, b in zip(timed["cria"], timed["transformers"])),
        "tokens_per_sec": {name: tokens / statistics.median(values) for name, values in timed.items()},
        "largest_loss_difference": drift,
        "seconds": timed,
        "tokens_per_step": tokens,
        "model": dataclasses.asdict(settings.model),
    }


def main() -> int:
    """Run, print one line, write the JSON; status 1 where ours is the slower one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    result = compare(config.load(args.config), args.rounds)
    machine = {"cpu": _cpu_name(), "threads": torch.get_num_threads()}
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**result, "machine": machine, "versions": versions}, indent=1) + "\n")
    speeds = ", ".join(f"{name} {speed:,.0f} tokens/s" for name, speed in result["tokens_per_sec"].items())
    print(f"{speeds}; cria is {result['ratio']:.3f} times transformers ({args.rounds} rounds, {machine['cpu']})")
    return 0 if result["ratio"] >= 1 else 1


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
