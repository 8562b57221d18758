"""How soon a hang is named and a death noticed, and that nothing else raises an alarm: python benchmarks/watchdog.py

    hangs      each of tests/hangs.py's, several limits: seconds from the fault to the last process's end, over the limit
    deaths     SIGKILL to one of two ranks, without an agent: seconds until the other has ended
    torchrun   the same under one torchrun agent and under two: until both agents have ended
    quiet      10,000 steps on two ranks with a limit of two seconds: alarms
    cost       what a place costs the training thread

Writes benchmarks/results/watchdog.json.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from conftest import records, tiny_config, write_config
from fault_runs import make_data
from forks import finish, start_training
from hangs import trial
from processes import free_port

from pretrain import config
from pretrain.bench_result import machine
from pretrain.watchdog import Watchdog

ROOT = Path(__file__).parent.parent
HANGS = ("stop", "lock", "data", "collective", "order", "validation", "save", "load")
SAYS = {"order": "rank 1: gloo:broadcast"}
"""Of a kind in which no rank is behind the other: what the report says of the collective that does not come back."""
RESULTS = ROOT / "benchmarks" / "results" / "watchdog.json"


def hangs(data: Path, folder: Path, limits: list[float], times: int) -> dict:
    """By kind of hang: the time to the end over the limit, each trial, and how often it was named."""
    found = {}
    for kind in HANGS:
        outcomes = [
            (limit_s, trial(kind, data, folder / f"{kind}-{limit_s:g}-{n}", limit_s))
            for limit_s in limits
            for n in range(times)
        ]
        ratios = [round(outcome["seconds"] / limit_s, 3) for limit_s, outcome in outcomes]
        named = sum(bool(re.search(SAYS.get(kind, "^rank 1 "), outcome["what"] or "")) for _, outcome in outcomes)
        nonzero = sum(0 not in outcome["statuses"] for _, outcome in outcomes)
        found[kind] = {"of": len(outcomes), "named": named, "all_ended_non_zero": nonzero, "end_over_limit": ratios}
        print(kind, found[kind], flush=True)
    return found


def deaths(data: Path, folder: Path, times: int) -> dict:
    """Seconds until the other rank has ended, without an agent."""
    outcomes = [trial(f"kill-{n % 2}", data, folder / f"kill-{n}", 60.0) for n in range(times)]
    named = sum((o["what"] or "").startswith(f"rank {n % 2} ") for n, o in enumerate(outcomes))
    return {"of": times, "named": named, "seconds": [o["seconds"] for o in outcomes]}


def under_torchrun(data: Path, folder: Path, agents: int) -> float:
    """Seconds from the kill of a rank to the end of all agents."""
    run_dir = folder / f"torchrun-{agents}"
    run_dir.mkdir(parents=True)
    tree = tiny_config(data, run_dir, train={"max_steps": 100_000}, validation={"every_steps": 0})
    place = ["--standalone", "--nproc_per_node=2"]
    if agents == 2:
        place = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{free_port()}"]
    start = [sys.executable, "-m", "torch.distributed.run", *place, "-m", "pretrain", "train", "--config"]
    command = [*start, str(write_config(run_dir / "c.yaml", tree))]
    quietly = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}
    processes = [subprocess.Popen(command, **quietly) for _ in range(agents)]  # type: ignore[call-overload]
    while not ((run_dir / "metrics.jsonl").exists() and 3 in records(run_dir, "train")):
        time.sleep(0.05)
    last = processes[-1].pid
    victim = int(Path(f"/proc/{last}/task/{last}/children").read_text().split()[-1])
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    statuses = [process.wait(120) for process in processes]
    assert all(statuses), statuses
    return round(time.monotonic() - began, 2)


def quiet(data: Path, folder: Path, steps: int, limit_s: float) -> dict:
    """Steps without a fault, with a short limit."""
    folder.mkdir()
    tree = tiny_config(data, folder, train={"max_steps": steps, "log_every": 10}, validation={"every_steps": 500})
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    tree["model"] |= small
    tree["train"] |= {"global_batch_size": 4}
    tree["checkpoint"] = {"every_steps": 500, "keep_last": 2}
    tree["watchdog"] = {"limit_s": limit_s, "first_step_limit_s": 60.0}
    tree["data"]["verify"] = "sizes"
    began = time.monotonic()
    pids = start_training(2, config.load(write_config(folder / "c.yaml", tree)))
    statuses = finish(pids, patience_s=600, limit_s=7200)
    alarms = int((folder / "crash-report.txt").exists())
    reached = max(records(folder, "train"))
    facts = {"limit_s": limit_s, "statuses": statuses, "alarms": alarms, "seconds": round(time.monotonic() - began)}
    return {"steps": reached, **facts}


def cost(data: Path, folder: Path) -> dict:
    """Microseconds of a place in the training thread; milliseconds to start and to end the watcher."""
    folder.mkdir()
    settings = config.load(write_config(folder / "c.yaml", tiny_config(data, folder)))
    began = time.perf_counter()
    with Watchdog(settings) as watchdog:
        started = time.perf_counter()
        for step in range(100_000):
            watchdog.at("forward and backward", step)
        done = time.perf_counter()
    ended = time.perf_counter()
    figures = {
        "start_ms": 1e3 * (started - began),
        "place_us": 1e6 * (done - started) / 1e5,
        "end_ms": 1e3 * (ended - done),
    }
    return {name: round(figure, 2) for name, figure in figures.items()}


def main() -> int:
    """Run all, write and print; status 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limits", type=float, nargs="+", default=[4.0, 12.0])
    parser.add_argument("--times", type=int, default=2, help="trials of each kind and limit")
    parser.add_argument("--deaths", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--quiet_limit_s", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_data(folder / "data")
        found: dict = {"cost": cost(data, folder / "cost"), "deaths": deaths(data, folder, args.deaths)}
        found["torchrun_seconds"] = {str(agents): under_torchrun(data, folder, agents) for agents in (1, 2)}
        found["hangs"] = hangs(data, folder, args.limits, args.times)
        found["quiet"] = quiet(data, folder / "quiet", args.steps, args.quiet_limit_s)
    found |= machine()
    found["cpus"] = os.cpu_count()
    good = found["quiet"]["alarms"] == 0 and found["quiet"]["steps"] == args.steps
    good &= not any(found["quiet"]["statuses"])
    good &= all(h["named"] == h["all_ended_non_zero"] == h["of"] for h in found["hangs"].values())
    good &= all(max(h["end_over_limit"]) <= 1.5 for h in found["hangs"].values())
    good &= found["deaths"]["named"] == args.deaths and max(found["deaths"]["seconds"]) <= 10
    good &= max(found["torchrun_seconds"].values()) <= 10
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
