"""The same model through other trainers' code.

    Config ─> weights, batches as files ─> ours (pretrain bench), each peer (pretrain.peer), each in its own process ─> ratios

On a GPU one after the other, ours first and last for the drift. On a CPU in turns, a step each, so that a machine whose speed
drifts slows all alike. A peer whose first loss or first gradient's norm is not ours does not train the same model, and its
speed does not count; where no peer has ours, ours does not either.
"""

import copy
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pretrain import bench_result, bench_step, bench_timing, config
from pretrain.bench_result import Result, Row, SoFar
from pretrain.bench_rows import NOT_TIMED, SHORTEST_ROW_S, Budget, Child, asked_for, bench_command, take_turns
from pretrain.hf_config import to_hf_config
from pretrain.model import Llama
from pretrain.optim import learning_rate

LOSS_TOLERANCE = {"fp32": 2e-4, "bf16": 2e-2, "fp8": 5e-2}
"""Largest difference of a first loss from ours, by the precision of the compute (nats a token)."""
NORM_TOLERANCE = {"fp32": 1e-3, "bf16": 0.02, "fp8": 0.05}
"""Largest difference of the first gradient's norm from ours, as a share of it."""


@dataclass(frozen=True)
class Variant:
    """One way to train the model with one peer."""

    name: str
    peer: str
    """Key of `pretrain.peer.BUILDERS`."""
    package: str
    """What must be installed, as pip calls it; its import is the same with underscores."""
    options: dict[str, Any] = field(default_factory=dict)
    default: bool = False
    """As the peer comes; the others are what it offers to be faster."""
    triton: bool = False
    """Its kernels are Triton's: a GPU and liger-kernel are needed."""
    cpu_only: bool = False

    @property
    def bf16_only(self) -> bool:
        """Whether it is a variant in bf16 alone."""
        return "bf16_residual" in self.options


LIGER = {"liger": {"fused_linear_cross_entropy": True}}
LIGERS_LOSS = {"liger": {"fused_linear_cross_entropy": True, "rope": False, "rms_norm": False, "swiglu": False}}
RESIDUAL = {"bf16_residual": True}
"""Our residual stream is bf16. Under autocast theirs is fp32, which by our arithmetic costs 1 to 2%. These variants cast the
embedding's output: one line, which the peers lack on one device and FSDP2's mixed precision amounts to on many."""

ONE_PIECE = {"compile": True, "chunk_size": 0}

VARIANTS = (
    Variant("litgpt (compiled; loss in one piece; bf16 residual)", "litgpt", "litgpt", {**ONE_PIECE, **RESIDUAL}),
    Variant("torchtitan (compiled; bf16 residual)", "torchtitan", "torchtitan", {"compile": True, **RESIDUAL}),
    Variant(
        "transformers (compiled by layer; Liger's loss; bf16 residual)",
        "transformers",
        "transformers",
        {"compile": "layers", **LIGERS_LOSS, **RESIDUAL},
        triton=True,
    ),
    Variant("litgpt (compiled)", "litgpt", "litgpt", {"compile": True, "chunk_size": 128}, default=True),
    Variant("torchtitan (compiled)", "torchtitan", "torchtitan", {"compile": True}),
    Variant("stand-in for TinyLlama's code", "tinyllama", "transformers", default=True, triton=True),
    Variant("transformers (eager)", "transformers", "transformers", default=True),
    Variant("torchtitan (eager)", "torchtitan", "torchtitan", default=True),
    Variant("transformers (Liger)", "transformers", "transformers", LIGER, triton=True),
    # Traced whole, it cannot leave out the causal mask, and SDPA cannot take its fastest way.
    Variant("transformers (compiled by layer)", "transformers", "transformers", {"compile": "layers"}),
    Variant("transformers (compiled)", "transformers", "transformers", {"compile": True}),
    Variant("litgpt (compiled; bf16 residual)", "litgpt", "litgpt", {"compile": True, "chunk_size": 128, **RESIDUAL}),
    Variant("litgpt (compiled; loss in one piece)", "litgpt", "litgpt", ONE_PIECE),
    Variant("litgpt (eager; loss in one piece)", "litgpt", "litgpt", {"chunk_size": 0}, cpu_only=True),
)
"""The most telling first: a budget may end before the last."""


