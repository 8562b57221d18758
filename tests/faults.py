"""The faults that a run survives, made for real and counted: python tests/faults.py --kills 300 --damage 1000 ... --folder DIR

    --kills     1, 9   SIGKILL to one or all of 1, 2 or 4 ranks, at random moments and before and after each call of a save
                       that touches the disk; started again until the run ends, which must be the undisturbed one to the bit
    --layouts   1, 9   the same kills under the strategies that `auto` takes on GPUs, some in bf16: hybrid over two nodes,
                       shard_grad_op
    --repeat           the same undisturbed run again, on each number of ranks
    --signals   5      SIGTERM or SIGUSR1 to one rank, in a step, a validation, a save, a load, at the start: all ranks save and
                       leave with the status that asks for another start; no step is lost
    --saves     2      kills of ranks that only save, prune and replay saves: a whole checkpoint at every moment, never a mix
    --damage    3      a bit, a block, an end, a whole file of a checkpoint: found by all ranks, and the one before taken
    --disk      4      ENOSPC and EIO for every so-manieth call of a save that touches the disk; 1: for each (needs strace)
    --calls     1      SIGKILL to each rank at every so-manieth call of a save that touches the disk; 1: at each (needs strace)
    --full_disk 4      runs on a small file system that fills up (needs root)
    --elastic   8, 9   other numbers of ranks, micro-batches and workers: the same sequences, losses within 1e-5
    --data      10     a shard or manifest that is not what it should be: refused before step 1, by name
    --jobs      13     two jobs on one run folder: one is refused

Each number is one of trials, 0 leaves a part out. Ranks are forked from this process, which has imported everything. The
summary goes to benchmarks/results/faults.json; with --append it is added to what stands there, so that the long form can
be made piece by piece (with another --seed each). tests/test_faults.py runs a short form.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import fault_disks
import fault_runs
import fault_saves
import fault_signals
import torch

from pretrain.versions import own_version

CRIA = own_version()
"""What is measured, as it was when it began."""
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "faults.json"


def add(before: Any, now: Any) -> Any:
    """Two summaries as one: numbers add up, lists are joined, dictionaries by key."""
    if isinstance(now, dict):
        return {key: add(before.get(key), now.get(key)) for key in {**before, **now}} if before else now
    if before is None or now is None:
        return now if before is None else before
    return before + now


def main() -> int:
    """Run all that is asked for, print and write the summary; status 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in (
        "kills",
        "layouts",
        "repeat",
        "signals",
        "saves",
        "damage",
        "disk",
        "calls",
        "full_disk",
        "elastic",
        "data",
        "jobs",
    ):
        parser.add_argument(f"--{part}", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="empty folder for the runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--append", action="store_true", help="add to the summary that is there")
    args = parser.parse_args()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    read(args.out, versions, args.append)  # refused now, and not after hours of trials
    started, few = time.monotonic(), [n for n in args.ranks if n <= 2]
    settings = fault_runs.make_settings(fault_runs.make_data(args.folder / "datasets"), args.folder)
    parts = {
        "kills": lambda n, to: fault_runs.kill_trials(settings, to, n, args.seed, fault_runs.plain(args.ranks)),
        "layouts": lambda n, to: fault_runs.kill_trials(settings, to, n, args.seed, fault_runs.LAYOUTS),
        "repeat": lambda n, to: fault_runs.repeat_trials(settings, to, n, args.ranks),
        "signals": lambda n, to: fault_signals.signal_trials(settings, to, n, args.seed, args.ranks),
        "saves": lambda n, to: fault_saves.save_trials(to, n, args.seed, few),
        "damage": lambda n, to: fault_saves.damage_trials(to, n, args.seed),
        "disk": lambda n, to: fault_disks.disk_trials(to, n, few),
        "calls": lambda n, to: fault_disks.kill_trials(to, n, args.ranks),
        "full_disk": lambda n, to: fault_disks.full_disk_trials(settings, to, n, args.seed, few),
        "elastic": lambda n, to: fault_runs.elastic_trials(settings, to, n, args.seed),
        "data": lambda n, to: fault_runs.data_trials(settings, to, n, args.seed),
        "jobs": lambda n, to: fault_runs.two_jobs_trials(settings, to, n, args.seed, few),
    }
    summary: dict[str, Any] = {}
    for name, make in parts.items():
        if trials := getattr(args, name):
            (args.folder / name).mkdir()
            begun = time.monotonic()
            summary[name] = make(trials, args.folder / name)
            summary[name]["commits"] = {CRIA: trials}
            summary[name]["seconds"] = round(time.monotonic() - begun)
            print(json.dumps({name: summary[name]}), flush=True)
    broken = sum(len(part["failures"]) for part in summary.values())
    write(args.out, summary, versions, args.append)
    print(f"{broken} broken promises in {time.monotonic() - started:.0f} s", flush=True)
    return 1 if broken else 0


def read(out: Path, versions: dict[str, Any], append: bool) -> dict[str, Any]:
    """The summary to add to; empty where a new one begins. Raises ValueError: it was made with other versions."""
    before = json.loads(out.read_text()) if append and out.exists() else {"versions": versions}
    if before.pop("versions") != versions:
        raise ValueError(f"{out} was made with other versions; begin anew without --append")
    return before


def write(out: Path, summary: dict[str, Any], versions: dict[str, Any], append: bool) -> None:
    """Write the summary, or add it to the one that is there, which must be of the same versions."""
    before = read(out, versions, append)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**add(before, summary), "versions": versions}, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
