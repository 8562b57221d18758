"""How training saves, and how it ends.

finished, or told to stop ─> the last save, tried again while there is time ─> the "stop" line of the log ─> exit status
"""

import time
from dataclasses import asdict, dataclass, field

from pretrain import checkpoint, logbook, ranks, soundness
from pretrain.hosts import this_host
from pretrain.progress import Display
from pretrain.run import Run, StepResult
from pretrain.saver import Saver
from pretrain.scheduler import LATER, OUT_OF_TIME, TAKEN, Stop
from pretrain.versions import run_versions
from pretrain.watchdog import alive, at

_PAUSES_S = (5.0, 15.0, 25.0)
"""Before the last save is tried again, while there is time."""
_CLOCKS_S = 60.0
"""Hosts' clocks that differ by more are wrong (seconds)."""


@dataclass
class Loop:
    """What the parts of the training loop share; each part is called by all ranks."""

    run: Run
    stop: Stop
    display: Display
    saver: Saver
    unlogged: list[StepResult] = field(default_factory=list)
    """Of the steps since the last line of metrics."""


def check(loop: Loop) -> None:
    """Raise FloatingPointError, on all ranks, where weights or the optimizer's state are broken: a restart does without them."""
    run = loop.run
    problem = soundness.problem(checkpoint.tensors_of(run.llama, run.optimizer))
    if problem is not None:
        logbook.flush_steps(run, loop.unlogged)
        loop.saver.wait()  # what was sound may be still on its way to the disk
        log_saves(run, loop.saver)
        raise FloatingPointError(
            f"after step {run.step} {problem}. What was trained since the last save is not saved; where this comes again at the "
            "same step, go back to an earlier checkpoint with --resume, and look at the hosts with pretrain doctor"
        )


def save(loop: Loop) -> None:
    """Everything that the next step depends on. No random number is drawn in training, so no generator's state is in it.

    Raises:
        FloatingPointError: as `check`.
    """
    run = loop.run
    at("save", run.step)
    run.clock.pause()
    check(loop)
    logbook.flush_steps(run, loop.unlogged)  # what goes on from here knows nothing of them
    at("save", run.step)
    state = {
        "step": run.step,
        **run.facts,
        "init_from": run.taken_up.init_from,
        "branched_from": run.taken_up.branched_from,
        "branched_from_manifest": run.taken_up.branched_from_manifest,
        "tokens_per_source": run.tokens_per_source(),
        "skips": run.skips.state(),
        "world_size": run.fabric.world_size,
        "operations": [asdict(choice) for choice in run.llama.operations.choices],
        "config": asdict(run.config),
        "versions": run_versions(),
    }
    loop.saver.save(run.step, run.llama, run.optimizer, state)
    run.clock.go_on()


def log_saves(run: Run, saver: Saver) -> None:
    """A line of metrics for each save that has ended, well or not."""
    while saver.outcomes:
        outcome = saver.outcomes.popleft()
        run.log.write("save", outcome.pop("step"), outcome)


def leave(loop: Loop) -> int:
    """The run has come to its end, or was told to stop: save it, and say how it ended. Returns the process's exit status."""
    run, stop = loop.run, loop.stop
    try:
        saved = stop.reason != TAKEN and _save_last(loop)
    except OSError as error:
        loop.display.say(f"ended after step {run.step}: {error}")
        log_saves(run, loop.saver)
        run.log.write("stop", run.step, {"reason": "a save that failed"})
        return LATER
    log_saves(run, loop.saver)
    if not saved:
        stop.reason = TAKEN
        loop.display.say(f"stopped after step {run.step}, and not to be saved: {loop.saver.wait()}")
        return stop.status(run.step - run.taken_up.step)
    return _ended(loop)


def _save_last(loop: Loop) -> bool:
    """Save what was trained since the last save; where the disk is in the way, again while the job has time.

    Returns False where another job has the folder.

    Raises:
        OSError: it could not be saved.
    """
    run, saver = loop.run, loop.saver
    if saver.step < run.step:
        save(loop)
    for pause_s in _PAUSES_S:
        at("waiting for the last checkpoint to be written", run.step)
        if saver.wait() is None:
            break
        if ranks.broadcast(saver.taken):
            return False
        left_s = loop.stop.left_s(run.config.train.max_hours)
        if not ranks.broadcast(left_s is None or left_s > pause_s + saver.longest_s):
            break
        loop.display.say(f"the last checkpoint is tried again in {pause_s:.0f} s")
        for _ in range(int(pause_s)):
            time.sleep(1)
            alive()
        save(loop)
    saver.close()
    return True


def _ended(loop: Loop) -> int:
    """The run is saved. Returns the exit status."""
    run, stop = loop.run, loop.stop
    settings = run.config.train
    if run.step >= settings.last_step:  # a signal that came after the last step changes nothing
        finished = run.step == settings.max_steps
        reason = "finished" if finished else f"train.stop_after_step {settings.stop_after_step}"
        run.log.write("stop", run.step, {"reason": reason})
        if not finished:
            loop.display.say(f"ended after step {run.step} of {settings.max_steps}, by {reason}")
        return 0
    if stop.reason == OUT_OF_TIME:
        _compare_clocks(time.time(), loop.display)
    run.log.write("stop", run.step, {"reason": stop.why})
    command = "the same command" + (" without --resume" if run.config.resume else "")
    loop.display.say(f"stopped by {stop.why} after step {run.step}; {command} goes on from there")
    return stop.status(run.step - run.taken_up.step)


def _compare_clocks(now_s: float, display: Display) -> None:
    """Say it where one host's clock is ahead, which ends the job's time for all too soon; called by all."""
    clocks = sorted(ranks.gather((now_s, f"rank {ranks.rank()} on {this_host()}")))
    (least_s, last), (most_s, first) = clocks[0], clocks[-1]
    if most_s - least_s > _CLOCKS_S:
        display.say(f"the clock of {first} is {most_s - least_s:.0f} s ahead of that of {last}: one of them is wrong")
