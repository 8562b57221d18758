"""Which settings are the fastest here: micro-batch, compilation, operations, activation checkpointing.

    start ─> micro-batches ─> compile ─> operations ─> recompute ─> checkpointing ─> best

Each setting with its own micro-batches, but for operations where the model is compiled.

One setting after the other, the best kept: not every combination. Each is a `pretrain bench` in processes of its own, so that
one that runs out of memory is a row of the table and touches no other. A row is the whole step of the global batch, of which at
most `MICRO_STEPS` micro-steps are run: with one alone, the gradients of those before would be missing from the peak of memory,
and each micro-batch would pay for an update, which is dearest to the smallest.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pretrain import backends, bench_result, config, parallel
from pretrain.bench_result import Result, Row, SoFar
from pretrain.bench_rows import (
    FAILED,
    NOT_ASKED_FOR,
    NOT_TIMED,
    REFUSED,
    SHORTEST_ROW_S,
    Budget,
    Child,
    asked_for,
    bench_command,
)
from pretrain.bench_timing import DOES_NOT_FIT, MICRO_STEPS, on_gpu
from pretrain.sections import OpsConfig

GAIN = 1.01
"""A larger micro-batch must be so many times as fast to look further."""


RECOMPUTE = ("none", "elementwise", "mlp")
"""What `parallel.recompute` knows, from the least to the most."""

AS_CONFIGURED = "as configured"

ANY_GPU = (8, 0)
"""A compute capability that every library can do with: what it refuses then, it refuses for the configuration's sake."""


@dataclass(frozen=True)
class Point:
    """One combination of settings."""

    micro_batch_size: int
    compile: bool
    operations: str
    """A library that computes what it can of them, or `AS_CONFIGURED`."""
    checkpointing: int
    recompute: str = "none"

    @property
    def name(self) -> str:
        """How the row is called."""
        kind = "compiled" if self.compile else "eager"
        extras = [f"operations {self.operations}"] if self.operations != AS_CONFIGURED else []
        extras += [f"checkpointing every {self.checkpointing}"] if self.checkpointing else []
        extras += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        return ", ".join([f"micro-batch {self.micro_batch_size} {kind}", *extras])


def sweep(args: Any, settings: config.Config, keys: list[str], so_far: SoFar) -> Result:
    """Search from what is configured; the result names the best that fits, and the keys that set it."""
    subject = {
        **bench_result.subject(settings, args.ranks, args.data),
        "memory_limit_gib": args.memory_limit_gib,
        "grad_accum_steps": args.grad_accum_steps,
    }
    so_far.check_comparable("sweep", subject)
    config.grad_accum_steps(settings.train, args.ranks)  # whole, or refused as training would
    with tempfile.TemporaryDirectory(prefix="cria-sweep-") as scratch:
        search = Sweep(args, settings, keys, Path(scratch))

        def after_row(point: Point, row: Row) -> None:
            so_far.add(_result(args, search, search.fastest(), subject))
            if row["problem"] != NOT_ASKED_FOR:  # minutes go by between two lines
                said = row["problem"] or f"{row['tokens_per_sec_per_gpu']:,.0f} tokens/s/GPU"
                print(f"{point.name}: {said}", flush=True)

        search.after_row = after_row
        best = search.best()
    return _result(args, search, best, subject)


def _result(args: Any, search: "Sweep", best: Point | None, subject: dict[str, Any]) -> Result:
    tried = {point: row for point, row in search.tried.items() if row["problem"] != NOT_ASKED_FOR}
    rows = [{**row, "name": point.name} for point, row in tried.items()]
    limit = f" in {args.memory_limit_gib:g} GiB" if args.memory_limit_gib else ""
    untimed = sum((row["problem"] or "").startswith(NOT_TIMED) for row in rows)
    caveat = f" Of {len(rows)} rows tried, {untimed} not timed: --budget_s was over." if untimed else ""
    if best is None:
        verdict = f"{_why_none(rows, limit)}{caveat}"
    else:
        row = rows[list(tried).index(best)]
        row["note"] = ", ".join(["best", *filter(None, [row.get("note")])])
        verdict = f"Best{limit}: {best.name}: `{' '.join(search.keys(best))}`.{_near(rows, row)}{caveat}"
    steps = (
        f"Speed is that of a whole step. At most {MICRO_STEPS} of its micro-steps are timed, each further one counts as long as "
        "the second; spread, data and communication are those of the timed ones."
    )
    title = f"{args.config.stem}: which settings are the fastest{limit}"
    notes = [*bench_result.notes(args.steps, args.warmup), *bench_result.of_documents(search.settings, args.data)]
    return Result("sweep", title, subject, rows, [verdict, steps, *notes])


