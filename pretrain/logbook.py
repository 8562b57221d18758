"""What a run writes of itself, and when: a line before the first step, one every `train.log_every` steps.

Run, StepResult ─> sums over the ranks ─> metrics.jsonl, Fabric's loggers, the terminal
"""

from dataclasses import asdict
from typing import Any

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
    sources, sets = dict[str, Any](), dict[str, Any]()
    if run.fabric.is_global_zero:  # it reads the validation data, for a log that rank 0 alone writes
        T, validated = settings.data.seq_len, settings.validation
        sources = validation.describe_sources(run.sources, run.mixture, run.step + 1, T, validated)
        sets = validation.describe_sets(run.sets, T, validated)
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
        "sources": sources,
        "validation_sets": sets,
    }
    run.log.write("start", run.step, record)
    described = {**sources, **sets}
    run.bytes_per_token = {name: of["bytes_per_token"] for name, of in described.items() if of["bytes_per_token"]}
    about = {name: record[name] for name in ("parameters", "world_size", "device", "tokens_per_step")}
    run.log.describe({**config.flat(asdict(settings)), **about, **run_versions()})
    mixture = ", ".join(
        f"{s.name} {100 * float(share):.1f}%" for s, share in zip(run.sources, run.mixture.shares_at(run.step + 1))
    )
    display.say(
        f"{parameters:,} parameters on {run.fabric.world_size} x {device}; "
        f"{settings.train.global_batch_size} sequences = {tokens_per_step:,} tokens a step, "
        f"micro-steps of {settings.train.micro_batch_size} sequences: {run.grad_accum_steps} a step; {mixture}"
    )
    display.say(backends.table(operations))
    display.say(str(run.sharding))
    if run.step:
        display.say(f"resumed after step {run.step}")


def log_line(run: Run, display: Display, results: list[StepResult]) -> str | None:
    """Write a line of metrics of the last step and, where they are more than one, before it one of all `results`, which are the
    steps since the last lines.

    Figures are each step's own, over all ranks, so that a resumed run logs the same ones. Waits for the device, once. Returns, on
    all ranks, why the run must not go on, where too many updated nothing.
    """
    at("metrics", run.step)
    data_hash = ranks.all_reduce_sum(torch.tensor(results[-1].data_hash % 2**63)).numpy()  # on the CPU; overflow wraps
    losses, grad_norms, skipped, (total, too_many) = _figures(run, results)
    run.clock.pause(finished=True)
    tokens_per_step = run.config.train.global_batch_size * run.config.data.seq_len
    record = {
        "loss": losses[-1],
        "grad_norm": grad_norms[-1],
        "lr": run.optimizer.param_groups[0]["lr"],
        "skipped_steps": int(total),
        "data_hash": data.data_hash_in_words(int(data_hash)),
        "tokens": sum(run.tokens_per_source().values()),
        **metrics.train_metrics(
            run.clock, tokens_per_step, run.fabric.world_size, run.flops_per_token, run.fabric.device
        ),
    }
    if len(results) > 1:
        _write_steps(run, results, losses, grad_norms, skipped)
    run.log.write("train", run.step, record)
    display.train_line(run.step, record)
    for slow in run.comparison.add(run.clock.steps, run.clock.train_s, run.clock.data_wait_s, run.clock.work_s):
        run.log.write("straggler", run.step, slow)
        display.say(pace.words(slow))
    run.clock.reset()
    norms = {one.step: norm for one, norm, it in zip(results, grad_norms, skipped) if it}
    if norms:
        display.say(f"nothing was updated in step {_in_words(norms)}; {int(total)} such steps in all")
    return _too_many(run, norms) if too_many and norms else None


def _in_words(norms: dict[int, float]) -> str:
    """norms: of the steps that updated nothing."""
    said = [f"{step} (gradient norm {norm:.4g})" for step, norm in norms.items()]
    return ", ".join(said[:5]) + (f" and {len(said) - 5} more" if len(said) > 5 else "")


def _too_many(run: Run, norms: dict[int, float]) -> str:
    last, norm = max(norms.items())
    ratio = run.config.optim.skip_grad_norm_above
    outliers = f", 0, or above optim.skip_grad_norm_above {ratio:g} times the usual one" if ratio else ", or 0"
    return (
        f"too many of the last steps up to step {last}, whose gradient norm was {norm:.4g}, updated nothing "
        f"(train.max_skipped_steps {run.config.train.max_skipped_steps}): norms that are not finite{outliers}. Their documents: "
        f"pretrain order --config {run.run_dir / 'config.yaml'} --step {last}; from a checkpoint before them, train.leave_out "
        "leaves them out"
    )


def log_validation(run: Run, display: Display, losses: dict[str, float]) -> None:
    """losses: of each source and set, in nats a token."""
    known = {name: n for name, n in run.bytes_per_token.items() if name in losses}
    bits = {name: validation.bits_per_byte(losses[name], n) for name, n in known.items()}
    run.log.write("validation", run.step, {"losses": losses, "bits_per_byte": bits})
    figures = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    display.say(f"step {run.step}: validation loss  {figures}")


def flush_steps(run: Run, results: list[StepResult]) -> None:
    """Write what is known of the steps since the last line of metrics, where a run ends between two, or may be taken up again."""
    if results:
        losses, grad_norms, skipped, _ = _figures(run, results)
        _write_steps(run, results, losses, grad_norms, skipped)


def _figures(run: Run, results: list[StepResult]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Of each step: its loss over all ranks, its gradient norm, 1.0 where nothing was updated; then of all of the run how often
    that was, and whether too often. Waits for the device, once.
    """
    at("metrics", run.step)
    device, skips = run.fabric.device, run.skips
    columns = [[one.loss for one in results], [one.grad_norm for one in results], [one.skipped for one in results]]
    columns.append([skips.total, skips.too_many])
    # parallel.cpu_offload clips, and judges, on the host
    found = torch.stack([scalar.to(device) for column in columns for scalar in column]).tolist()
    n = len(results)
    # Every rank counts the same number of tokens a step, so the mean over ranks is the mean over tokens.
    return ranks.means(found[:n]), found[n : 2 * n], found[2 * n : 3 * n], found[3 * n :]


def _write_steps(
    run: Run, results: list[StepResult], losses: list[float], grad_norms: list[float], skipped: list[float]
) -> None:
    """A line of all of them, with six digits; the line of the last one has its figures in full."""
    columns = {
        "steps": [one.step for one in results],
        "step_losses": [_six_digits(loss) for loss in losses],
        "grad_norms": [_six_digits(norm) for norm in grad_norms],
        "skipped": [one.step for one, it in zip(results, skipped) if it],
    }
    run.log.write("steps", run.step, columns)


def _six_digits(number: float) -> float:
    return float(f"{number:.6g}")
