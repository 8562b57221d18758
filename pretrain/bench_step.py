"""Times the real training step: what `pretrain train` prepares, loads and does, on random tokens or the run's own.

    Config ─> with_random_data (ids in a real dataset) ─> preparation.prepare ─> Run
           ─> optimizer_step x warm-up, timed ─> a profiled window ─> one row of figures

Under torchrun every rank calls `measure`; a step takes as long as its slowest rank.
"""

import hashlib
import json
import math
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.shard import TOKENIZER_DIR, Manifest, ShardWriter, TokenizerInfo, folder_fingerprint, token_dtype
from pretrain import bench_profile, bench_timing, data, memory, metrics, parallel, preparation, ranks, trainer
from pretrain.hosts import this_host
from pretrain.sections import Config, SourceConfig

PROFILED_STEPS = 2
"""Length of the window that is profiled, after the timed steps (steps)."""


RANDOM_SEQUENCES = 256
"""Size of the random dataset, which is gone through as often as need be (sequences)."""


@dataclass(frozen=True)
class Timing:
    """What is timed, and how."""

    steps: int = 15
    """Timed steps; the figure is their median."""
    warmup: int = 5
    """Steps before them: compilation, autotuning, the allocator."""
    real_data: bool = False
    """Train on the configuration's own sources; else on uniformly random ids."""
    memory_limit_gib: float | None = None
    """Play a GPU with so much memory (GiB)."""
    trace: Path | None = None
    """File to write the trace of a window to, which is then profiled even where nothing is communicated (path)."""
    in_turns: bool = False
    """Wait for a line on standard input before each step."""
    of_micro_steps: int | None = None
    """Number of micro-steps in the step that the figures describe. If fewer are timed, they must be `MICRO_STEPS`, and each
    missing one counts as long as the second. None: as many as are timed."""
    scratch: Path | None = None
    """Folder for what is needed meanwhile, which somebody else removes (path); None: temporary ones of its own."""


def measure(settings: Config, timing: Timing) -> dict[str, Any]:
    """Time the step that `settings` describes; returns a row. Out of memory is a row with a `problem`.

    Durations are those of the slowest rank and memory that of the fullest, the same on all ranks; the share of waiting for
    data, what is as logged, and the profile are each rank's own.

    Raises:
        ValueError, OSError: something that the user can mend, in one line.
    """
    with _scratch(settings, timing) as changed:
        device = _device(changed)
        try:
            bench_timing.limit_memory(device, timing.memory_limit_gib)
            run = preparation.prepare(changed, saves=False)
            with run.at_end as at_end:
                at_end.callback(run.log.close)
                row = _time(run, timing)
        except (RuntimeError, MemoryError) as error:
            problem = bench_timing.out_of_memory(error)
            if problem is None:
                raise
            return {"problem": problem, **bench_timing.memory(device)}
    over_limit = bench_timing.over_limit(device, row["peak_mem_gib"], timing.memory_limit_gib)
    return {"problem": _untrained(row) or over_limit, **row}


def _untrained(row: dict[str, Any]) -> str | None:
    """Why the steps that were timed are none: what trains nothing may be as fast as it likes."""
    if row["skipped_steps"]:
        return f"trains nothing: {row['skipped_steps']} updates were skipped, for their gradient was 0 or not finite"
    return None if math.isfinite(row["last_loss"]) else f"trains nothing: its last loss is {row['last_loss']}"