def peers(args: Any, settings: config.Config, so_far: SoFar) -> Result:
    """Time ours and every peer on the same weights and batches; ratios are the best of ours to each.

    Raises:
        ValueError: no peer does what is configured, or it cannot be compared with --compare.
    """
    if settings.data.intra_document:
        raise ValueError(
            "data.intra_document is true, and no peer keeps attention within documents: their models would be others; compare "
            "with --data.intra_document false"
        )
    settings = replace(
        settings, train=replace(settings.train, global_batch_size=settings.train.micro_batch_size), init_from=None
    )
    so_far.check_comparable("peers", bench_result.subject(settings, 1))
    on_gpu = bench_timing.on_gpu(settings.parallel.accelerator)
    with tempfile.TemporaryDirectory(prefix="cria-peers-") as scratch:
        bench = Bench(args, settings, Path(scratch), in_turns=not on_gpu)
        bench.hand_over()
        fp32 = settings.parallel.precision == "fp32"
        possible = [v for v in VARIANTS if not (v.cpu_only and on_gpu) and not (v.bf16_only and fp32)]
        wanted = [v for v in possible if bench.asked_for(v.name)]
        ours = {
            "cria": [],
            **({} if settings.parallel.compile else {"cria (compiled)": ["--parallel.compile", "true"]}),
        }
        if not on_gpu:
            return _compared(_in_turns(bench, ours, wanted), args, settings, in_turns=True)
        for rows in _one_after_the_other(bench, ours, wanted):
            result = _compared(copy.deepcopy(rows), args, settings, in_turns=False)
            so_far.add(result)
        return result


def _labelled(rows: list[Row]) -> list[Row]:
    """Say of every peer which row is its default and which its best."""
    for peer in {v.peer for v in VARIANTS}:
        names = {v.name: v for v in VARIANTS if v.peer == peer}
        mine = [row for row in rows if row["name"] in names and row["problem"] is None]
        best = max(mine, key=lambda row: row["tokens_per_sec_per_gpu"], default=None)
        for row in mine:
            labels = ["its default"] * names[row["name"]].default + ["its best"] * (row is best)
            row["note"] = ", ".join([*labels, row["note"]])
    return rows


AGAIN = "cria (again)"

_TO_END_S = 5.0
"""For a process that is killed at its limit to be gone, and the table to be written (seconds)."""


def _one_after_the_other(bench: "Bench", ours: dict[str, list[str]], wanted: list[Variant]) -> Iterator[list[Row]]:
    """All rows so far, each time that there is one more. Ours comes first and last, and time for that is kept."""
    rows: list[Row] = []
    started = time.monotonic()
    for name, keys in ours.items():
        if bench.asked_for(name):
            rows.append({**bench.cria(name, keys).row(), "name": name})
            yield rows
    aside_s = max(SHORTEST_ROW_S, (time.monotonic() - started) / len(rows)) + _TO_END_S
    for variant in wanted:
        child = bench.peer(variant, aside_s=aside_s)
        rows.append({**(child.row() if isinstance(child, Child) else child), "name": variant.name})
        yield rows
    again = {"problem": f"{NOT_TIMED}: no time left"} if bench.out_of_time() else bench.cria(AGAIN, []).row()
    yield [*rows, {**again, "name": AGAIN}]


def _in_turns(bench: "Bench", ours: dict[str, list[str]], wanted: list[Variant]) -> list[Row]:
    children: dict[str, Child | Row] = {}
    try:
        for name, keys in ours.items():
            if bench.asked_for(name):
                children[name] = bench.cria(name, keys)
        for variant in wanted:
            children[variant.name] = bench.peer(variant)
        take_turns([child for child in children.values() if isinstance(child, Child)])
        rows = {name: child.row() if isinstance(child, Child) else child for name, child in children.items()}
    except BaseException:  # Ctrl-C does not reach them
        for child in children.values():
            if isinstance(child, Child):
                child.kill()
        raise
    return [{**row, "name": name} for name, row in rows.items()]


