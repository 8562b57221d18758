"""The loop.

    prepare(config) ─> Run ─> train(run): optimizer_step ... log, validate, save, stop ─> exit status

`prepare` raises what a user can mend. `train` runs to the last step, or until a signal: then all ranks finish the step
they are in, save, and leave. Started again with the same configuration, the run goes on where it was.
"""

import platform
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

import pretrain
from data_prep.shard import TOKENIZER_DIR
from pretrain import checkpoint, config, data, metrics, parallel, validation
from pretrain.model import num_parameters
from pretrain.optim import clip_gradients, learning_rate, make_optimizer, step_if_finite
from pretrain.progress import Display


@dataclass
class Run:
    """What a run consists of. `step` counts finished optimizer steps; everything else stays as it was prepared."""

    config: config.Config
    run_dir: Path
    fabric: Fabric
    model: nn.Module
    optimizer: torch.optim.AdamW
    sources: list[data.Source]
    mixture: data.Mixture
    grad_accum_steps: int
    flops_per_token: dict[str, float]
    log: metrics.MetricsLog
    clock: metrics.Clock
    step: int = 0
    skipped_steps: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Steps of the run that were left out because a gradient was not finite; a scalar on the device."""


def optimizer_step(run: Run, micro_batches: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """One optimizer step. Returns this rank's mean loss and the global gradient norm, scalars on the device.

    Nothing in here waits for the device.
    """
    loss_sum = torch.zeros((), device=run.fabric.device)
    for micro_step in range(run.grad_accum_steps):
        waiting = time.perf_counter()
        batch = next(micro_batches)  # (B, T + 1) int64
        run.clock.data_wait_s += time.perf_counter() - waiting
        batch = batch.to(run.fabric.device, non_blocking=True)
        input_ids, targets = batch[:, :-1], batch[:, 1:]  # (B, T) each

        parallel.reduce_gradients_after(run.model, last=micro_step == run.grad_accum_steps - 1)
        loss = run.model(input_ids, targets) / run.grad_accum_steps
        run.fabric.backward(loss)
        loss_sum += loss.detach()

    grad_norm = clip_gradients(run.model, run.config.optim.max_grad_norm)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step + 1, run.config.optim, run.config.train.max_steps)
    run.skipped_steps += step_if_finite(run.optimizer, grad_norm)
    run.optimizer.zero_grad()
    run.step += 1
    run.clock.steps += 1
    return loss_sum, grad_norm


def train(run: Run) -> int:
    """Train to the last step or until a signal. Returns the process's exit status: 0, or 128 + the signal's number."""
    settings = run.config
    display = Display(settings.train.max_steps, run.step, show=run.fabric.is_global_zero)
    stop = _StopSignal()
    saved_step = run.step
    loader = data.train_loader(
        data.MicroBatches(
            run.sources, run.mixture, settings.data.seq_len, settings.train.micro_batch_size,
            run.fabric.global_rank, run.fabric.world_size,
        ),
        first_step=run.step + 1, last_step=settings.train.max_steps,
        num_workers=settings.data.num_workers, pin=run.fabric.device.type == "cuda",
    )  # fmt: skip
    micro_batches = iter(loader)
    _log_start(run, display)
    if run.step == 0:
        _validate(run, display)
    run.clock.reset()
    while run.step < settings.train.max_steps and not stop.agreed():
        loss, grad_norm = optimizer_step(run, micro_batches)
        display.step(run.step)
        last = run.step == settings.train.max_steps
        if last or run.step % settings.train.log_every == 0:
            _log_step(run, display, loss, grad_norm)
        if _due(run.step, settings.validation.every_steps, last):
            _validate(run, display)
        if _due(run.step, settings.checkpoint.every_steps, last):
            _save(run, display)
            saved_step = run.step
    if saved_step < run.step:
        _save(run, display)
    reason = "finished" if stop.signal is None else signal.Signals(stop.signal).name
    run.log.write("stop", run.step, {"reason": reason})
    run.log.close()
    if stop.signal is not None:
        display.say(f"stopped by {reason} after step {run.step}; the same command goes on from there")
    display.close()
    return 0 if stop.signal is None else 128 + stop.signal


def _due(step: int, every_steps: int, last: bool) -> bool:
    return every_steps > 0 and (last or step % every_steps == 0)


class _StopSignal:
    """SIGINT, SIGTERM and SIGUSR1 ask for a stop after the current step. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._received)

    def _received(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; all ranks get the same answer, and the signal's number."""
        asked = parallel.all_reduce_max(torch.tensor(self.signal or 0))  # on the CPU: the GPU's queue goes on
        self.signal = int(asked) or None
        return self.signal is not None


def _log_start(run: Run, display: Display) -> None:
    """Say what is about to run, before the first step."""
    settings = run.config
    parameters, _ = num_parameters(settings.model)
    tokens_per_step = settings.train.global_batch_size * settings.data.seq_len
    device = parallel.device_name(run.fabric.device)
    record = {
        "world_size": run.fabric.world_size,
        "device": device,
        "parameters": parameters,
        **{f"flops_per_token_{name}": flops for name, flops in run.flops_per_token.items()},
        "max_steps": settings.train.max_steps,
        "tokens_per_step": tokens_per_step,
        "versions": {
            "cria": pretrain.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "lightning")},
        },
        "sources": validation.describe_sources(run.sources, run.mixture, settings.data.seq_len, settings.validation),
    }
    run.log.write("start", run.step, record)
    mixture = ", ".join(f"{s.name} {100 * float(share):.1f}%" for s, share in zip(run.sources, run.mixture.shares))
    display.say(
        f"{parameters:,} parameters on {run.fabric.world_size} x {device}; "
        f"{settings.train.global_batch_size} sequences = {tokens_per_step:,} tokens a step, "
        f"{run.grad_accum_steps} micro-steps of {settings.train.micro_batch_size} sequences; {mixture}"
    )
    if run.step:
        display.say(f"resumed after step {run.step}")