def _device(settings: Config) -> torch.device:
    """Where `parallel.launch` will put this rank; a limit on memory must be set before anything is there."""
    if not bench_timing.on_gpu(settings.parallel.accelerator):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _time(run: trainer.Run, timing: Timing) -> dict[str, Any]:
    device, world_size = run.fabric.device, run.fabric.world_size
    timer = bench_timing.Timer(device, timing.in_turns)
    micro_batches = trainer.make_loader(run)
    if timing.of_micro_steps is not None:
        micro_batches = timer.marked(micro_batches)
    results = []
    for step in timer.steps(timing.warmup, timed=False):
        if step == timing.warmup - 1:  # behind the compilation
            run.clock.pause()
            run.clock.reset()
        results.append(trainer.optimizer_step(run, micro_batches))
    run.clock.pause()
    _say_how_long(run, timing)
    run.clock.reset()
    for _ in timer.steps(timing.steps, timed=True):
        results.append(trainer.optimizer_step(run, micro_batches))
    run.clock.pause()
    skipped = int(run.skips.total)
    speed = _speed(run, timing, timer)
    used = bench_timing.memory(device)  # before the profiler, which needs some itself
    used = dict(zip(used, _largest(list(used.values()))))
    mean_losses = (ranks.all_reduce_sum(torch.stack([result.loss for result in results])) / world_size).tolist()
    run.fabric.print(f"timed: {speed['tokens_per_sec_per_gpu']:,.0f} tokens/s/GPU")  # whatever becomes of the profile
    window: dict[str, Any] = {"communication_pct": 0.0, "exposed_communication_pct": 0.0}
    if world_size > 1 or timing.trace is not None:
        trace = timing.trace if ranks.rank() == 0 else None
        try:
            window = bench_profile.profile_steps(
                device, lambda: trainer.optimizer_step(run, micro_batches), PROFILED_STEPS, trace
            )
        except Exception as error:  # the steps that were timed stay
            run.fabric.print(f"no profile: {type(error).__name__}: {error}")
    return {
        **speed,
        **window,
        **used,
        "first_loss": mean_losses[0],
        "last_loss": mean_losses[-1],
        "first_grad_norm": results[0].grad_norm.item(),
        "skipped_steps": skipped,
        "world_size": world_size,
        "device": parallel.device_name(device),
        "flops_per_token": run.flops_per_token,
        "planned_mem_gib": _planned_mem_gib(run) if device.type == "cuda" else None,
        "backends": _backends(run),
        "kernels": {one.operation: f"{one.kernel} ({one.why})" for one in run.llama.operations.choices},
    }


def _speed(run: trainer.Run, timing: Timing, timer: bench_timing.Timer) -> dict[str, Any]:
    """The figures of a step of `of_micro_steps`; its spread, `seconds` and waiting for data are the timed step's."""
    device, timed = run.fabric.device, run.grad_accum_steps
    micro_steps = timing.of_micro_steps or timed
    assert micro_steps == timed or micro_steps > timed == bench_timing.MICRO_STEPS
    seconds = _largest(timer.seconds())
    between = _largest(timer.micro_step_seconds(1)) if micro_steps > timed else []
    further_s = (micro_steps - timed) * statistics.median(between) if between else 0.0
    tokens_per_step = run.config.train.global_batch_size // timed * micro_steps * run.config.data.seq_len

    def rates(step_time_s: float) -> dict[str, float | None]:
        return metrics.throughput(tokens_per_step, step_time_s, run.fabric.world_size, run.flops_per_token, device)

    step_time_s = statistics.median(seconds)
    row = {
        **rates(step_time_s + further_s),
        "step_time_s": step_time_s + further_s,
        "step_time_spread_pct": 100 * (max(seconds) - min(seconds)) / step_time_s,
        "tokens_per_step": tokens_per_step,
        "grad_accum_steps": micro_steps,
        "timed_micro_steps": timed,
        "seconds": seconds,
        "second_micro_step_seconds": between,
    }
    if timing.in_turns:  # the run's clock has counted the turns of the others
        return row
    logged_s = run.clock.train_s / run.clock.steps + further_s
    row["as_logged_tokens_per_sec_per_gpu"] = rates(logged_s)["tokens_per_sec_per_gpu"]
    row["data_wait_pct"] = 100 * run.clock.data_wait_s / run.clock.train_s
    return row


def _largest(figures: list[float]) -> list[float]:
    """Each figure of the rank that has the most of it."""
    return ranks.all_reduce_max(torch.tensor(figures, dtype=torch.float64)).tolist()


def _backends(run: trainer.Run) -> dict[str, str]:
    """Operation -> the library that computes it."""
    return {choice.operation: choice.backend for choice in run.llama.operations.choices}


def _planned_mem_gib(run: trainer.Run) -> float | None:
    """What `pretrain plan` says of the tensors at the peak (GiB), to be held against what was measured; None: it cannot say.

    So it is for a step of one micro-step: at its peak there are no gradients of earlier ones, as there are in a run.
    """
    settings, gpus = run.config.parallel, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if settings.cpu_offload or run.grad_accum_steps == 1:
        return None
    nodes, micro_batch_size = run.fabric.world_size // gpus, run.config.train.micro_batch_size
    layout = memory.Layout.of(settings, run.sharding, nodes, gpus, micro_batch_size, run.grad_accum_steps)
    layout = replace(layout, fused_swiglu=_backends(run)["swiglu"] == "liger")
    planned = memory.memory(run.config.model, run.config.data.seq_len, layout)
    return (planned.total - planned.context - planned.fragmentation) / 2**30


