"""The step, and the loop around it.

    prepare(config) ─> Run ─> train(run): optimizer_step ─> log, validate, save, each where it is due ─> leave ─> exit status

`train` runs to the last step, or until a stop is asked for (`scheduler`: a signal, the end of the job's time): then all ranks
finish the step they are in, save, and leave. Started again with the same configuration, the run goes on where it was
(`preparation` sees to that). `at` tells the watchdog where this rank is.
"""

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from pretrain import data, left_out, logbook, ranks, validation
from pretrain.leaving import Loop, check, leave, log_saves, save
from pretrain.optim import clip_gradients, learning_rate, set_learning_rate, step_unless, updates
from pretrain.progress import Display
from pretrain.run import Run, StepResult
from pretrain.saver import Saver
from pretrain.scheduler import TAKEN, UNSAVED, Stop
from pretrain.sections import StepRange
from pretrain.sharding import before_micro_step
from pretrain.watchdog import at, first_step_done

_RANKS_AGREE = 128
"""Fewer ranks than this agree before every step: it takes them ten milliseconds, by gloo's ring, beside the GPU's work. From
here on they agree before every second, from twice as many on before every third step, and so on."""


def optimizer_step(run: Run, micro_batches: Iterator[data.MicroBatch]) -> StepResult:
    """One optimizer step. Nothing of ours in here waits for the device; some libraries' operations do (`kernels`).

    Raises:
        OSError: its data cannot be read; nothing of it has reached the weights.
    """
    mean_loss = torch.zeros((), device=run.fabric.device)
    data_hash = 0
    for micro_step in range(run.grad_accum_steps):
        input_ids, targets, batch_hash = next_micro_batch(run, micro_batches)  # (B, T) int64 each
        data_hash += batch_hash

        at("forward and backward", run.step + 1)
        before_micro_step(run.llama, run.sharding, last=micro_step == run.grad_accum_steps - 1)
        loss = run.model(input_ids, targets) / run.grad_accum_steps
        run.fabric.backward(loss)
        mean_loss += loss.detach()

    at("clipping and update", run.step + 1)
    grad_norm = clip_gradients(run.model, run.config.optim.max_grad_norm)
    set_learning_rate(run.optimizer, learning_rate(run.step + 1, run.config.optim, run.config.train.max_steps))
    skipped = run.skips.judge(grad_norm)
    step_unless(run.optimizer, skipped)
    run.optimizer.zero_grad()
    run.count_step()
    return StepResult(run.step, mean_loss, grad_norm, skipped, data_hash)


def next_micro_batch(run: Run, micro_batches: Iterator[data.MicroBatch]) -> tuple[Tensor, Tensor, int]:
    """Tokens and the tokens that follow them, (B, T) int64 each, on the device, and their sequences' `data_hash`."""
    at("waiting for data", run.step + 1)
    waiting = time.perf_counter()
    batch, batch_hash = next(micro_batches)  # (B, T + 1) int64
    run.clock.data_wait_s += time.perf_counter() - waiting
    batch = batch.to(run.fabric.device, non_blocking=True)
    return batch[:, :-1], batch[:, 1:], batch_hash


def train(run: Run, stop: Stop | None = None) -> int:
    """Train to the last step or until a stop is asked for. Returns the process's exit status: 0, or `stop.status`; LATER where
    what was trained last could not be saved.

    Raises:
        FloatingPointError: `train.max_skipped_steps` updates were skipped, or weights are broken.
        OSError: the data cannot be read.
    """
    settings = run.config.train
    display = Display(settings.max_steps, run.step, last_step=settings.last_step, show=run.fabric.is_global_zero)
    with run.at_end as at_end:  # whatever happens: the terminal as it was, the log closed, the run's folder released
        at_end.callback(data.stop_waiting, data.datasets(run.sources, run.sets))
        at_end.callback(display.close)
        at_end.callback(run.log.close)
        at("starting")
        stop = stop or Stop()
        stop.listen_to_ctrl_c()
        saver = Saver(run.run_dir, run.config.checkpoint, display.say, run.step, run.config.branch_point)
        at_end.callback(log_saves, run, saver)
        if run.fabric.world_size == 1:  # one of several that fails would wait for the others' part of the save
            at_end.callback(saver.wait)  # before the folder is free for another job
        return _train(Loop(run, stop, display, saver))


def _train(loop: Loop) -> int:
    """Step after step, and what is due after each, until the last one or until the ranks agree to stop."""
    run, settings = loop.run, loop.run.config
    micro_batches = make_loader(run)
    logbook.log_start(run, loop.display)
    if (run.step == 0 or run.taken_up.branches) and not _stop_agreed(loop):
        _validate(loop)
    run.clock.reset()
    while run.step < settings.train.last_step and not _stop_agreed(loop):
        loop.unlogged.append(_step(loop, micro_batches))
        if _due(run, settings.train.log_every):
            _log(loop)
        if _due(run, settings.validation.every_steps):
            _validate(loop)
        if loop.stop.save_now or _due(run, settings.checkpoint.every_steps) or run.step == settings.branch_point:
            save(loop)
        log_saves(run, loop.saver)
    logbook.flush_steps(run, loop.unlogged)
    return leave(loop)


