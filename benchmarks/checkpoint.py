"""Checkpoints: what a save costs training, Fabric's plain save of the same state beside it, and a start at step 1,000,000.

    python benchmarks/checkpoint.py [--models demo 110M] [--rounds 3]

    stall    steps of real training with saves in the background: what training waits for each, as a share of the time between
             saves, and how far apart saves must be for it to be 3.5%
    files    the same state (weights and AdamW's) into the same folder: saved, verified and loaded by Cria, by fabric.save and
             fabric.load, and by fabric.save and a sync; in turns, medians
    start    `pretrain train` from a new process to its first step at step 0 and at step 1,000,000, in its parts

Cria's save ends when all files are synced, hashed and committed; Fabric's when they are written. The result goes to
benchmarks/results/checkpoint.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.fabric import Fabric
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from data_prep.shard import Manifest, ShardWriter
from data_prep.tokenizer import load
from pretrain import checkpoint, config, saver
from pretrain.bench_result import machine
from pretrain.model import Llama, count
from pretrain.optim import clip_gradients, make_optimizer, step_unless
from pretrain.progress import Display
from pretrain.scheduler import Stop
from pretrain.sections import CheckpointConfig, ModelConfig

RESULTS = Path(__file__).parent / "results" / "checkpoint.json"
STALL_LIMIT = 0.002
"""Largest share of the time between saves that training may wait for them."""
LIMIT = 0.035
"""The same with what the steps beside a save take longer, on cores that its writer shares."""
DEMO = config.load(Path(__file__).parent.parent / "configs" / "demo.yaml")
SMALL = ModelConfig(
    vocab_size=32000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=10,
    num_attention_heads=12,
    num_key_value_heads=4,
    max_position_embeddings=2048,
)
MODELS = {"demo": (DEMO.model, 32, 20), "110M": (SMALL, 2, 50)}
"""Shape, sequences of 256 tokens a step, steps between saves."""


def make_state(shape: ModelConfig) -> tuple[Llama, torch.optim.AdamW]:
    """A model and its optimizer, fp32, after one step."""
    with torch.device("meta"):
        model = Llama(shape)
    model.materialize(torch.device("cpu"))
    model.init_weights(1)
    optimizer = make_optimizer(model, DEMO.optim)
    train_step(model, optimizer, 1)
    return model, optimizer


def train_step(model: Llama, optimizer: torch.optim.AdamW, sequences: int) -> float:
    """A real optimizer step; seconds."""
    started = time.perf_counter()
    batch = torch.randint(0, model.config.vocab_size, (sequences, 257))
    model(batch[:, :-1], batch[:, 1:]).backward()
    clip_gradients(model, 1.0)
    step_unless(optimizer, torch.zeros(()))
    optimizer.zero_grad()
    return time.perf_counter() - started


def stall(folder: Path, name: str, saves: int) -> dict[str, Any]:
    """Train with saves in the background. The next is due when the one before is committed, so nothing is hidden by it."""
    shape, sequences, every = MODELS[name]
    model, optimizer = make_state(shape)
    plain = [train_step(model, optimizer, sequences) for _ in range(3)]
    writer = saver.Saver(folder / name, CheckpointConfig(keep_last=1), say=lambda line: None)
    stalls, flushes, beside = [], [], []
    for step in range(1, saves + 1):
        started = time.perf_counter()
        writer.save(step, model, optimizer, {"step": step})
        stalls.append(time.perf_counter() - started)
        pending = writer._pending
        assert pending is not None
        while not pending.done():
            beside.append(train_step(model, optimizer, sequences))
        flushes.append(time.perf_counter() - started)
    writer.close()
    between = every * statistics.median(plain)
    typical = statistics.median(stalls)
    slower = (sum(beside) - len(beside) * statistics.median(plain)) / len(stalls)  # hashing and syncing take a core
    return {
        "parameters": count(shape).total,
        "step_s": statistics.median(plain),
        "step_s_while_a_save_is_written": statistics.median(beside),
        "stall_s": stalls,
        "from_save_to_commit_s_at_most": statistics.median(flushes),
        "steps_between_saves": every,
        "seconds_between_saves": between,
        "share": typical / between,
        "share_with_slower_steps": (typical + slower) / between,
        "seconds_between_saves_for_the_limit": typical / LIMIT,
    }


def files(folder: Path, name: str, rounds: int) -> dict[str, Any]:
    """Save, verify and load the same state in three ways, in turns."""
    model, optimizer = make_state(MODELS[name][0])
    fabric = Fabric(accelerator="cpu", devices=1)
    state = {"model": model, "optimizer": optimizer, "step": 1}
    theirs, run_dir = folder / f"{name}.ckpt", folder / f"{name}-files"
    writer = saver.Saver(run_dir, CheckpointConfig(keep_last=1), say=lambda line: None)
    latest = run_dir / "checkpoints" / "step-00000001"
    ways: dict[str, Callable[[], Any]] = {
        "save, cria": lambda: (writer.save(1, model, optimizer, {"step": 1}), writer.wait()),
        "save, fabric": lambda: fabric.save(theirs, state),
        "save, fabric and sync": lambda: (fabric.save(theirs, state), os.sync()),
        "verify, cria": lambda: _none(checkpoint.verify(latest)),
        "load, cria": lambda: checkpoint.load(latest, model, optimizer),
        "load, fabric": lambda: fabric.load(theirs, state),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            if way.startswith("save"):
                for old in [*run_dir.glob("checkpoints/*"), theirs]:
                    subprocess.run(["rm", "-rf", str(old)], check=True)
                os.sync()
            elif not theirs.exists() or not latest.exists():
                ways["save, cria"]()
                fabric.save(theirs, state)
            started = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - started)
    writer.close()
    median = {way: statistics.median(times) for way, times in seconds.items()}
    size = sum(path.stat().st_size for path in latest.rglob("*") if path.is_file())
    return {"bytes": size, "median_s": median, "seconds": seconds}


def _none(problem: str | None) -> None:
    assert problem is None, problem


def start(folder: Path, rounds: int) -> dict[str, Any]:
    """From a new process to the first step, at step 0 and at step 1,000,000 of the same configuration."""
    rng = np.random.default_rng(1)
    source = folder / "data"
    with ShardWriter(source, "shards/0.npy", "uint16") as writer:
        writer.append(rng.integers(0, 4096, 10_000_000).astype(np.uint16))
    (source / "tokenizer").mkdir()
    words = Tokenizer(WordLevel({str(token): token for token in range(4096)}, unk_token="0"))
    words.save(str(source / "tokenizer" / "tokenizer.json"))
    (source / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"bos_token": "1", "eos_token": "2"}))
    shards, info = (writer.shard(source_file="0.txt", documents=1),), load(source / "tokenizer").info
    Manifest("synthetic", "train", info, shards=shards, append_eos=True, prepend_bos=False).save(source)
    tree = yaml.safe_load((Path(__file__).parent.parent / "configs" / "demo.yaml").read_text())
    tree["data"]["sources"] = [{"name": name, "weight": w, "train": str(source)} for name, w in (("a", 7), ("b", 3))]
    tree["train"]["max_steps"] = 2_000_000
    taken: dict[str, list[dict[str, float]]] = {"0": [], "1000000": []}
    for step in taken:
        tree["run_dir"] = str(folder / f"run-{step}")
        path = folder / f"{step}.yaml"
        path.write_text(yaml.safe_dump(tree))
        if step != "0":  # the state of a new run, saved as that of this step
            _start_process(path, "--save_as", step)
        for number in range(rounds + 1):
            parts = _start_process(path)
            if number:  # the first has verified the shards and filled the page cache
                assert parts.pop("step") == int(step) + 1
                taken[step].append(parts)
    return {
        step: {part: statistics.median(t[part] for t in times) for part in times[0]} for step, times in taken.items()
    }


def _start_process(path: Path, *options: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--first_step", str(path), *options]
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(done.stdout.splitlines()[-1])
    if parts:
        parts["python and imports"] = parts.pop("imported_at") - began
        parts["all"] = sum(seconds for part, seconds in parts.items() if part != "step")
    return parts


def first_step(path: Path, save_as: int | None) -> None:
    """What `pretrain train` does up to its first step, timed; or save a run of no steps as one of `save_as`."""
    from pretrain import data, leaving, preparation, trainer

    imported_at, begun = time.time(), time.perf_counter()
    data_s = 0.0

    def timed(call: Callable) -> Callable:
        def wrapper(*args: Any) -> Any:
            nonlocal data_s
            started = time.perf_counter()
            result = call(*args)
            data_s += time.perf_counter() - started
            return result

        return wrapper

    data.open_sources, data.make_mixture = timed(data.open_sources), timed(data.make_mixture)
    preparation._verify_shards = timed(preparation._verify_shards)
    settings = config.load(path)
    read = time.perf_counter()
    run = preparation.prepare(settings)
    prepared = time.perf_counter()
    if save_as is not None:
        run.step = save_as
        writer = saver.Saver(run.run_dir, settings.checkpoint, say=print)
        checkpoint.tensors_of(run.model, run.optimizer)
        train = run.config.train
        display = Display(train.max_steps, run.step, last_step=train.last_step, show=False)
        leaving.save(leaving.Loop(run, Stop(), display, writer))
        writer.close()
        print("{}")
        return
    batches = trainer.make_loader(run)
    first = next(batches)
    loaded = time.perf_counter()
    rest = iter([first, *(next(batches) for _ in range(run.grad_accum_steps - 1))])
    trainer.optimizer_step(run, rest)
    stepped = time.perf_counter()
    parts = {"configuration": read - begun, "data": data_s, "model and checkpoint": prepared - read - data_s}
    parts |= {"first batch, worker included": loaded - prepared, "first step": stepped - loaded}
    print(json.dumps({**parts, "imported_at": imported_at, "step": run.step}))
    del batches


def main() -> int:
    """Measure, print, write; status 1 where a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoints go, on the disk to be measured")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--first_step", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--save_as", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first_step is not None:
        first_step(args.first_step, args.save_as)
        return 0
    result: dict[str, Any] = {**machine(), "stall": {}, "files": {}}
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        for name in args.models:
            result["files"][name] = files(folder, name, args.rounds)
            result["stall"][name] = stall(folder, name, args.rounds)
        result["start"] = start(folder, min(2, args.rounds))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return show(result)


