"""Faults 4 and 1: disks that are full or fail, and kills at each call, under the saver and under whole runs (see faults.py)."""

import itertools
import os
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fault_runs import at, compare
from fault_saves import Filled, check_all
from forks import HUNG, finish, fork_ranks, gone, start_training, with_group

from pretrain import checkpoint, config

CALLS = ("write", "fsync", "rename", "mkdir", "openat")


def disk_trials(folder: Path, every: int, worlds: list[int]) -> dict:
    """ENOSPC and EIO for each system call of a save that touches the disk, one a trial, injected by strace.

    every: take each so-manieth call only. The failed save commits nothing that is not whole, the one before stays, and the
    next save is good.
    """
    return _at_each_call(folder / "disk", every, worlds, ("error=ENOSPC", "error=EIO"), _fail_one_call)


def kill_trials(folder: Path, every: int, worlds: list[int]) -> dict:
    """SIGKILL to one rank as it makes a system call of a save that touches the disk, one a trial, by strace.

    every: take each so-manieth call only. What stands before a call is what the one before it left: so these are the moments
    before and after each. A whole checkpoint is there, no mix, and the ranks that are started next save on.
    """
    return _at_each_call(folder / "calls", every, worlds, ("signal=KILL",), _kill_at_one_call)


def _at_each_call(
    run_dir: Path, every: int, worlds: list[int], faults: tuple[str, ...], attempt: Callable[..., str | None]
) -> dict:
    """Each fault at each call of each rank; `attempt` says how it went, or None where there was no such call any more."""
    places, failures = Counter[str](), []
    cases = [(n, victim, call, fault) for n in worlds for victim in range(n) for call in CALLS for fault in faults]
    for number, victim, call, fault in cases:
        for count in itertools.count(1, every):
            run_dir.mkdir(parents=True)
            try:
                outcome = attempt(run_dir, number, victim, f"{call}:{fault}:when={count}")
            except AssertionError as problem:
                outcome = "failed"
                failures.append(f"{number} ranks, {fault} at {call} {count} of rank {victim}: {problem}")
            shutil.rmtree(run_dir)
            if outcome is None:
                break
            places.update({f"{call} {fault.partition('=')[2]}": 1, outcome: 1, f"{number} ranks": 1})
            if outcome == "failed":  # and would be for ever, where there is no such call
                break
    trials = sum(places[f"{number} ranks"] for number in worlds)
    return {"trials": trials, "differ": len(failures), "failures": failures, "places": dict(places)}