def _due(run: Run, every_steps: int) -> bool:
    """Whether what is done every so many steps, and after the last one, is to be done now; 0: never."""
    last = run.step == run.config.train.last_step
    return every_steps > 0 and (last or run.step % every_steps == 0)


def _step(loop: Loop, micro_batches: Iterator[data.MicroBatch]) -> StepResult:
    """The next step that is not left out; where its data cannot be read, what was trained before is saved."""
    run = loop.run
    _pass_over(loop)
    try:
        result = optimizer_step(run, micro_batches)
    except OSError:  # nothing of this step has reached the weights
        alone = run.fabric.world_size == 1  # of several ranks the others wait in the backward
        if alone and loop.saver.step < run.step:
            save(loop)
        raise
    except torch.OutOfMemoryError as error:
        batch = f"train.micro_batch_size {run.config.train.micro_batch_size} of {run.config.data.seq_len} tokens"
        error.add_note(f"{batch}: a smaller one, or parallel.recompute mlp, takes less; pretrain plan names what fits")
        raise
    first_step_done()
    loop.display.step(run.step)
    return result


def _pass_over(loop: Loop) -> None:
    """Count the steps that are left out before the next one that is trained, and say so."""
    run, finished = loop.run, loop.run.step
    run.step = next(left_out.spans(finished, run.config.train.last_step, run.config.train.leave_out))[0]
    if run.step > finished:
        loop.display.say(f"left out, by train.leave_out: {left_out.in_words([StepRange(finished + 1, run.step)])}")


def _log(loop: Loop) -> None:
    """Write the lines of metrics of the steps since the last ones; raises on all ranks where too many of them updated nothing."""
    run = loop.run
    problem = logbook.log_line(run, loop.display, loop.unlogged)
    loop.unlogged.clear()
    if problem is None:
        return
    # Without a new update every restart would save equal weights, and pruning would drop older, good ones.
    if updates(run.optimizer) > run.taken_up.updates:
        save(loop)
    else:
        check(loop)  # broken weights have no gradient either, and no documents are to blame
    try:
        loop.saver.close()
    except OSError as error:
        problem += f"; and {error}"
    raise FloatingPointError(problem)


def make_loader(run: Run) -> Iterator[data.MicroBatch]:
    """The rank's micro-batches from the next step on to the last, but for steps that are left out."""
    settings, rank, world_size = run.config, run.fabric.global_rank, run.fabric.world_size
    micro_batches = data.MicroBatches(
        run.sources, run.mixture, settings.data.seq_len, settings.train.micro_batch_size, rank, world_size
    )
    spans = left_out.spans(run.step, settings.train.last_step, settings.train.leave_out)
    steps = (step for finished, last in spans for step in range(finished + 1, last + 1))
    return data.train_loader(micro_batches, steps, settings.data.num_workers, run.fabric.device)


def _stop_agreed(loop: Loop) -> bool:
    """Whether any rank was asked to stop; all ranks get the same answer, and the reason, and whether to save after this step."""
    run, stop, saver = loop.run, loop.stop, loop.saver
    if run.step % (1 + run.fabric.world_size // _RANKS_AGREE):
        stop.save_now = False
        return False
    at("agreeing on whether to stop", run.step)
    settings = run.config.train
    mine = stop.asked(saver.longest_s, settings.max_hours, settings.stop_margin_s)
    mine = TAKEN if saver.taken else UNSAVED if saver.given_up() else mine
    for line in stop.warnings(saver.longest_s, settings.stop_margin_s):
        loop.display.say(line)
    agreed = ranks.all_reduce_max(torch.tensor([mine, saver.overdue()]))  # on the CPU: the GPU's queue goes on
    stop.reason, stop.save_now = int(agreed[0]), bool(agreed[1])
    return stop.reason != 0


def _validate(loop: Loop) -> None:
    run, settings = loop.run, loop.run.config
    if settings.validation.every_steps == 0:
        return
    at("validation", run.step)
    run.clock.pause()
    losses = validation.losses(
        run.fabric,
        run.model,
        data.validated(run.sources, run.sets),
        settings.data.seq_len,
        settings.validation,
        settings.train.micro_batch_size,
    )
    if losses:
        logbook.log_validation(run, loop.display, losses)
        if not all(map(math.isfinite, losses.values())):
            check(loop)
    run.clock.go_on()
