"""Fault 5: a signal to one rank, at each place of a run (see faults.py)."""

import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fault_runs import STEPS, at, compare, read_log
from forks import finish, start_training, train_to_the_end

from pretrain import checkpoint, config, preparation, saver, trainer, validation
from pretrain.scheduler import LATER, REQUEUE
from pretrain.verify_resume import read_trajectory

PLACES = {
    "in a step": (trainer, "before_micro_step", 9),
    "in a validation": (validation, "losses", 2),
    "in a save": (saver.Saver, "_write_tensors", 2),
    "in a load": (checkpoint, "load", 1),
    "at the start": (preparation, "prepare", 1),
}
"""Where a signal comes: before which call of a function, and in the how manieth."""


def signal_at(place: str, number: signal.Signals, target: int) -> Callable[[int], None]:
    """Makes rank `target` get the signal right before a call at that place."""

    def arm(rank: int) -> None:
        if rank != target:
            return
        owner, name, count = PLACES[place]
        inner, calls = getattr(owner, name), Counter[str]()

        def wrapper(*args: object, **options: object) -> object:
            calls[name] += 1
            if calls[name] == count:
                os.kill(os.getpid(), number)
            return inner(*args, **options)

        setattr(owner, name, wrapper)

    return arm


def signal_trials(settings: config.Config, folder: Path, trials: int, seed: int, worlds: list[int]) -> dict:
    """Each place in turn, each signal, on each number of ranks; every other one to the last rank."""
    moments, failures, places, turns = random.Random(seed), [], Counter[str](), Counter[int]()
    for ranks in worlds:
        train_to_the_end(ranks, at(settings, folder / f"straight-{ranks}"))
    # Few trials, too, come to all places, and by turns to all numbers of ranks and both signals.
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    kinds = [
        (worlds[(turn + n) % len(worlds)], numbers[(again + n // len(worlds)) % 2], place)
        for turn in range(len(worlds))
        for again in range(2)
        for n, place in enumerate(PLACES)
    ]
    for trial in range(trials):
        ranks, number, place = kinds[trial % len(kinds)]
        run_dir, turns[ranks] = folder / f"trial-{trial}", turns[ranks] + 1
        target = ranks - 1 if turns[ranks] % 2 else moments.randrange(ranks)
        run = at(settings, run_dir)
        before = 0
        if place in ("in a load", "at the start"):  # something to load: a run that was stopped before
            stopped = finish(start_training(ranks, run, signal_at("in a step", signal.SIGTERM, 0)))
            before = max(read_trajectory(run_dir)) if stopped == [REQUEUE] * ranks else -1
        statuses = finish(start_training(ranks, run, signal_at(place, number, target)))
        try:
            trained = max(read_trajectory(run_dir))
            saved = checkpoint.committed(run_dir)[0][0]
            expected = LATER if before else REQUEUE  # it did not come to a step
            assert statuses == [expected] * ranks, f"the ranks left with {statuses}"
            assert saved == trained < STEPS, f"{trained} steps were trained and {saved} saved"
            assert trained == before or before == 0, f"{trained} steps after a start that was stopped at {before}"
            train_to_the_end(ranks, run)
            assert len(read_log(run_dir)) == STEPS, "a step was trained twice"
            compare(run_dir, folder / f"straight-{ranks}", exact=True)
            places[place] += 1
            places["to another rank than 0"] += target > 0
            shutil.rmtree(run_dir)
        except (AssertionError, ValueError, IndexError, OSError) as error:
            failures.append(f"trial {trial}: {number.name} to rank {target} of {ranks}, {place}: {error}")
    return {"trials": trials, "differ": len(failures), "failures": failures, "places": dict(places)}
