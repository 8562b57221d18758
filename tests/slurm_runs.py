"""Runs on a real SLURM, disturbed again and again: python tests/slurm_runs.py --folder DIR [--requeues 14] [--torchrun 6]

A tiny model trains on two nodes through launch/slurm.sbatch, and nobody but SLURM and the script starts it again:

    USR1       scancel --signal=USR1                TERM       SIGTERM to one rank, any
    time       the job's limit comes near           requeue    scontrol requeue
    node       a node is set down, and comes back   crash      SIGKILL to one rank, any

The kinds are mixed. In the end there must be one continuous trajectory, to the bit that of an undisturbed run, and no step may
be lost but by a crash. The summary goes to benchmarks/results/slurm.json; tests/test_launch_slurm.py holds the short form.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import slurm
import torch
from conftest import LONGER, pretrain, tiny_config, trajectory, write_config, write_dataset

from pretrain.versions import own_version

CRIA = own_version()
"""What is measured, as it was when it began."""
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "slurm.json"


@dataclass
class Job:
    """A run on two nodes, one task each, in a folder of its own."""

    cluster: slurm.Slurm
    folder: Path
    number: str = ""

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def submit(
        self,
        datasets: Path,
        *arguments: object,
        options: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        **sections: object,
    ) -> None:
        """Submit the run; `sections` are merged into its configuration, `environment` goes to the job."""
        tree = tiny_config(datasets, self.run_dir, **{**LONGER, **sections})
        config = write_config(self.folder / "c.yaml", tree)
        small = [
            "--nodes=2",
            "--ntasks-per-node=1",
            "--gpus-per-node=0",
            "--cpus-per-task=1",
            "--mem=1000",
            f"--output={self.folder}/job.log",
        ]
        path = f"{Path(sys.executable).parent}:{self.cluster.environment['PATH']}"
        # A node that comes back at once can leave the next start with less than was asked for: nobody waits five minutes here.
        variables = {"PATH": path, "LOGS": f"{self.folder}/logs", "STEP_WAIT_S": "10", **(environment or {})}
        export = ",".join(["ALL", *(f"{name}={value}" for name, value in variables.items())])
        command = ["sbatch", "--parsable", *small, f"--export={export}", *options]
        script = [ROOT / "launch" / "slurm.sbatch", "--config", config, *arguments]
        self.number = self.cluster.run(*command, *script, cwd=ROOT).stdout.strip()

    def until(self, what: str, holds: Callable[[], bool], hurry: bool = False) -> None:
        deadline = time.monotonic() + 300
        while not holds():
            if hurry:
                self.cluster.hurry(self.number)
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} did not come\n{self.logs()}")
            time.sleep(0.1)

    def until_requeued(self) -> None:
        """Wait until all of a start that lost a node has left, also by the word of that node's slurmd.

        It looks every second whether the job is gone, and kills what it finds of it after KillWait (30 s): it would be the next
        start, which nobody but a test begins so soon.
        """
        self.until("the requeue", lambda: set(self.cluster.state(self.number).values()) == {"PENDING"})
        time.sleep(5)

    def until_step(self, restart: int, steps: int, hurry: bool = True) -> None:
        """Wait until the job was started again `restart` times and has trained so many steps since."""
        self.until(f"step {steps} of restart {restart}", lambda: self._trained(restart) >= steps, hurry)

    def _trained(self, restart: int) -> int:
        file = self.run_dir / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        lines = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]
        begun = [number for number, line in enumerate(lines) if line["kind"] == "start"]
        return sum(line["kind"] == "train" for line in lines[begun[restart] :]) if len(begun) > restart else -1

    def until_over(self, hurry: bool = True) -> str:
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        self.until("the end", lambda: set(self.cluster.state(self.number).values()) <= over, hurry)
        return self.cluster.state(self.number)[self.number]

    def sleep_until_the_end(self, margin_s: int) -> None:
        """Let the ranks rest until the job's time is over but for the margin, then go on."""
        shown = self.cluster.run("squeue", "-h", "-j", self.number, "-o", "%e").stdout.strip()
        end = datetime.fromisoformat(shown).timestamp()
        self.cluster.run("scancel", "--signal=STOP", self.number)
        self.until("the margin", lambda: time.time() > end - margin_s)
        # On a busy machine it may have been about to leave before.
        self.cluster.run("scancel", "--signal=CONT", self.number, check=False)

    def ranks(self) -> list[int]:
        """The processes that train, of both nodes; not what starts or watches them."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it has ended
                words = path.read_bytes().decode().split("\0")
                python = Path(words[0]).name.startswith("python") and not any(w.endswith("agent.py") for w in words)
                mine = "train" in words and any(word.startswith(f"{self.folder}/") for word in words)
                found += [int(path.parent.name)] if python and mine else []
        return found

    def lines(self) -> list[dict[str, Any]]:
        """The run's log."""
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    def stops(self) -> list[str]:
        return [line["reason"] for line in self.lines() if line["kind"] == "stop"]

    def resumed(self) -> list[str | None]:
        """What the run had stopped by before each start but the first, None where it was killed.

        Each start after a stop must go on where that was, which is after the last trained step: none may be lost.
        """
        found: list[str | None] = []
        trained, stopped = 0, None
        for line in self.lines():
            if line["kind"] == "train":
                trained = line["step"]
            elif line["kind"] == "stop":
                assert line["step"] == trained, f"stopped after step {line['step']}, and trained up to {trained}"
                stopped = line
            elif line["kind"] == "start":
                if stopped is not None:
                    lost = f"stopped by {stopped['reason']} after step {stopped['step']}, went on after {line['step']}"
                    assert line["step"] == stopped["step"], lost
                found.append(stopped and stopped["reason"])
                trained, stopped = line["step"], None
        return found[1:]

    def logs(self) -> str:
        paths = [self.folder / "job.log", *sorted((self.folder / "logs").glob("*"))]
        return "\n".join(f"{path.name}:\n{path.read_text()[-6000:]}" for path in paths if path.is_file())