def _near(rows: list[Row], best: Row) -> str:
    """Which other rows lie within the spread of the best, as one more sentence."""
    spread_pct = best.get("step_time_spread_pct", 0.0)
    least = best["tokens_per_sec_per_gpu"] * (1 - spread_pct / 100)
    near = [row["name"] for row in rows if row["problem"] is None and row["tokens_per_sec_per_gpu"] >= least]
    near.remove(best["name"])
    return f" Within its spread of {spread_pct:.1f}% lie as well: {'; '.join(near)}." if near else ""


def _why_none(rows: list[Row], limit: str) -> str:
    if not rows:
        return "Nothing that was come to has a name that begins as --rows says."
    if all(row["problem"].startswith(DOES_NOT_FIT) for row in rows):
        return f"Nothing that was tried fits{limit}."
    return "Nothing that was tried could be timed."


class Sweep:
    """The search; `tried` holds every point's row, in the order of the trials."""

    def __init__(self, args: Any, settings: config.Config, keys: list[str], scratch: Path):
        self._args, self.settings, self._keys, self._scratch = args, settings, keys, scratch
        self._budget = Budget(args.budget_s)
        self._sequences = settings.train.global_batch_size // args.ranks
        self.tried: dict[Point, Row] = {}
        self.after_row: Callable[[Point, Row], None] = lambda point, row: None

    def best(self) -> Point | None:
        """Go along one setting after the other; None where nothing fits."""
        settings = self.settings
        checkpointing, recompute = settings.parallel.activation_checkpointing, settings.parallel.recompute
        start = Point(
            settings.train.micro_batch_size, settings.parallel.compile, AS_CONFIGURED, checkpointing, recompute
        )
        best = self._best_micro_batch(start)
        best = self._faster(best, self._worth_a_search(replace(best, compile=not best.compile), best))
        for library in _libraries(settings):
            other = replace(best, operations=library)
            if self._computes_otherwise(other, self.tried[best]):
                best = self._faster(best, other if best.compile else self._worth_a_search(other, best))
        for part in RECOMPUTE:
            if part != recompute:
                best = self._faster(best, self._best_micro_batch(replace(best, recompute=part)))
        other = replace(best, checkpointing=0 if checkpointing else 1, recompute="none")
        best = self._faster(best, self._best_micro_batch(other))
        return best if self._speed(best) > 0 else None

    def _worth_a_search(self, point: Point, best: Point) -> Point:
        """`point` with its best micro-batch; as it is where it fits with the micro-batch of `best` and is slower than `best`."""
        fits_and_is_slower = 0 < self._speed(point) <= self._speed(best)
        return point if fits_and_is_slower else self._best_micro_batch(point)

    def _best_micro_batch(self, point: Point) -> Point:
        """Halve the micro-batch until it fits, or else double it until it does not, or gains nothing.

        Only while it divides what a rank takes a step: training refuses others. What has another problem than its memory is
        not halved.
        """
        while self._too_large(point) and self._divides(point.micro_batch_size // 2):
            point = replace(point, micro_batch_size=point.micro_batch_size // 2)
            if self._speed(point) > 0:
                return point
        while self._speed(point) > 0:
            larger = replace(point, micro_batch_size=2 * point.micro_batch_size)
            if not self._divides(larger.micro_batch_size) or self._speed(larger) < GAIN * self._speed(point):
                break
            point = larger
        return point

    def _too_large(self, point: Point) -> bool:
        """Whether it does not fit, or was not asked for, while a smaller one may be."""
        problem = "" if self._speed(point) > 0 else self.tried[point]["problem"]
        return problem == NOT_ASKED_FOR or problem.startswith(DOES_NOT_FIT)

    def _divides(self, micro_batch_size: int) -> bool:
        return micro_batch_size > 0 and self._sequences % micro_batch_size == 0

    def _faster(self, a: Point, b: Point) -> Point:
        return b if self._speed(b) > self._speed(a) else a

    def _speed(self, point: Point) -> float:
        """Tokens/s/GPU, 0 for what has a problem; timed when it is first asked for.

        Raises:
            ValueError: the first of all is refused or fails, and not for its memory: so would all others, most likely.
        """
        if point not in self.tried:
            row = self._time(point)
            problem, first = row["problem"] or "", all(r["problem"] == NOT_ASKED_FOR for r in self.tried.values())
            if first and problem.startswith(REFUSED):
                raise ValueError(problem.removeprefix(REFUSED))
            if first and problem.startswith(FAILED):
                raise ValueError(f"{point.name}: {problem}")
            self.tried[point] = row
            self.after_row(point, row)
        row = self.tried[point]
        return 0.0 if row["problem"] else row["tokens_per_sec_per_gpu"]

    def fastest(self) -> Point | None:
        """Of those that were tried until now; None where none fits."""
        point = max(self.tried, key=self._speed)
        return point if self._speed(point) > 0 else None

    def keys(self, point: Point) -> list[str]:
        """The keys of the configuration that set it."""
        keys = ["--train.micro_batch_size", str(point.micro_batch_size)]
        keys += ["--parallel.compile", str(point.compile).lower()]
        keys += [part for name in self._taken(point) for part in (f"--model.ops.{name}", point.operations)]
        keys += ["--parallel.activation_checkpointing", str(point.checkpointing)]
        return [*keys, "--parallel.recompute", point.recompute]

    def _taken(self, point: Point) -> list[str]:
        """The operations that the point's library computes: all that it has and the configuration allows it."""
        library, settings = point.operations, self.settings
        if library == AS_CONFIGURED:
            return []
        situation = parallel.situation(
            ANY_GPU,
            settings.model,
            replace(settings.parallel, compile=point.compile),
            settings.data.intra_document,
            settings.train.deterministic,
        )
        having = [name for name, backend in OpsConfig.by(library).items() if backend == library]
        return [name for name in having if backends.obstacle(name, library, situation) is None]

    def _computes_otherwise(self, point: Point, row: Row) -> bool:
        """Whether the point computes anything by another library than `row` did."""
        before = row.get("backends", {})
        return any(before.get(name) != point.operations for name in self._taken(point))

    def _time(self, point: Point) -> Row:
        if not asked_for(point.name, self._args.rows):
            return {"problem": NOT_ASKED_FOR}
        if self._budget.too_short(SHORTEST_ROW_S):
            return {"problem": f"{NOT_TIMED}: no time left"}
        args = self._args
        micro_steps = args.grad_accum_steps or self._sequences // point.micro_batch_size
        timed = min(MICRO_STEPS, micro_steps)
        sequences = point.micro_batch_size * args.ranks * timed
        out = self._scratch / f"{len(self.tried)}.json"
        options = ["--config", str(args.config), *self._keys, *self.keys(point)]
        options += ["--train.global_batch_size", str(sequences), "--of_micro_steps", str(micro_steps)]
        options += ["--data", args.data]
        options += ["--steps", str(args.steps), "--warmup", str(args.warmup), "--out", str(out.with_suffix(""))]
        if args.memory_limit_gib:
            options += ["--memory_limit_gib", str(args.memory_limit_gib)]
        row = Child(bench_command(options, out, args.ranks), out, self._budget.left()).row()
        if row["problem"] is None:
            row["note"] = f"{micro_steps} micro-step{'s' * (micro_steps > 1)} a step, {timed} timed"
        return row


def _libraries(settings: config.Config) -> list[str]:
    """Those that are installed; on a CPU there is PyTorch alone, where it takes cuDNN's attention its flash kernel, too."""
    if not on_gpu(settings.parallel.accelerator):
        return ["torch"]
    flash = ["torch_flash"] if torch.cuda.get_device_capability() >= (9, 0) else []
    return ["torch", *flash, *(name for name in ("liger", "flash_attn", "xformers") if backends.installed(name))]