class Bench:
    """Files that are handed over, and how a process is started on them."""

    def __init__(self, args: Any, settings: config.Config, scratch: Path, in_turns: bool):
        self.args, self.scratch, self.in_turns = args, scratch, in_turns
        self.on_gpu = bench_timing.on_gpu(settings.parallel.accelerator)
        self.budget = Budget(args.budget_s)
        self.settings = bench_step.with_random_data(settings, scratch / "data")
        self.pythons = [sys.executable, *map(str, args.peers_python or [])]
        self.steps = args.warmup + args.steps

    def hand_over(self) -> None:
        """Write the weights as a Hugging Face folder, the batches, and our own configuration over both."""
        settings = self.settings
        with torch.device("meta"):
            model = Llama(settings.model)
        model.materialize(torch.device("cpu"))
        model.init_weights(settings.seed)
        stored = torch.float32 if settings.parallel.precision == "fp32" else torch.bfloat16  # rounded for all alike
        folder = self.scratch / "weights"
        folder.mkdir()
        weights = {name: p.detach().to(stored) for name, p in model.named_parameters()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(to_hf_config(settings.model, stored, None, None)))
        save_file({"batches": bench_step.batches(settings, self.steps).int()}, self.scratch / "batches.safetensors")
        config.write(replace(settings, init_from=str(folder)), self.scratch / "config.yaml")

    def out_of_time(self, aside_s: float = 0.0) -> bool:
        """Whether there is less time left than a row needs, beside what is kept for others."""
        return self.budget.too_short(SHORTEST_ROW_S + aside_s)

    def asked_for(self, name: str) -> bool:
        """Whether --rows has the beginning of this name; ours is always wanted."""
        return name == "cria" or asked_for(name, self.args.rows)

    def cria(self, name: str, keys: list[str]) -> Child:
        """Start ours, on the handed over weights and data."""
        row = self.scratch / f"{name}.json"
        command = bench_command(
            ["--config", str(self.scratch / "config.yaml"), *keys, "--data", "real"]
            + ["--steps", str(self.args.steps), "--warmup", str(self.args.warmup)]
            + (["--in_turns"] if self.in_turns else [])
            + ([f"--memory_limit_gib={self.args.memory_limit_gib}"] if self.args.memory_limit_gib else []),
            row,
        )
        return Child(command, row, self.budget.left(), in_turns=self.in_turns)

    def peer(self, variant: Variant, micro_batch_size: int | None = None, aside_s: float = 0.0) -> Child | Row:
        """Start a peer; or the row that says why not. A smaller micro-batch, which must divide the batch, accumulates more often.

        aside_s: time that is kept for rows to come.
        """
        if variant.triton and not self.on_gpu:
            return {"problem": f"{NOT_TIMED}: its kernels are Triton's and need a GPU"}
        packages = [variant.package, *(["liger-kernel"] if variant.triton else [])]
        python = next((p for p in self.pythons if all(_has(p, package) for package in packages)), None)
        if python is None:
            missing = [p for p in packages if not _has(sys.executable, p)]
            return {
                "problem": f"{NOT_TIMED}: {' and '.join(missing)} not installed here (pip install {' '.join(missing)}, or an "
                "environment that has it: --peers_python PATH)"
            }
        if self.out_of_time(aside_s):
            return {"problem": f"{NOT_TIMED}: no time left"}
        left = self.budget.left()
        timeout_s = None if left is None else left - aside_s
        return self._start(python, variant, micro_batch_size, timeout_s)

    def _start(self, python: str, variant: Variant, micro_batch_size: int | None, timeout_s: float | None) -> Child:
        settings, name = self.settings, variant.name.replace(" ", "-").replace("'", "")
        last_step = max(settings.train.max_steps, self.steps + bench_step.PROFILED_STEPS)
        spec = {
            "peer": variant.peer,
            "package": variant.package,
            "options": variant.options,
            "folder": str(self.scratch / "weights"),
            "batches": str(self.scratch / "batches.safetensors"),
            "micro_batch_size": micro_batch_size or settings.train.micro_batch_size,
            "device": "cuda:0" if self.on_gpu else "cpu",
            "precision": "fp32" if settings.parallel.precision == "fp32" else "bf16",
            "optim": asdict(settings.optim),
            "lrs": [learning_rate(step, settings.optim, last_step) for step in range(1, self.steps + 1)],
            "warmup": self.args.warmup,
            "memory_limit_gib": self.args.memory_limit_gib,
            "in_turns": self.in_turns,
        }
        file = self.scratch / f"{name}.spec.json"
        file.write_text(json.dumps(spec))
        out = self.scratch / f"{name}.json"
        command = [python, "-m", "pretrain.peer", str(file), str(out)]
        return Child(command, out, timeout_s, in_turns=self.in_turns)