KINDS = ("USR1", "TERM", "time", "requeue", "node", "crash")
WARNED = ("USR1", "TERM", "time")
"""After these a run must have saved; SLURM gives warning of the others, too, but for the crash, and may not wait."""
MARGIN_S = 20
"""Of the job's minute; what is left is the time that a start may take."""


def disturb(job: Job, kind: str, moments: random.Random) -> None:
    """Make one disturbance; returns when the job no longer runs."""
    cluster, number = job.cluster, job.number
    if kind == "USR1":
        cluster.run("scancel", "--signal=USR1", number)
    elif kind in ("TERM", "crash"):
        ranks = job.ranks()
        assert len(ranks) == 2, f"{len(ranks)} processes train"
        os.kill(moments.choice(ranks), signal.SIGTERM if kind == "TERM" else signal.SIGKILL)
    elif kind == "time":
        job.sleep_until_the_end(MARGIN_S)
    elif kind == "requeue":
        cluster.run("scontrol", "requeue", number)
    elif kind == "node":
        cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    job.until("the end of a start", lambda: "RUNNING" not in cluster.state(number).values())
    if kind == "node":
        job.until_requeued()
        cluster.run("scontrol", "update", "nodename=node2", "state=idle")


def series(
    cluster: slurm.Slurm, data: Path, folder: Path, launcher: str, requeues: int, moments: random.Random
) -> dict:
    """One job, disturbed so often; what became of it."""
    steps, job = 40 * requeues, Job(cluster, folder)
    folder.mkdir()
    sections = {**LONGER, "train": {**LONGER["train"], "max_steps": steps}}  # type: ignore[dict-item]
    straight = write_config(folder / "s.yaml", tiny_config(data, folder / "straight", **sections))
    pretrain("train", "--config", straight, ranks=2)
    kinds = [KINDS[n % len(KINDS)] for n in range(requeues)]
    moments.shuffle(kinds)
    job.submit(
        data,
        "--train.stop_margin_s",
        MARGIN_S,
        options=("--time=1", "--signal=URG@0"),
        environment={"LAUNCHER": launcher},
        **sections,
    )
    disturbed, problem, waits = Counter[str](), None, []
    try:
        for restart, kind in enumerate(kinds):
            before = time.monotonic()
            job.until_step(restart, steps=moments.randrange(1, 8), hurry=False)
            waits.append(round(time.monotonic() - before, 1))
            disturb(job, kind, moments)
            disturbed[kind] += 1
            print(f"{launcher}: {restart + 1} of {requeues}, {kind}, after {waits[-1]} s", flush=True)
        assert job.until_over(hurry=False) == "COMPLETED", job.logs()
        assert trajectory(job.run_dir) == trajectory(folder / "straight"), "another trajectory"
        resumed = job.resumed()
        assert len(resumed) == requeues, f"{kinds}, and {len(resumed)} starts again"
        for kind, reason in zip(kinds, resumed):
            assert reason is not None or kind not in WARNED, f"{kinds}, and the run had stopped by {resumed}"
        again = sum(line["kind"] == "train" for line in job.lines()) - steps
    except AssertionError as error:
        problem, again = str(error), None
    facts = {"requeues": requeues, "kinds": dict(disturbed), "steps": steps, "steps_trained_twice": again}
    return {**facts, "seconds_from_stop_to_new_steps": sorted(waits[1:]), "problem": problem}


def main() -> int:
    """Run all, print and write the summary; status 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requeues", type=int, default=14, help="with one task a rank")
    parser.add_argument("--torchrun", type=int, default=6, help="with one torchrun agent a node")
    parser.add_argument(
        "--requeue_s", type=int, default=20, help="SLURM's wait before a requeued job starts (cred_expire)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not slurm.available():
        print("needs root and slurmctld, slurmd, slurm-client, munge")
        return 2
    args.folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate("ab"):
        write_dataset(args.folder / "data" / name / "train", 20_000, seed)
        write_dataset(args.folder / "data" / name / "validation", 1_000, 10 + seed)
    cluster_folder, summary = Path(tempfile.mkdtemp(prefix="slurm")), {}
    try:
        with slurm.Slurm(cluster_folder, requeue_s=args.requeue_s) as cluster:
            version = cluster.run("sinfo", "--version").stdout.split()[1]
            for launcher, requeues in (("srun", args.requeues), ("torchrun", args.torchrun)):
                if requeues:
                    where = args.folder / launcher
                    moments = random.Random(args.seed)
                    summary[launcher] = series(cluster, args.folder / "data", where, launcher, requeues, moments)
    finally:
        shutil.rmtree(cluster_folder, ignore_errors=True)
    versions = {"cria": CRIA, "python": platform.python_version(), "torch": torch.__version__, "slurm": version}
    print(json.dumps(summary, indent=1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"versions": versions, "cpus": os.cpu_count(), "cred_expire_s": args.requeue_s}
    before = json.loads(args.out.read_text()) if args.out.exists() else {}  # of a part that was left out now
    args.out.write_text(json.dumps({**before, **summary, **facts}, indent=1) + "\n")
    return 1 if any(part["problem"] for part in summary.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