def _log_step(run: Run, display: Display, loss: Tensor, grad_norm: Tensor) -> None:
    """Write a line of metrics: the loss over all ranks of this step alone, so that a resumed run logs the same line.

    The one place where training waits for the device.
    """
    # Every rank counts the same number of tokens a step, so the mean over ranks is the mean over tokens.
    mean = parallel.all_reduce_sum(loss.clone()) / run.fabric.world_size
    figures = torch.stack((mean, grad_norm, run.skipped_steps)).tolist()
    run.clock.pause()
    tokens_per_step = run.config.train.global_batch_size * run.config.data.seq_len
    record = {
        "loss": figures[0],
        "grad_norm": figures[1],
        "lr": run.optimizer.param_groups[0]["lr"],
        "skipped_steps": int(figures[2]),
        "tokens": run.step * tokens_per_step,
        **metrics.train_metrics(
            run.clock, tokens_per_step, run.fabric.world_size, run.flops_per_token, run.fabric.device
        ),
    }
    run.clock.reset()
    run.log.write("train", run.step, record)
    display.train_line(run.step, record)


def _validate(run: Run, display: Display) -> None:
    if run.config.validation.every_steps == 0:
        return
    run.clock.pause()
    losses = validation.losses(
        run.fabric,
        run.model,
        run.sources,
        run.config.data.seq_len,
        run.config.validation,
        run.config.train.micro_batch_size,
    )
    if losses:
        run.log.write("validation", run.step, {"losses": losses})
        figures = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        display.say(f"step {run.step}: validation loss  {figures}")
    run.clock.go_on()


def _save(run: Run, display: Display) -> None:
    run.clock.pause()
    state = {
        "step": run.step,
        "model": asdict(run.config.model),
        "data": _data_fingerprint(run.config, run.sources, run.mixture),
        "tokens_per_source": {
            source.name: drawn * run.config.data.seq_len
            for source, drawn in zip(run.sources, run.mixture.drawn(run.step))
        },
        "world_size": run.fabric.world_size,
        "versions": {"cria": pretrain.__version__, "torch": torch.__version__},
    }
    folder = checkpoint.save(run.run_dir, run.step, parallel.unwrap(run.model), run.optimizer, state)
    if run.fabric.is_global_zero:
        checkpoint.prune(run.run_dir, run.config.checkpoint.keep_last)
    display.say(f"step {run.step}: saved {folder}")
    run.clock.go_on()


def prepare(settings: config.Config) -> Run:
    """Open the data, build the model, and load the newest checkpoint of the run's folder if there is one.

    Raises:
        ValueError, FileNotFoundError: something that the user can mend, in one line.
    """
    run_dir = Path(settings.run_dir)
    sources = data.open_sources(settings.data, settings.model.vocab_size)
    mixture = data.make_mixture(sources, settings.data.seq_len, settings.seed, settings.train.global_batch_size)
    fabric = parallel.launch(settings.parallel, metrics.make_loggers(settings))
    accumulate = config.grad_accum_steps(settings.train, fabric.world_size)
    found = checkpoint.find(run_dir, warn=print)
    if found is not None:
        facts = {"model": asdict(settings.model), "data": _data_fingerprint(settings, sources, mixture)}
        _check_resume(found, checkpoint.read_state(found), facts)
    if fabric.is_global_zero:
        run_dir.mkdir(parents=True, exist_ok=True)
        config.write(settings, run_dir / "config.yaml")
        shutil.copytree(sources[0].train.directory / TOKENIZER_DIR, run_dir / "tokenizer", dirs_exist_ok=True)
    parallel.barrier()

    model = parallel.build(fabric, settings.model, settings.parallel, settings.seed)
    optimizer = make_optimizer(parallel.unwrap(model), settings.optim)
    step, skipped_steps = 0, torch.zeros((), device=fabric.device)
    if found is not None:
        state = checkpoint.load(found, parallel.unwrap(model), optimizer)
        step = state["step"]
        skipped_steps += step - state["updates"]
    flops = metrics.flops_per_token(settings.model, settings.data.seq_len, *num_parameters(settings.model))
    return Run(
        config=settings, run_dir=run_dir, fabric=fabric, model=model, optimizer=optimizer, sources=sources, mixture=mixture,
        grad_accum_steps=accumulate, flops_per_token=flops, log=metrics.MetricsLog(run_dir, fabric),
        clock=metrics.Clock(fabric.device), step=step, skipped_steps=skipped_steps,
    )  # fmt: skip


def _data_fingerprint(settings: config.Config, sources: list[data.Source], mixture: data.Mixture) -> dict[str, Any]:
    """What the order of the data depends on, besides the step."""
    return {
        "seed": settings.seed,
        "seq_len": settings.data.seq_len,
        "global_batch_size": settings.train.global_batch_size,
        "mixture": [[str(share), source.train.manifest.fingerprint] for source, share in zip(sources, mixture.shares)],
    }


def _check_resume(folder: Path, state: dict[str, Any], facts: dict[str, dict[str, Any]]) -> None:
    for part, now in facts.items():
        for key, before in state[part].items():
            if before != now[key]:
                raise ValueError(
                    f"{folder} was trained with {part} {key} = {before} and the configuration says {now[key]}; "
                    "it would not be the same run: go back to that, or give a new run another run_dir"
                )