def show(result: dict[str, Any]) -> int:
    """Print the figures as a table, with ratios."""
    for name, s in result["stall"].items():
        print(
            f"{name}: {s['parameters']:,} parameters, a step {s['step_s']:.2f} s ({s['step_s_while_a_save_is_written']:.2f} s "
            f"beside a save); a save stalls {1000 * statistics.median(s['stall_s']):.0f} ms, {100 * s['share']:.2f}% of "
            f"{s['steps_between_saves']} steps, {100 * s['share_with_slower_steps']:.2f}% with the steps that its writer slows; "
            f"3.5% would be a save every {s['seconds_between_saves_for_the_limit']:.1f} s"
        )
    for name, f in result["files"].items():
        print(f"{name}: {f['bytes'] / 2**20:,.0f} MiB")
        for way, seconds in f["median_s"].items():
            plain = f["median_s"].get(way.split(",")[0] + ", fabric")
            print(f"  {way:24} {seconds:7.3f} s" + (f"  {seconds / plain:5.2f} times fabric's" if plain else ""))
    for step, parts in result["start"].items():
        figures = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items())
        print(f"start at step {int(step):,}: {figures}")
    kept = {
        f"a stall of at most {100 * limit:g}% of the time between saves{more}": all(
            s[share] <= limit for s in result["stall"].values()
        )
        for share, limit, more in (
            ("share", STALL_LIMIT, ""),
            ("share_with_slower_steps", LIMIT, ", with slower steps"),
        )
    }
    for words, holds in kept.items():
        print(f"{words}: {'kept' if holds else 'EXCEEDED'}")
    return 0 if all(kept.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