def _compared(rows: list[Row], args: Any, settings: config.Config, in_turns: bool) -> Result:
    """Check that the same model was trained, and set the ratios: each row's seconds over those of the best of ours."""
    reference = rows[0]
    notes = bench_result.notes(args.steps, args.warmup, waits=False)
    if reference["problem"] is None:
        timed = [row for row in rows[1:] if row["problem"] is None]
        for row in timed:
            row["problem"] = _unlike(row, reference, settings.parallel.precision)
        theirs = [row for row in timed if not row["name"].startswith("cria")]
        if theirs and all(row["problem"] for row in theirs):
            for row in rows:
                if row["name"].startswith("cria"):
                    row["problem"] = row["problem"] or "agrees with no peer that was timed"
    if reference["problem"] is None:
        ours = [row for row in rows if row["name"].startswith("cria") and row["problem"] is None]
        best = min(_as_one(ours), key=lambda row: statistics.median(row["seconds"]))
        for row in rows:
            if row["problem"] is None:
                row["ratio"] = _ratio(best, row, in_turns)
        notes += _verdict(rows, best, ours)
    title = (
        f"{args.config.stem} through each trainer's code: {settings.train.micro_batch_size} x {settings.data.seq_len} tokens a "
        f"step, {settings.parallel.precision}, the same weights and batches"
    )
    return Result("peers", title, bench_result.subject(settings, 1), _labelled(rows), notes)


def _unlike(row: Row, reference: Row, precision: str) -> str | None:
    """By what a row's first step differs from the reference's; NaN differs from everything."""
    off = abs(row["first_loss"] - reference["first_loss"])
    if not off <= LOSS_TOLERANCE[precision]:
        return f"does not train the same model: its first loss is {row['first_loss']:.5f}, off by {off:.1e}"
    off = abs(row["first_grad_norm"] / reference["first_grad_norm"] - 1)
    if not off <= NORM_TOLERANCE[precision]:
        return f"does not train the same model: its first gradient's norm is {row['first_grad_norm']:.5f}, off by {off:.1%}"
    return None


def _as_one(ours: list[Row]) -> list[Row]:
    """Ours, first and last as one: the better of two tries, against one try of each peer, would be a little too good."""
    again = [second for row in ours if row["name"] == AGAIN for second in row["seconds"]]
    rows = [row for row in ours if row["name"] != AGAIN]
    return [{**row, "seconds": row["seconds"] + again} if row["name"] == "cria" else row for row in rows]


def _ratio(ours: Row, other: Row, in_turns: bool) -> float:
    """How many times as fast ours is.

    Where both took turns, the median over the rounds, which no drift touches; where they ran one after the other, as on a GPU,
    the ratio of the medians.
    """
    if not in_turns:
        return statistics.median(other["seconds"]) / statistics.median(ours["seconds"])
    return statistics.median(b / a for a, b in zip(ours["seconds"], other["seconds"]))


def _verdict(rows: list[Row], best: Row, ours: list[Row]) -> list[str]:
    theirs = [row for row in rows if row not in ours and row["problem"] is None]
    lines = [
        "Each peer as it comes and at its best; 'ours is' compares the best of ours with the row, ours first and last as one."
    ]
    if theirs:
        fastest = max(theirs, key=lambda row: row["tokens_per_sec_per_gpu"])
        spread_pct = best.get("step_time_spread_pct", 0.0)
        near = f", which is within the spread of ours, {spread_pct:.1f}%"
        lines.append(
            f"Ours ({best['name']}) is {fastest['ratio']:.3f} times the fastest peer ({fastest['name']})"
            f"{near if 100 * abs(fastest['ratio'] - 1) <= spread_pct else ''}."
        )
    again = next((row for row in ours if row["name"] == AGAIN), None)
    if again is not None:
        drift = 100 * (again["tokens_per_sec_per_gpu"] / rows[0]["tokens_per_sec_per_gpu"] - 1)
        lines.append(f"Drift, ours last against ours first: {drift:+.1f}%.")
    return lines


@functools.cache
def _has(python: str, package: str) -> bool:
    """Whether an environment has a package; it is not imported, which can take seconds."""
    check = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package.replace('-', '_')!r}) is None)"
    return subprocess.run([python, "-c", check], capture_output=True).returncode == 0