def _say_how_long(run: trainer.Run, timing: Timing) -> None:
    """A step of millions of tokens on one GPU takes half a minute; nobody should have to guess."""
    seconds = run.clock.train_s / run.clock.steps
    if seconds * timing.steps > 60 and run.grad_accum_steps > 2 and timing.warmup > 1:  # the first compiles
        run.fabric.print(
            f"a step of {run.grad_accum_steps} micro-steps takes {seconds:.1f} s; {timing.steps} more follow. For a quick look: "
            "--grad_accum_steps 2 (with 1 no gradients of earlier micro-steps are there at the peak of memory)"
        )


_CALL = ("SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
"""What the ranks of a call have in common, and no other call that runs at the same time has, all together."""


@contextmanager
def _scratch(settings: Config, timing: Timing) -> Iterator[Config]:
    """`settings` as a run that leaves nothing: a run folder that is removed, no checkpoints, no validation, no loggers."""
    with tempfile.TemporaryDirectory(prefix="cria-bench-", dir=timing.scratch) as own:  # on this rank's node
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        run_dir = Path(own) / "run" if world_size == 1 else _shared(settings, timing, world_size)
        if not timing.real_data:
            settings = with_random_data(settings, Path(own) / "data")
        last_step = timing.warmup + timing.steps + PROFILED_STEPS
        try:
            yield replace(
                settings,
                run_dir=str(run_dir),
                logger="none",
                resume=None,
                data=replace(settings.data, verify="sizes"),
                # Steps 1 to last_step, whatever the run leaves out or ends after.
                train=replace(
                    settings.train, max_steps=max(settings.train.max_steps, last_step), stop_after_step=0, leave_out=[]
                ),
                validation=replace(settings.validation, every_steps=0, sets=[]),
                checkpoint=replace(settings.checkpoint, every_steps=0),
            )
        finally:
            if os.environ.get("RANK", "0") == "0":
                shutil.rmtree(run_dir, ignore_errors=True)


def _shared(settings: Config, timing: Timing, world_size: int) -> Path:
    """A run folder of this call's own, which its ranks name alike before they are connected.

    Those of several nodes need one that they share; where the run's folder lies is such a file system.
    """
    call = [os.environ.get(name, "") for name in _CALL]
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):  # "localhost" is the address on every node
        call.append(this_host())
    name = f"run-{hashlib.sha256(repr(call).encode()).hexdigest()[:12]}"
    return (timing.scratch or Path(f"{settings.run_dir}-bench")) / name


def with_random_data(settings: Config, folder: Path) -> Config:
    """`settings` with one source as its only data: uniformly random ids, written to `folder`, the same each time; a word each.

    Never zeros: a GPU computes faster, and draws less power, on data that are all the same.
    """
    vocab_size = settings.model.vocab_size
    tokens = RANDOM_SEQUENCES * settings.data.seq_len + 1
    ids = np.random.default_rng(settings.seed).integers(0, vocab_size, tokens)
    with ShardWriter(folder, "shards/random.npy", token_dtype(vocab_size), durable=False) as writer:
        writer.append(ids)
    words = folder / TOKENIZER_DIR  # so that a run can be trained on it, and exported
    words.mkdir(exist_ok=True)
    vocabulary = {"type": "WordLevel", "vocab": {str(i): i for i in range(vocab_size)}, "unk_token": "0"}
    (words / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": vocabulary}))
    (words / "tokenizer_config.json").write_text(json.dumps({"eos_token": str(vocab_size - 1)}))
    info = TokenizerInfo(folder_fingerprint(words), "huggingface", vocab_size, None, vocab_size - 1)
    shards = (writer.shard(source_file="random", documents=1),)
    Manifest("random", "train", info, append_eos=True, prepend_bos=False, shards=shards).save(folder)
    return replace(
        settings,
        data=replace(settings.data, sources=[SourceConfig("random", str(folder))], stages=[]),
        validation=replace(settings.validation, sets=[]),
    )


def batches(settings: Config, steps: int) -> torch.Tensor:
    """What a run on one rank trains on first, in its loader's order: (steps, global_batch_size, T + 1) int64."""
    sources = data.open_sources(settings.data, settings.model.vocab_size)
    mixture = data.make_mixture(sources, settings.data, settings.seed, settings.train.global_batch_size)
    loaded = data.MicroBatches(sources, mixture, settings.data.seq_len, settings.train.micro_batch_size, 0, 1)
    per_step = loaded.grad_accum_steps
    return (
        torch.stack([loaded[item][0] for item in range(steps * per_step)]).unflatten(0, (steps, per_step)).flatten(1, 2)
    )
