"""`pretrain verify-resume`: proves on this machine that a stopped run is the same run.

    straight:  1 ─────────────────────────────────> n        the reference
    again:     1 ─────────────────────────────────> n        two undisturbed runs must agree before anything else is believed
    killed:    1 ────────> SIGKILL ... SIGKILL ───> n        at random moments after the first save, started again each time
    elsewhere: 1 ────────> SIGKILL, other ranks ──> n        started again on other numbers of ranks

Every run is a real `pretrain train` on this machine, with `train.deterministic`, in processes of its own, each of which gets
the SIGKILL. Compared are, for every step, the fingerprint of its sequences, loss, gradient norm and learning rate, and at the
end every tensor of the last checkpoint: to the bit where the number of ranks is the same, to `LOSS_TOLERANCE` in the loss where
it is not. And each start after a kill must have gone on from a checkpoint: one that began anew would come to the same figures.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pretrain import checkpoint, config, processes
from pretrain.cli import Parser, fail
from pretrain.hf import same_bits

_TRIES = 3
"""Of a run that is over before it could be killed: its steps take no time, or this machine has much else to do."""

LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3, "fp8": 2e-2}
"""By precision: largest difference of a loss (nats a token) between numbers of ranks, which sum in another order."""


def main(argv: list[str]) -> int:
    """The command `pretrain verify-resume`; exit status 1 where a promise does not hold."""
    parser = Parser(
        prog="pretrain verify-resume",
        description="Prove on this machine that a killed run is the same run. Each run is a short one of the whole model and "
        "batch, with train.deterministic; a smaller batch, or groups of hybrid sharding within this machine, by --overrides.",
    )
    parser.add_argument("--config", type=Path, required=True, help="The run's configuration (path).")
    parser.add_argument("--steps", type=int, default=40, help="Length of each run (steps).")
    parser.add_argument("--kills", type=int, default=3, help="SIGKILLs in a disturbed run.")
    parser.add_argument(
        "--ranks",
        type=list[int] | None,
        default=None,
        help="Numbers of ranks; the first is the reference. None: all of the machine's GPUs and half of them, or 1 and 2 on "
        "CPUs, as far as the batch divides by them.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Fixes the moments of the kills (whole number).")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="Folder for the runs (path), where those of before are replaced; none: beside the run's own.",
    )
    parser.add_argument("--overrides", type=list[str], default=[], help="More of `pretrain train`'s options.")
    args = parser.parse_args(argv)
    try:
        settings = config.parse(["--config", str(args.config), *args.overrides], parser.prog)
        numbers = _numbers_of_ranks(settings) if args.ranks is None else args.ranks
        if args.steps < 4 or args.kills < 0 or not numbers or min(numbers) < 1:
            raise ValueError(
                f"--steps is {args.steps}, --kills {args.kills} and --ranks {numbers}; at least 4 steps, no kills and one number "
                "of at least 1 are needed"
            )
        for number in numbers:
            config.grad_accum_steps(settings.train, number)
        out = args.out or Path(f"{settings.run_dir}-verify-resume")
        if out.exists() and any(out.iterdir()) and not (out / "straight" / "output.txt").exists():
            raise ValueError(
                f"--out is {out}, which holds something other than such runs; name a folder that is empty or not there"
            )
    except (ValueError, OSError) as error:
        fail(parser.prog, error)
    trial = Trial(args.config, args.overrides, args.steps, out, LOSS_TOLERANCE[settings.parallel.precision])
    try:
        outcomes = trial.all(numbers, args.kills, random.Random(args.seed))
    except RuntimeError as error:  # a run that should have ended well did not
        fail(parser.prog, error, 1)
    except KeyboardInterrupt:
        return 130
    Console(width=None if sys.stdout.isatty() else 160).print(_table(outcomes, args.steps))
    bad = [outcome.name for outcome in outcomes if not outcome.holds]
    print(
        f"FAILED: {', '.join(bad)}; the runs are in {out}"
        if bad
        else f"A resume is the same run. The runs are in {out}"
    )
    return 1 if bad else 0


def _numbers_of_ranks(settings: config.Config) -> list[int]:
    """The most GPUs that the batch divides by, since fewer may not hold the model, and half of them; one and two CPUs."""
    if settings.parallel.strategy == "single":
        return [1]
    gpus = torch.cuda.device_count() if settings.parallel.accelerator != "cpu" else 0
    sequences = settings.train.global_batch_size // settings.train.micro_batch_size
    divides = [ranks for ranks in range(1, (gpus or 2) + 1) if sequences % ranks == 0]
    if gpus == 0 or len(divides) == 1:
        return divides
    return [divides[-1], max(ranks for ranks in divides if ranks <= divides[-1] / 2)]


@dataclass(frozen=True)
class Outcome:
    """How a run compares with the reference."""

    name: str
    ranks: str
    kills: int
    resumed: list[int]
    """The steps after which it was taken up again, one a kill."""
    same_sequences: bool
    same_bits: bool
    loss_difference: float
    must_be_same_bits: bool
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether it is what was promised."""
        was_resumed = len(self.resumed) == self.kills and all(step > 0 for step in self.resumed)
        as_promised = self.same_bits if self.must_be_same_bits else self.loss_difference <= self.tolerance
        return was_resumed and self.same_sequences and as_promised


