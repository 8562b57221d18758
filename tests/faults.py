"""The faults that a run survives, made for real and counted: python tests/faults.py [--kills 300] [--flips 1000] [--signals 40]

A tiny model trains 16 steps over data of two to four epochs. Each trial disturbs a run and lets it go on until it is done:

    kill      SIGKILL to one or all of 1, 2 or 4 ranks, at a random moment, or in a save right before or after its n-th write,
              fsync or rename; started again until it ends. Every loss, norm and fingerprint must be the undisturbed run's.
    flip      a bit, a block, an end, a whole file of a checkpoint damaged: found, and the one before taken.
    signal    SIGTERM or SIGUSR1 to one rank, in a step, in a validation, in a save, in a load or at the start: all ranks save
              and leave with the status that asks for another start, no step is lost, and the next start goes on.
    elastic   stopped and started on other numbers of ranks, micro-batches and workers: the same sequences in every step,
              losses within 1e-5.

Ranks are forked from this process, which has imported everything: a start takes a second. The summary goes to
benchmarks/results/faults.json. tests/test_faults.py runs a short form.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from conftest import tiny_config, write_config, write_dataset

from pretrain import checkpoint, preparation, saver, train, trainer, validation
from pretrain.scheduler import REQUEUE
from pretrain.verify_resume import read_trajectory

STEPS = 16
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "faults.json"


def make_data(folder: Path) -> Path:
    """Sources so short that the run goes through their ends: 45 and 14 sequences, of which a step takes 5.6 and 2.4."""
    for seed, name in enumerate("ab"):
        write_dataset(folder / name / "train", (45, 14)[seed] * 32 + 5, seed)
        write_dataset(folder / name / "validation", 200, 10 + seed)
    return folder


def settings(folder: Path, run_dir: Path, **sections: object) -> Path:
    """The configuration of a trial, written beside its run."""
    tree = tiny_config(folder, run_dir, train={"max_steps": STEPS}, validation={"every_steps": 6}, **sections)
    tree["checkpoint"] = {"every_steps": 3, "keep_last": 2}
    run_dir.mkdir(parents=True, exist_ok=True)
    return write_config(run_dir / "trial.yaml", tree)


# --- ranks -----------------------------------------------------------------------------------------------------------


def fork_ranks(ranks: int, config: Path, before: Callable[[int], None] = lambda rank: None) -> list[int]:
    """Start a run on `ranks` forked processes, as torchrun would; `before` is called in each with its rank. Returns pids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        status = 70
        try:
            with open(config.parent / "output.txt", "a") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            if ranks > 1:
                places = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": ranks,
                    "LOCAL_WORLD_SIZE": ranks,
                    "GROUP_RANK": 0,
                }
                os.environ.update({name: str(value) for name, value in places.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="faults")
            before(rank)
            status = train.main(["--config", str(config)])
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pids


def finish(pids: list[int], patience_s: float = 60) -> list[int]:
    """Wait for all; when one is gone the others get `patience_s` to go by themselves. Returns statuses, -9 for killed."""
    statuses: dict[int, int] = {}
    deadline = None
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
                    deadline = deadline or time.monotonic() + patience_s
        if deadline and time.monotonic() > deadline:
            for pid in set(pids) - set(statuses):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [statuses[pid] for pid in pids]


def run_to_the_end(ranks: int, config: Path) -> None:
    """Train undisturbed until the run is done."""
    statuses = finish(fork_ranks(ranks, config))
    if statuses != [0] * ranks:
        raise AssertionError(
            f"{config.parent} ended with {statuses}\n{(config.parent / 'output.txt').read_text()[-3000:]}"
        )


# --- kills -----------------------------------------------------------------------------------------------------------


def die_in_a_save(count: int, after: bool) -> Callable[[int], None]:
    """Makes rank 0 kill itself right before or after the `count`-th call that touches the disk from the saver's thread."""

    def arm(rank: int) -> None:
        if rank != 0:
            return
        calls = Counter[str]()

        def counted(call: Callable) -> Callable:
            def wrapper(*args: object, **options: object) -> object:
                import threading

                if not threading.current_thread().name.startswith("saver"):
                    return call(*args, **options)
                calls["disk"] += 1
                if calls["disk"] == count and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = call(*args, **options)
                if calls["disk"] == count and after:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return wrapper

        for name in ("fsync", "rename", "open", "mkdir", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        Path.mkdir = counted(Path.mkdir)  # type: ignore[method-assign]
        shutil.rmtree = counted(shutil.rmtree)  # type: ignore[assignment]

    return arm


def kill_trial(data: Path, folder: Path, reference: dict, ranks: int, moments: random.Random, duration_s: float) -> str:
    """One disturbed run; returns where it was killed. Raises AssertionError where it is not the reference."""
    config = settings(data, folder)
    kind = moments.choice(["all", "one", "save"])
    if kind == "save":
        place = (moments.randrange(1, 60), moments.random() < 0.5)
        finish(fork_ranks(ranks, config, die_in_a_save(*place)), patience_s=20)
        where = f"{'after' if place[1] else 'before'} disk call {place[0]}"
    else:
        pids = fork_ranks(ranks, config)
        time.sleep(moments.uniform(0.2, 1.0) * duration_s)
        for pid in pids if kind == "all" else [moments.choice(pids)]:
            os.kill(pid, signal.SIGKILL)
        finish(pids, patience_s=10)
        where = f"{kind} at a random moment"
    for left in [folder for _, folder in checkpoint.committed(folder)]:
        assert checkpoint.verify(left) is None, f"{left} is committed and not whole: {checkpoint.verify(left)}"
    run_to_the_end(ranks, config)
    compare(read_trajectory(folder), reference, exact=True)
    return where


def compare(got: dict, expected: dict, exact: bool) -> None:
    """Every step there, the same sequences, and the same figures: to the bit, or losses within 1e-5."""
    assert list(got) == list(expected) == list(range(1, STEPS + 1)), f"steps {list(got)}"
    for step, line in expected.items():
        assert got[step]["data_hash"] == line["data_hash"], f"step {step} holds other sequences"
        for figure in ("loss", "grad_norm", "lr") if exact else ():
            assert got[step][figure] == line[figure], (
                f"step {step}: {figure} {got[step][figure]!r}, not {line[figure]!r}"
            )
        assert abs(got[step]["loss"] - line["loss"]) <= 1e-5, f"step {step}: loss {got[step]['loss']}"


def kill_trials(data: Path, folder: Path, trials: int, seed: int, worlds: list[int]) -> dict:
    """Kills on each number of ranks in turn."""
    moments = random.Random(seed)
    references, durations = {}, {}
    for ranks in worlds:
        started = time.monotonic()
        run_to_the_end(ranks, settings(data, folder / f"straight-{ranks}"))
        durations[ranks] = time.monotonic() - started
        references[ranks] = read_trajectory(folder / f"straight-{ranks}")
    places, failures = Counter[str](), []
    for trial in range(trials):
        ranks = worlds[trial % len(worlds)]
        try:
            where = kill_trial(data, folder / "trial", references[ranks], ranks, moments, durations[ranks])
            places[where.split(" disk")[0]] += 1
        except AssertionError as error:
            failures.append(f"trial {trial} on {ranks} ranks: {error}")
            shutil.copytree(folder / "trial", folder / f"failed-{trial}", dirs_exist_ok=True)
        shutil.rmtree(folder / "trial", ignore_errors=True)
        if trial % 25 == 24:
            print(f"kills: {trial + 1} of {trials}, {len(failures)} differ", flush=True)
    facts = {"ranks": worlds, "places": dict(places)}
    return {"trials": trials, "differ": len(failures), "failures": failures, **facts}


# --- signals ---------------------------------------------------------------------------------------------------------

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


def signal_trials(data: Path, folder: Path, trials: int, seed: int, worlds: list[int]) -> dict:
    """Each place in turn, then each signal, on each number of ranks."""
    moments, failures, places = random.Random(seed), [], Counter[str]()
    references = {}
    for ranks in worlds:
        run_to_the_end(ranks, settings(data, folder / f"straight-{ranks}"))
        references[ranks] = read_trajectory(folder / f"straight-{ranks}")
    kinds = [
        (ranks, number, place) for ranks in worlds for number in (signal.SIGTERM, signal.SIGUSR1) for place in PLACES
    ]
    for trial in range(trials):
        ranks, number, place = kinds[trial % len(kinds)]
        run_dir, target = folder / f"trial-{trial}", moments.randrange(ranks)
        config = settings(data, run_dir)
        before = 0
        if place in ("in a load", "at the start"):  # something to load: a run that was stopped before
            stopped = finish(fork_ranks(ranks, config, signal_at("in a step", signal.SIGTERM, 0)))
            before = max(read_trajectory(run_dir)) if stopped == [REQUEUE] * ranks else -1
        statuses = finish(fork_ranks(ranks, config, signal_at(place, number, target)))
        try:
            trained = max(read_trajectory(run_dir))
            saved = checkpoint.committed(run_dir)[0][0]
            assert statuses == [REQUEUE] * ranks, f"the ranks left with {statuses}"
            assert saved == trained < STEPS, f"{trained} steps were trained and {saved} saved"
            assert trained == before or before == 0, f"{trained} steps after a start that was stopped at {before}"
            run_to_the_end(ranks, config)
            lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            assert sum(line["kind"] == "train" for line in lines) == STEPS, "a step was trained twice"
            compare(read_trajectory(run_dir), references[ranks], exact=True)
            places[place] += 1
            shutil.rmtree(run_dir)
        except (AssertionError, ValueError, IndexError, OSError) as error:
            failures.append(f"trial {trial}: {number.name} to rank {target} of {ranks}, {place}: {error}")
    return {"trials": trials, "failed": len(failures), "failures": failures, "places": dict(places)}


# --- damage ----------------------------------------------------------------------------------------------------------


def flip_trials(data: Path, folder: Path, trials: int, seed: int) -> dict:
    """Damage a file of the newest checkpoint; it must be found, and the one before taken. The damage is undone after."""
    run_to_the_end(1, settings(data, folder / "run"))
    run_dir, moments = folder / "run", random.Random(seed)
    newest, before = (path for _, path in checkpoint.committed(run_dir)[:2])
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    kinds, missed = Counter[str](), []
    for trial in range(trials):
        path = moments.choice(files)
        whole = path.read_bytes()
        kind = moments.choice(["flip"] * 6 + ["zero", "truncate", "delete", "swap"])
        damaged = bytearray(whole)
        place = moments.randrange(len(whole))
        if kind == "flip":
            damaged[place] ^= 1 << moments.randrange(8)
        elif kind == "zero":
            damaged[place : place + 512] = bytes(len(damaged[place : place + 512]))
        elif kind == "truncate":
            del damaged[place:]
        elif kind == "swap":
            damaged = bytearray((before / path.relative_to(newest)).read_bytes())
        path.unlink() if kind == "delete" else path.write_bytes(damaged)
        changed = kind == "delete" or bytes(damaged) != whole
        # A changed manifest that still says the same is no damage: a flip in its white space, say.
        harmless = path.name == "manifest.json" and _same_json(damaged, whole) if kind != "delete" else False
        if changed and not harmless:
            kinds[kind] += 1
            if checkpoint.latest(run_dir, warn=lambda line: None) != before:
                missed.append(f"trial {trial}: {kind} of {path.relative_to(newest)} at byte {place}")
        path.write_bytes(whole)
    return {"trials": sum(kinds.values()), "missed": len(missed), "failures": missed, "kinds": dict(kinds)}


def _same_json(a: bytes, b: bytes) -> bool:
    try:
        first, second = json.loads(a), json.loads(b)
        return first == second
    except (ValueError, TypeError):
        return False


# --- other ranks -----------------------------------------------------------------------------------------------------


def elastic_trials(data: Path, folder: Path, trials: int, seed: int) -> dict:
    """Each start on another number of ranks, micro-batch and workers, each but the last killed."""
    moments, failures = random.Random(seed), []
    run_to_the_end(1, settings(data, folder / "straight"))
    reference = read_trajectory(folder / "straight")
    shapes = Counter[str]()
    for trial in range(trials):
        run_dir = folder / "trial"
        try:
            for last in (False, False, True):
                ranks, workers = moments.choice([1, 2, 4]), moments.choice([0, 1, 2, 4])
                micro_batch = moments.choice([b for b in (1, 2, 4, 8) if 8 % (b * ranks) == 0])
                shapes[f"{ranks} ranks"] += 1
                config = settings(data, run_dir, data={"num_workers": workers})
                tree = config.read_text().replace("micro_batch_size: 2", f"micro_batch_size: {micro_batch}")
                config.write_text(tree)
                if last:
                    run_to_the_end(ranks, config)
                    break
                pids = fork_ranks(ranks, config)
                time.sleep(moments.uniform(0.5, 2.5))
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                finish(pids)
            compare(read_trajectory(run_dir), reference, exact=False)
        except AssertionError as error:
            failures.append(f"trial {trial}: {error}")
        shutil.rmtree(run_dir, ignore_errors=True)
    return {"trials": trials, "differ": len(failures), "failures": failures, "starts": dict(shapes)}


def main() -> int:
    """Run all, print and write the summary; status 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--signals", type=int, default=30)
    parser.add_argument("--elastic", type=int, default=30)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks that are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="empty folder for the runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    data = make_data(args.folder / "data")
    started = time.monotonic()
    summary = {
        "kills": kill_trials(data, args.folder / "kills", args.kills, args.seed, args.ranks),
        "signals": signal_trials(data, args.folder / "signals", args.signals, args.seed, args.ranks),
        "damage": flip_trials(data, args.folder / "flips", args.flips, args.seed),
        "elastic": elastic_trials(data, args.folder / "elastic", args.elastic, args.seed),
    }
    bad = sum(len(part["failures"]) for part in summary.values())
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    facts = {"seconds": round(time.monotonic() - started), "versions": versions, "cpus": os.cpu_count()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**summary, **facts}, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    return 1 if bad else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
