"""What attention within documents costs: forward and backward with data.intra_document and without it, in turns.

    python benchmarks/intra_document.py [--config configs/demo.yaml] [--rounds 15]

The same weights and batch; documents of 100 and of 1,000 tokens on average, ended by EOS at random places. The ratio is the
median over the rounds. Goes to benchmarks/results/intra_document_DEVICE.json with the machine, the versions and every time.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from pretrain import backends, config, parallel
from pretrain.bench_result import machine

EOS = 2


def seconds_of_a_step(model: torch.nn.Module, batch: torch.Tensor) -> float:
    """Forward and backward on (B, T + 1) tokens."""
    started = time.perf_counter()
    model(batch[:, :-1], batch[:, 1:]).backward()
    model.zero_grad()
    if batch.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(settings: config.Config, rounds: int) -> dict:
    """Times in turns, after three rounds of warm-up."""
    fabric = parallel.launch(settings.parallel, settings.model, [])[0]
    models = {
        name: parallel.build(fabric, settings.model, settings.parallel, settings.seed, eos_id=eos_id)
        for name, eos_id in (("whole sequences", None), ("within documents", EOS))
    }
    shape = (settings.train.micro_batch_size, settings.data.seq_len + 1)
    generator = torch.Generator().manual_seed(1)
    result: dict = {"operations": backends.table(parallel.unwrap(models["within documents"]).operations.choices)}
    for mean_length in (100, 1000):
        batch = torch.randint(3, settings.model.vocab_size, shape, generator=generator)
        batch[torch.rand(shape, generator=generator) < 1 / mean_length] = EOS
        batch = batch.to(fabric.device)
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(3 + rounds):
            for name, model in models.items():
                times[name].append(seconds_of_a_step(model, batch))
        times = {name: values[3:] for name, values in times.items()}
        whole, within = times.values()
        result[f"documents of {mean_length} tokens"] = {
            "step_time_ratio": statistics.median(b / a for a, b in zip(whole, within)),
            "seconds": times,
        }
    return {**result, "batch": list(shape), "model": settings.model.shape()}


def main() -> int:
    """Run, print one line, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seq_len", type=int, default=None)
    parser.add_argument("--micro_batch_size", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    settings = config.load(args.config)
    T = args.seq_len or settings.data.seq_len
    B = args.micro_batch_size or settings.train.micro_batch_size
    settings = dataclasses.replace(
        settings,
        data=dataclasses.replace(settings.data, seq_len=T),
        model=dataclasses.replace(settings.model, max_position_embeddings=T),
        train=dataclasses.replace(settings.train, micro_batch_size=B),
    )
    result = measure(settings, args.rounds)
    device = "cuda" if torch.cuda.is_available() and settings.parallel.accelerator != "cpu" else "cpu"
    result |= machine()
    out = args.out or Path(__file__).parent / "results" / f"intra_document_{device}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    for name in ("documents of 100 tokens", "documents of 1000 tokens"):
        print(f"{name}: a step takes {result[name]['step_time_ratio']:.3f} times as long as over whole sequences")
    return 0


if __name__ == "__main__":
    sys.exit(main())