@dataclass(frozen=True)
class Trial:
    """Runs `config` for some steps, in folders of its own."""

    config: Path
    overrides: list[str]
    steps: int
    out: Path
    tolerance: float

    def all(self, ranks: list[int], kills: int, moments: random.Random) -> list[Outcome]:
        """Every comparison, one after the other."""
        reference = self.run("straight", [ranks[0]], [])
        outcomes = [self._compare("again", reference, [ranks[0]], [])]
        plan = {"killed": [ranks[0]] * (kills + 1)}
        for number in ranks[1:]:
            plan[f"straight on {number}"] = [number]
            plan[f"killed on {number}"] = [number] * (kills + 1)
        if len(ranks) > 1:
            plan["elsewhere"] = [ranks[i % len(ranks)] for i in range(kills + 1)]
        for name, numbers in plan.items():
            stops = sorted(moments.uniform(self._every + 1, self.steps - 1) for _ in numbers[1:])
            if name == f"killed on {numbers[0]}":  # against the undisturbed run on as many ranks
                outcomes.append(self._compare(name, self.out / f"straight-on-{numbers[0]}", numbers, stops))
            else:
                outcomes.append(self._compare(name, reference, numbers, stops))
        return outcomes

    def _compare(self, name: str, reference: Path, ranks: list[int], stops: list[float]) -> Outcome:
        expected, got, folder = read_trajectory(reference), read_trajectory(self.run(name, ranks, stops)), _folder(name)
        same_ranks = set(ranks) == {_world_size(reference)}
        complete = list(got) == list(expected) == list(range(1, self.steps + 1))
        differences = [_difference(got[k]["loss"], expected[k]["loss"]) for k in expected if k in got]
        bits = ("loss", "grad_norm", "lr")
        return Outcome(
            name=name,
            ranks=", ".join(map(str, dict.fromkeys(ranks))),
            kills=len(stops),
            resumed=[line["step"] for line in _read_lines(self.out / folder) if line["kind"] == "start"][1:],
            same_sequences=complete and all(got[k]["data_hash"] == expected[k]["data_hash"] for k in expected),
            same_bits=complete
            and all(_bits(got[k][figure]) == _bits(expected[k][figure]) for k in expected for figure in bits)
            and _same_tensors(reference, self.out / folder),
            loss_difference=max(differences, default=float("inf")),
            must_be_same_bits=same_ranks,
            tolerance=self.tolerance,
        )

    def run(self, name: str, ranks: list[int], stops: list[float]) -> Path:
        """Train to the end on `ranks[0]` ranks, killed when the log has come to `stops[0]`, then on `ranks[1]`, and so on.

        The fraction of a stop says how long to wait after its step is logged, as a part of a step's time: a kill can fall
        anywhere, into a save as well. A run that came to its end before it could be killed is run once more, and again.

        Raises:
            RuntimeError: a run did not end as it should, or was over too soon each time.
        """
        for _ in range(_TRIES):
            run_dir = self.out / _folder(name)
            shutil.rmtree(run_dir, ignore_errors=True)
            run_dir.mkdir(parents=True)
            starts = enumerate(zip(ranks, [*stops, None]), start=1)
            if all(self._start(name, run_dir, start, number, stop) for start, (number, stop) in starts):
                return run_dir
        raise RuntimeError(
            f"{name} was over before it could be killed, {_TRIES} times: give --steps more than {self.steps}"
        )

    def _start(self, name: str, run_dir: Path, start: int, ranks: int, stop: float | None) -> bool:
        """One start of the run, killed at `stop` or trained to its end; False: it was over before it could be killed."""
        killed = "" if stop is None else f", killed after step {int(stop)}"
        print(f"{name}: {ranks} rank{'s' * (ranks > 1)}{killed}", flush=True)
        with open(run_dir / "output.txt", "a") as output:
            process = subprocess.Popen(
                self._command(run_dir, ranks), stdout=output, stderr=output, start_new_session=True
            )
            try:
                if stop is None:
                    process.wait()
                else:
                    time.sleep(stop % 1 * _wait_for_step(run_dir, start, int(stop), process))
            finally:  # after Ctrl-C too, which does not reach a session of its own
                processes.kill_family(process)
                process.wait()
        if process.returncode not in (0, -signal.SIGKILL if stop is not None else 0):
            raise RuntimeError(f"{name} ended with status {process.returncode}; see {output.name}")
        return stop is None or _read_lines(run_dir)[-1]["kind"] != "stop"

    @property
    def _every(self) -> int:
        """Steps between saves."""
        return max(1, self.steps // 8)

    def _command(self, run_dir: Path, ranks: int) -> list[str]:
        settings = {"run_dir": run_dir, "train.max_steps": self.steps, "train.log_every": 1, "logger": "none"}
        settings |= {
            "resume": "null",
            "checkpoint.keep_every": 0,
            "checkpoint.every_steps": self._every,
            "checkpoint.keep_last": 2,
            "optim.warmup_steps": self.steps // 4,
            "optim.lr_decay_steps": 0,
            "train.stop_after_step": 0,
            "train.leave_out": "[]",
        }
        options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launch, "-m", "pretrain", "train", "--config", str(self.config)]
        return [*command, *self.overrides, "--train.deterministic", "true", *options]


