"""The step, and the loop around it.

    prepare(config) ─> Run ─> train(run): optimizer_step ... log, validate, save, stop ─> exit status

`train` runs to the last step, or until a stop is asked for (`scheduler`: a signal, the end of the job's time): then all ranks
finish the step they are in, save, and leave. Started again with the same configuration, the run goes on where it was
(`preparation` sees to that). `at` tells the watchdog where this rank is.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from pretrain import data, logbook, parallel, ranks, validation
from pretrain.hosts import this_host
from pretrain.optim import clip_gradients, learning_rate, set_learning_rate, step_if_usable
from pretrain.progress import Display
from pretrain.run import Run, StepResult
from pretrain.saver import Saver
from pretrain.scheduler import LATER, OUT_OF_TIME, TAKEN, UNSAVED, Stop
from pretrain.sharding import before_micro_step
from pretrain.versions import run_versions
from pretrain.watchdog import alive, at, first_step_done


def optimizer_step(run: Run, micro_batches: Iterator[data.MicroBatch]) -> StepResult:
    """One optimizer step. Nothing of ours in here waits for the device; some libraries' operations do (`kernels`)."""
    loss_sum = torch.zeros((), device=run.fabric.device)
    data_hash = 0
    for micro_step in range(run.grad_accum_steps):
        input_ids, targets, fingerprint = next_micro_batch(run, micro_batches)  # (B, T) int64 each
        data_hash += fingerprint

        at("forward and backward", run.step + 1)
        before_micro_step(parallel.unwrap(run.model), run.sharding, last=micro_step == run.grad_accum_steps - 1)
        loss = run.model(input_ids, targets) / run.grad_accum_steps
        run.fabric.backward(loss)
        loss_sum += loss.detach()

    at("clipping and update", run.step + 1)
    grad_norm = clip_gradients(run.model, run.config.optim.max_grad_norm)
    set_learning_rate(run.optimizer, learning_rate(run.step + 1, run.config.optim, run.config.train.max_steps))
    skipped = step_if_usable(run.optimizer, grad_norm)
    run.optimizer.zero_grad()
    run.count_step(skipped)
    return StepResult(loss_sum, grad_norm.to(loss_sum.device), data_hash)  # parallel.cpu_offload clips on the host


def next_micro_batch(run: Run, micro_batches: Iterator[data.MicroBatch]) -> tuple[Tensor, Tensor, int]:
    """Tokens and the tokens that follow them, (B, T) int64 each, on the device, and their sequences' fingerprint."""
    at("waiting for data", run.step + 1)
    waiting = time.perf_counter()
    batch, fingerprint = next(micro_batches)  # (B, T + 1) int64
    run.clock.data_wait_s += time.perf_counter() - waiting
    batch = batch.to(run.fabric.device, non_blocking=True)
    return batch[:, :-1], batch[:, 1:], fingerprint


def train(run: Run, stop: Stop | None = None) -> int:
    """Train to the last step or until a stop is asked for. Returns the process's exit status: 0, or `stop.status`; LATER where
    what was trained last could not be saved.

    Raises:
        FloatingPointError: `train.max_skipped_steps` steps in a row had no gradient that could be used.
        OSError: the data cannot be read.
    """
    display = Display(run.config.train.max_steps, run.step, show=run.fabric.is_global_zero)
    with run.at_end as at_end:  # whatever happens: the terminal as it was, the log closed, the run's folder released
        at_end.callback(data.leave, run.sources)
        at_end.callback(display.close)
        at_end.callback(run.log.close)
        return _train(run, stop or Stop(), display)


def _train(run: Run, stop: Stop, display: Display) -> int:
    settings = run.config
    at("starting")
    stop.listen_to_ctrl_c()
    saver = Saver(run.run_dir, settings.checkpoint, say=display.say)
    run.at_end.callback(_log_saves, run, saver)
    if run.fabric.world_size == 1:  # one of several that fails would wait for the others' part of the save
        run.at_end.callback(saver.wait)  # before the folder is free for another job
    saved_step, begun_updates = run.step, run.updates()
    micro_batches = make_loader(run)
    logbook.log_start(run, display)
    if run.step == 0 and not _stop_agreed(run, stop, saver, display):
        _validate(run, display)
    run.clock.reset()
    while run.step < settings.train.max_steps and not _stop_agreed(run, stop, saver, display):
        try:
            result = optimizer_step(run, micro_batches)
        except OSError:  # the data cannot be read; nothing of this step has reached the weights
            if run.fabric.world_size == 1 and saved_step < run.step:  # of several ranks the others wait in the backward
                _save(run, saver)
            raise
        first_step_done()
        display.step(run.step)
        last = run.step == settings.train.max_steps
        if last or run.step % settings.train.log_every == 0:
            problem = logbook.log_step(run, display, result)
            if problem is not None:  # on all ranks
                if run.updates() > begun_updates:  # else each restart would save the same, and prune good ones
                    _save(run, saver)
                try:
                    saver.close()
                except OSError as error:
                    problem += f"; and {error}"
                raise FloatingPointError(problem)
        if _due(run.step, settings.validation.every_steps, last):
            _validate(run, display)
        if stop.save_now or _due(run.step, settings.checkpoint.every_steps, last):
            _save(run, saver)
            saved_step = run.step
        _log_saves(run, saver)
    try:
        saved = stop.reason != TAKEN and _save_last(run, saver, saved_step, stop, display)
    except OSError as error:
        display.say(f"ended after step {run.step}: {error}")
        _log_saves(run, saver)
        run.log.write("stop", run.step, {"reason": "a save that failed"})
        return LATER
    _log_saves(run, saver)
    return _ended(run, stop, display) if saved else _taken(run, saver, stop, display)