def _kill_at_one_call(run_dir: Path, number: int, victim: int, injection: str) -> str | None:
    """Save steps 1, 2 and 3, with the kill in that of step 2; returns what checkpoint that left, None: there was no such call."""
    pids = _begin_saves(run_dir, number)
    tracer = _trace(pids[victim], run_dir / "checkpoints", injection, run_dir / "trace.txt")
    (run_dir / "go").touch()
    _wait_for(run_dir, "done", pids)
    reached = any(map(gone, pids))
    tracer.terminate()
    tracer.communicate()
    (run_dir / "go-on").touch()
    statuses = finish(pids, patience_s=2 if reached else 60)
    if not reached:
        assert statuses == [0] * number, statuses
        return None
    assert statuses[victim] == -9, statuses
    found = check_all(run_dir)
    assert found in ((1, 1), (2, 2)), found

    def save_on(rank: int) -> int:
        state = Filled(run_dir)
        state.save(3, 3)
        state.saver.close()
        return 0

    assert finish(fork_ranks(number, run_dir / "output.txt", with_group(number, save_on))) == [0] * number
    assert check_all(run_dir) == (3, 3)
    left = [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not left, left
    return f"save {found[1]} was left"


def _begin_saves(run_dir: Path, number: int) -> list[int]:
    """Ranks that save step 1, wait for the file `go` to save step 2, and for `go-on` to save step 3."""
    said = run_dir / "said.txt"

    def body(rank: int) -> int:
        state = Filled(run_dir)
        state.save(1, 1)
        assert state.saver.wait() is None
        (run_dir / f"ready-{rank}").touch()
        while not (run_dir / "go").exists():
            time.sleep(0.002)
        state.save(2, 2)
        problem = state.saver.wait()
        if rank == 0:
            said.write_text(str(problem))
        (run_dir / f"done-{rank}").touch()
        while not (run_dir / "go-on").exists():
            time.sleep(0.002)
        state.save(3, 3)
        state.saver.close()
        return 0

    pids = fork_ranks(number, run_dir / "output.txt", with_group(number, body))
    _wait_for(run_dir, "ready", pids)
    return pids


def _fail_one_call(run_dir: Path, number: int, victim: int, injection: str) -> str | None:
    """Save steps 1, 2 and 3, with the fault in that of step 2; returns how that went, None: there was no such call."""
    started = time.monotonic()
    pids = _begin_saves(run_dir, number)
    trace = run_dir / "trace.txt"
    tracer = _trace(pids[victim], run_dir / "checkpoints", injection, trace)
    (run_dir / "go").touch()
    _wait_for(run_dir, "done", pids)
    tracer.terminate()
    tracer.communicate()
    (run_dir / "go-on").touch()
    statuses = finish(pids)
    output = (run_dir / "output.txt").read_text()
    assert statuses == [0] * number, f"{statuses}\n{output[-2000:]}"
    assert time.monotonic() - started < 60
    if "INJECTED" not in trace.read_text():
        return None
    problem = (run_dir / "said.txt").read_text()
    steps = [step for step, _ in checkpoint.committed(run_dir)]
    assert check_all(run_dir) == (3, 3), "the next save is not there"
    if problem == "None":
        assert {2, 3} <= set(steps), steps
        return "saved all the same"  # the fault fell into pruning, or was tried again
    assert "NOT saved, training goes on" in output
    assert "No space left" in problem or "Input/output error" in problem, problem
    assert 1 in steps or 2 in steps, f"the one before the fault is gone: {steps}"
    return "not saved, and said"


def _wait_for(run_dir: Path, what: str, pids: list[int]) -> None:
    """Until every rank has left its mark; a rank that ends before is not waited for."""
    while not all((run_dir / f"{what}-{rank}").exists() for rank in range(len(pids))) and not any(map(gone, pids)):
        time.sleep(0.002)


def _trace(pid: int, folder: Path, injection: str, trace: Path) -> subprocess.Popen:
    """Attach strace to a process and its threads, for calls on the files of step 2's save alone."""
    staging, target = folder / ".staging-step-00000002", folder / "step-00000002"
    inside = ["", "/state.json", "/manifest.json", "/tensors", "/tensors/.metadata", "/tensors/.metadata.tmp"]
    inside += [f"/tensors/__{rank}_0.distcp" for rank in range(4)]
    paths = [f"{staging}{name}" for name in inside] + [str(target), str(folder)]
    options = [part for path in paths for part in ("-P", path)]
    call = injection.split(":")[0]
    command = ["strace", "-f", "-e", f"trace={call}", "-e", f"inject={injection}", *options, "-o", str(trace)]
    tracer = subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    line = tracer.stderr.readline()  # "strace: Process N attached"
    assert "attached" in line, line
    return tracer


def full_disk_trials(settings: config.Config, folder: Path, trials: int, seed: int, worlds: list[int]) -> dict:
    """Whole runs on a file system with room for one checkpoint or two; then with room enough, to the end.

    In every other trial the check for room before a save is told that there is plenty, so that the writing itself fails.
    TMPDIR lies on yet another file system, too small for any checkpoint.
    """
    moments, places, failures = random.Random(seed), Counter[str](), []
    for ranks in worlds:
        assert finish(start_training(ranks, at(settings, folder / f"straight-{ranks}"))) == [0] * ranks
    for trial in range(trials):
        ranks, unchecked = worlds[trial % len(worlds)], trial // len(worlds) % 2 == 1
        # Who checks wants 1 MiB more than the checkpoint's 1.6.
        size = moments.randrange(2000 if unchecked else 2800, 4700)
        with file_system(folder / "small", size) as small, file_system(folder / "tmp", 64) as tmp:
            run = at(settings, small / "run")
            output = folder / f"output-{trial}.txt"

            def before(rank: int, unchecked: bool = unchecked, tmp: Path = tmp) -> None:
                os.environ["TMPDIR"] = str(tmp)
                plenty = shutil.disk_usage(tmp)._replace(free=2**40)
                if unchecked:
                    shutil.disk_usage = lambda path: plenty  # type: ignore[assignment]

            try:
                started = time.monotonic()
                statuses = finish(start_training(ranks, run, before, output))
                assert time.monotonic() - started < 60
                places["ended well" if statuses == [0] * ranks else "ended with an error"] += 1
                said = output.read_text()
                assert "No space left" in said or "MiB free" in said, said[-2000:]
                assert "NOT saved, training goes on" in said, said[-2000:]
                for step, left in checkpoint.committed(small / "run"):
                    assert checkpoint.verify(left) is None, f"step {step} is committed: {checkpoint.verify(left)}"
                assert checkpoint.committed(small / "run"), "no checkpoint"
                assert HUNG not in statuses, f"killed after 60 s: {said[-2000:]}"
                subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
                assert finish(start_training(ranks, run, before, output)) == [0] * ranks, output.read_text()[-2000:]
                compare(small / "run", folder / f"straight-{ranks}", exact=True)
                assert not list(tmp.iterdir()), "something was staged in TMPDIR"
            except AssertionError as error:
                failures.append(f"trial {trial} on {ranks} ranks, {size} KiB: {error}")
            places.update({f"{ranks} ranks": 1, "writing fails" if unchecked else "found before writing": 1})
    return {"trials": trials, "differ": len(failures), "failures": failures, "places": dict(places)}


@contextmanager
def file_system(folder: Path, kibibytes: int) -> Iterator[Path]:
    """A small file system of its own in the machine's memory."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
