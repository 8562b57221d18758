"""What a run writes of itself, and when: a line before the first step, one every `train.log_every` steps.

Run, StepResult ─> sums over the ranks ─> metrics.jsonl, Fabric's loggers, the terminal
"""

from dataclasses import asdict

import torch

from pretrain import backends, config, data, left_out, metrics, pace, parallel, ranks, validation
from pretrain.model import count
from pretrain.progress import Display
from pretrain.run import Run, StepResult
from pretrain.versions import run_versions
from pretrain.watchdog import at


def log_start(run: Run, display: Display) -> None:
    """Say what is about to run, before the first step."""
    settings = run.config
    parameters = count(settings.model).total
    tokens_per_step = settings.train.global_batch_size * settings.data.seq_len
    device = parallel.device_name(run.fabric.device)
    operations = run.llama.operations.choices
    record = {
        "world_size": run.fabric.world_size,
        "device": device,
        "operations": [asdict(choice) for choice in operations],
        "sharding": asdict(run.sharding),
        "parameters": parameters,
        **{f"flops_per_token_{name}": flops for name, flops in run.flops_per_token.items()},
        "max_steps": settings.train.max_steps,
        "leave_out": left_out.in_words(settings.train.leave_out) if settings.train.leave_out else None,
        "init_from": run.taken_up.init_from,
        "branched_from": run.taken_up.branched_from,
        "tokens_per_step": tokens_per_step,
        "versions": run_versions(),
        "sources": validation.describe_sources(
            run.sources, run.mixture, run.step + 1, settings.data.seq_len, settings.validation
        )
        if run.fabric.is_global_zero  # it reads the validation data, for a log that rank 0 alone writes
        else {},
        "validation_sets": validation.describe_sets(run.sets, settings.data.seq_len, settings.validation)
        if run.fabric.is_global_zero
        else {},
    }
    run.log.write("start", run.step, record)
    about = {name: record[name] for name in ("parameters", "world_size", "device", "tokens_per_step")}
    run.log.describe({**config.flat(asdict(settings)), **about, **run_versions()})
    mixture = ", ".join(
        f"{s.name} {100 * float(share):.1f}%" for s, share in zip(run.sources, run.mixture.shares_at(run.step + 1))
    )
    display.say(
        f"{parameters:,} parameters on {run.fabric.world_size} x {device}; "
        f"{settings.train.global_batch_size} sequences = {tokens_per_step:,} tokens a step, "
        f"{run.grad_accum_steps} micro-steps of {settings.train.micro_batch_size} sequences; {mixture}"
    )
    display.say(backends.table(operations))
    display.say(str(run.sharding))
    if run.step:
        display.say(f"resumed after step {run.step}")


def log_step(run: Run, display: Display, result: StepResult) -> str | None:
    """Write a line of metrics: the loss over all ranks of this step alone, so that a resumed run logs the same line.

    The one place where a step waits for the device, and once. Returns, on all ranks, why the run must not go on, where too many
    steps in a row had no gradient that could be used.
    """
    at("metrics", run.step)
    # Every rank counts the same number of tokens a step, so the mean over ranks is the mean over tokens.
    mean = ranks.all_reduce_sum(result.loss.clone()) / run.fabric.world_size
    data_hash = ranks.all_reduce_sum(torch.tensor(result.data_hash % 2**63)).numpy()  # on the CPU; overflow wraps
    figures = torch.stack((mean, result.grad_norm, run.skipped_steps, run.skipped_in_a_row)).tolist()
    run.clock.pause(finished=True)
    tokens_per_step = run.config.train.global_batch_size * run.config.data.seq_len
    record = {
        "loss": figures[0],
        "grad_norm": figures[1],
        "lr": run.optimizer.param_groups[0]["lr"],
        "skipped_steps": int(figures[2]),
        "data_hash": data.data_hash_in_words(int(data_hash)),
        "tokens": sum(run.tokens_per_source().values()),
        **metrics.train_metrics(
            run.clock, tokens_per_step, run.fabric.world_size, run.flops_per_token, run.fabric.device
        ),
    }
    run.log.write("train", run.step, record)
    display.train_line(run.step, record)
    for slow in run.comparison.add(run.clock.steps, run.clock.train_s, run.clock.data_wait_s, run.clock.work_s):
        run.log.write("straggler", run.step, slow)
        display.say(pace.words(slow))
    run.clock.reset()
    if figures[3] < run.config.train.max_skipped_steps:
        return None
    return (
        f"the gradient was not finite, or 0, in the last {int(figures[3])} steps up to step {run.step}, where its norm was "
        f"{figures[1]:g} (train.max_skipped_steps {run.config.train.max_skipped_steps}); nothing was updated in them. Their "
        f"documents: pretrain order --config {run.run_dir / 'config.yaml'} --step {run.step}"
    )