def _ended(run: Run, stop: Stop, display: Display) -> int:
    """The run is saved. Returns the exit status."""
    settings = run.config
    if run.step == settings.train.max_steps:  # a signal that came after the last step changes nothing
        run.log.write("stop", run.step, {"reason": "finished"})
        return 0
    if stop.reason == OUT_OF_TIME:
        _compare_clocks(time.time(), display)
    run.log.write("stop", run.step, {"reason": stop.why})
    command = "the same command" + (" without --resume" if settings.resume else "")
    display.say(f"stopped by {stop.why} after step {run.step}; {command} goes on from there")
    return stop.status(run.step - run.begun.step)


def _compare_clocks(now_s: float, display: Display) -> None:
    """Say it where one host's clock is ahead, which ends the job's time for all too soon; called by all."""
    clocks = sorted(ranks.gather((now_s, f"rank {ranks.rank()} on {this_host()}")))
    (least_s, last), (most_s, first) = clocks[0], clocks[-1]
    if most_s - least_s > _CLOCKS_S:
        display.say(f"the clock of {first} is {most_s - least_s:.0f} s ahead of that of {last}: one of them is wrong")


def _taken(run: Run, saver: Saver, stop: Stop, display: Display) -> int:
    """Another job has the run's folder. Returns the exit status."""
    stop.reason = TAKEN
    display.say(f"stopped after step {run.step}, and not to be saved: {saver.wait()}")
    return stop.status(run.step - run.begun.step)


def make_loader(run: Run) -> Iterator[data.MicroBatch]:
    """The rank's micro-batches from the next step on to the last."""
    settings, rank, world_size = run.config, run.fabric.global_rank, run.fabric.world_size
    micro_batches = data.MicroBatches(
        run.sources, run.mixture, settings.data.seq_len, settings.train.micro_batch_size, rank, world_size
    )
    steps = (run.step + 1, settings.train.max_steps)
    return data.train_loader(micro_batches, *steps, settings.data.num_workers, run.fabric.device)


def _due(step: int, every_steps: int, last: bool) -> bool:
    return every_steps > 0 and (last or step % every_steps == 0)


_RANKS_AGREE = 128
"""Fewer ranks than this agree before every step: it takes them ten milliseconds, by gloo's ring, beside the GPU's work. From
here on they agree before every second, from twice as many on before every third step, and so on."""


def _stop_agreed(run: Run, stop: Stop, saver: Saver, display: Display) -> bool:
    """Whether any rank was asked to stop; all ranks get the same answer, and the reason, and whether to save after this step."""
    if run.step % (1 + int(run.fabric.world_size / _RANKS_AGREE)):
        stop.save_now = False
        return False
    at("agreeing on whether to stop")
    settings = run.config.train
    mine = stop.asked(saver.longest_s, settings.max_hours, settings.stop_margin_s)
    mine = TAKEN if saver.taken else UNSAVED if saver.given_up() else mine
    for line in stop.warnings(saver.longest_s, settings.stop_margin_s):
        display.say(line)
    agreed = ranks.all_reduce_max(torch.tensor([mine, saver.overdue()]))  # on the CPU: the GPU's queue goes on
    stop.reason, stop.save_now = int(agreed[0]), bool(agreed[1])
    return stop.reason != 0


def _validate(run: Run, display: Display) -> None:
    if run.config.validation.every_steps == 0:
        return
    at("validation", run.step)
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


_CLOCKS_S = 60.0
"""Hosts' clocks that differ by more are wrong (seconds)."""
_PAUSES_S = (5.0, 15.0, 25.0)
"""Before the last save is tried again, while there is time."""


def _save_last(run: Run, saver: Saver, saved_step: int, stop: Stop, display: Display) -> bool:
    """Save what was trained since the last save; where the disk is in the way, again while the job has time.

    Returns False where another job has the folder.

    Raises:
        OSError: it could not be saved.
    """
    if saved_step < run.step:
        _save(run, saver)
    for pause_s in _PAUSES_S:
        at("waiting for the last checkpoint to be written", run.step)
        if saver.wait() is None:
            break
        if ranks.broadcast(saver.taken):
            return False
        left_s = stop.left_s(run.config.train.max_hours)
        if not ranks.broadcast(left_s is None or left_s > pause_s + saver.longest_s):
            break
        display.say(f"the last checkpoint is tried again in {pause_s:.0f} s")
        for _ in range(int(pause_s)):
            time.sleep(1)
            alive()
        _save(run, saver)
    saver.close()
    return True


def _log_saves(run: Run, saver: Saver) -> None:
    """A line of metrics for each save that has ended, well or not."""
    while saver.outcomes:
        outcome = saver.outcomes.popleft()
        run.log.write("save", outcome.pop("step"), outcome)


def _save(run: Run, saver: Saver) -> None:
    """Everything that the next step depends on. No random number is drawn in training, so no generator's state is in it."""
    at("save", run.step)
    run.clock.pause()
    state = {
        "step": run.step,
        **run.facts,
        "init_from": run.begun.init_from,
        "tokens_per_source": run.tokens_per_source(),
        "skipped_in_a_row": int(run.skipped_in_a_row),
        "world_size": run.fabric.world_size,
        "operations": [asdict(choice) for choice in parallel.unwrap(run.model).operations.choices],
        "config": asdict(run.config),
        "versions": run_versions(),
    }
    saver.save(run.step, parallel.unwrap(run.model), run.optimizer, state)
    run.clock.go_on()