def _folder(name: str) -> str:
    return name.replace(" ", "-")


def _bits(figure: float | None) -> str | None:
    """None, which stands for one that is not finite, as it is."""
    return None if figure is None else float(figure).hex()


def _difference(a: float | None, b: float | None) -> float:
    if a is None or b is None:
        return 0.0 if a == b else float("inf")
    return abs(a - b)


def read_trajectory(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Step -> its line of metrics; of a step that was trained twice the last."""
    lines = sorted(_read_lines(run_dir), key=lambda record: record["step"])
    return {record["step"]: record for record in lines if record["kind"] == "train"}


def _read_lines(run_dir: Path) -> list[dict[str, Any]]:
    lines = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue  # torn by a kill
    return lines


def _wait_for_step(run_dir: Path, starts: int, step: int, process: subprocess.Popen[bytes]) -> float:
    """Wait until the run has been started `starts` times, has come to `step` since, and a checkpoint is there, or it is over.

    Returns a step's time (seconds).
    """
    while True:
        ended = process.poll() is not None  # looked at before the log: what ended well has come to the step
        lines = _read_lines(run_dir) if (run_dir / "metrics.jsonl").exists() else []
        begun = [number for number, record in enumerate(lines) if record["kind"] == "start"]
        since = lines[begun[-1] :] if len(begun) == starts else []
        for record in since:
            trained = record["kind"] == "train" and record["step"] >= step
            if record["kind"] == "stop" or (trained and checkpoint.committed(run_dir)):
                return record.get("step_time_s", 0.0)
        if ended:
            break
        time.sleep(0.02)
    raise RuntimeError(
        f"training ended with status {process.returncode} before step {step}; see {run_dir / 'output.txt'}"
    )


def _world_size(run_dir: Path) -> int:
    return checkpoint.read_state(checkpoint.latest(run_dir, warn=print))["world_size"]


def _same_tensors(a: Path, b: Path) -> bool:
    """Whether the newest checkpoints of two runs hold the same bits: weights and optimizer."""
    first, second = (checkpoint.load_tensors(checkpoint.latest(run_dir, warn=print)) for run_dir in (a, b))
    return first.keys() == second.keys() and all(same_bits(first[name], second[name]) for name in first)


def _table(outcomes: list[Outcome], steps: int) -> Table:
    table = Table(title=f"against a straight run of {steps} steps", title_justify="left")
    for name in (
        "run",
        "ranks",
        "kills",
        "resumed after",
        "sequences",
        "losses, norms, weights",
        "largest loss difference",
        "",
    ):
        table.add_column(name)
    for o in outcomes:
        bits = (
            "bit-identical" if o.same_bits else ("DIFFERENT" if o.must_be_same_bits else "within the reduction order")
        )
        sequences = "identical" if o.same_sequences else "DIFFERENT"
        held = "holds" if o.holds else "FAILS"
        resumed = ", ".join(map(str, o.resumed))
        table.add_row(o.name, o.ranks, str(o.kills), resumed, sequences, bits, f"{o.loss_difference:.1e}", held)
    return table
