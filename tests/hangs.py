"""Ranks that hang and ranks that die, made for real: python tests/hangs.py --folder EMPTY [--only stop kill-1] [--limit_s 4]

Two ranks train a tiny model with a short watchdog.limit_s, and one of them gets into trouble:

    stop           SIGSTOP in training                          data       a loader's thread sleeps
    lock           C code holds the interpreter's lock          collective one never comes to a collective
    validation     sleeps in validation                         save       the writing of a checkpoint sleeps
    load           sleeps while a checkpoint is loaded          raise      an exception, while the other waits for it
    order          one calls another collective than the other
    kill-0 kill-1  SIGKILL, without an agent, as under srun     slow       a first step longer than the limit, then slow steps

For each: exit statuses, who is named in crash-report.txt and where, and the seconds from the fault to the end of the last
process. The summary is JSON. tests/test_watchdog.py runs a part, benchmarks/watchdog.py measures.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from conftest import records, tiny_config, write_config
from fault_runs import make_data
from forks import finish, start_training

from pretrain import checkpoint, data, ranks, synced, trainer, validation
from pretrain.config import load

FAULTY_STEP = 12
MARK = "fault"
"""A file beside the run that says when the fault began (seconds of the host's monotonic clock)."""


def settings(folder: Path, trial: Path, limit_s: float, max_steps: int = 100_000) -> Path:
    """The configuration of a trial, written beside its run."""
    trial.mkdir(parents=True, exist_ok=True)
    tree = tiny_config(folder, trial, train={"max_steps": max_steps}, validation={"every_steps": 10})
    tree["checkpoint"] = {"every_steps": 5, "keep_last": 2}
    tree["watchdog"] = {"limit_s": limit_s, "first_step_limit_s": 15 * limit_s, "stragglers_every": 3}
    return write_config(trial / "trial.yaml", tree)


def mark(trial: Path) -> None:
    """Note that the fault begins."""
    if not (trial / MARK).exists():
        (trial / MARK).write_text(str(time.monotonic()))


def before_call(
    owner: object, name: str, fault: Callable[[], None], when: Callable[..., bool] = lambda *_: True
) -> None:
    """Have `fault` happen before a call of `owner.name` when `when(*arguments)` holds."""
    call = getattr(owner, name)

    def wrapper(*args: object, **options: object) -> object:
        if when(*args):
            fault()
        return call(*args, **options)

    setattr(owner, name, wrapper)


def arm(kind: str, trial: Path, limit_s: float) -> Callable[[int], None]:
    """What is done in each rank before it starts, so that rank 1 (for `raise` rank 0) gets into the trouble."""

    def sleep() -> None:
        mark(trial)
        time.sleep(1000)

    def hold_the_lock() -> None:
        mark(trial)
        re.match(r"(a+)+$", "a" * 60 + "b")  # backtracks for ages, in C, and never gives the lock back

    def call_another() -> None:
        mark(trial)
        dist.broadcast(torch.zeros(7), src=0)

    def burn() -> None:
        until = time.thread_time() + 0.1
        while time.thread_time() < until:
            pass

    def fail() -> None:
        mark(trial)
        raise ValueError("a made-up error")

    def before(rank: int) -> None:
        if rank == 0 and kind == "raise":
            before_call(trainer, "learning_rate", fail, lambda step, *_: step == FAULTY_STEP)
        if rank != 1:
            return

        def late(*_: object) -> bool:  # ranks agree on something before there is a log, too
            return (trial / "metrics.jsonl").exists() and len(records(trial, "train")) >= FAULTY_STEP

        if kind == "data":
            before_call(data.MicroBatches, "__getitem__", sleep, lambda _, item: item >= 2 * FAULTY_STEP)
        elif kind == "lock":
            before_call(trainer, "learning_rate", hold_the_lock, lambda step, *_: step == FAULTY_STEP)
        elif kind == "collective":
            before_call(ranks, "all_reduce_max", sleep, late)
        elif kind == "order":
            before_call(ranks, "all_reduce_max", call_another, late)
        elif kind == "validation":
            before_call(validation, "micro_batches", sleep, late)
        elif kind == "save":
            before_call(synced, "Writer", sleep)
        elif kind == "load":
            before_call(checkpoint, "load", sleep)
        elif kind == "slow":
            before_call(trainer, "learning_rate", lambda: time.sleep(1.5 * limit_s), lambda step, *_: step == 1)
            before_call(trainer, "learning_rate", burn)

    return before


def trial(kind: str, folder: Path, run_dir: Path, limit_s: float) -> dict:
    """One fault; returns what came of it."""
    config = settings(folder, run_dir, limit_s, max_steps=12 if kind == "slow" else 100_000)
    if kind == "load":
        finish(start_training(2, load(settings(folder, run_dir, limit_s, max_steps=5))))
        config = settings(folder, run_dir, limit_s)
        config.write_text(
            config.read_text().replace(f"first_step_limit_s: {15 * limit_s}", f"first_step_limit_s: {limit_s}")
        )
    if kind == "data":
        config.write_text(config.read_text().replace("num_workers: 0", "num_workers: 1"))
    pids = start_training(2, load(config), arm(kind, run_dir, limit_s))
    if kind in ("stop", "kill-0", "kill-1"):
        _wait_for_step(run_dir, FAULTY_STEP)
        mark(run_dir)
        os.kill(pids[kind != "kill-0"], signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
    statuses = finish(pids, patience_s=120)
    ended = time.monotonic()
    began = float((run_dir / MARK).read_text()) if (run_dir / MARK).exists() else None
    report = (run_dir / "crash-report.txt").read_text() if (run_dir / "crash-report.txt").exists() else ""
    what = next((line.removeprefix("what").strip() for line in report.splitlines() if line.startswith("what ")), None)
    steps = max(records(run_dir, "train"), default=0)
    seconds = None if began is None else round(ended - began, 2)
    slow = list(records(run_dir, "straggler").values())
    return {
        "statuses": statuses,
        "what": what,
        "seconds": seconds,
        "steps": steps,
        "report": report,
        "stragglers": slow,
    }


def _wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not ((run_dir / "metrics.jsonl").exists() and step in records(run_dir, "train")):
        if time.monotonic() > deadline:
            raise AssertionError(f"step {step} was not reached:\n{(run_dir / 'output.txt').read_text()[-3000:]}")
        time.sleep(0.02)


KINDS = (
    "stop",
    "data",
    "lock",
    "collective",
    "order",
    "validation",
    "save",
    "load",
    "raise",
    "kill-0",
    "kill-1",
    "slow",
)


def main() -> int:
    """Make the faults, write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--limit_s", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, required=True, help="empty folder for the runs")
    args = parser.parse_args()
    folder = make_data(args.folder / "data")
    summary = {}
    for kind in args.only:
        summary[kind] = trial(kind, folder, args.folder / kind, args.limit_s)
        print(f"{kind}: {summary[kind]['statuses']} {summary[kind]['what']} {summary[kind]['seconds']} s", flush=True)
    (args.folder / "summary.json").write_text(json.dumps(summary, indent=1))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
