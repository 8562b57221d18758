"""What a benchmark leaves: a JSON file, the same as a Markdown table, and the comparison with an earlier one.

    rows ─> Result ─> OUT.json, OUT.md        Result, an earlier OUT.json ─> regressions

A row is a dictionary with a `name`; `problem` says in one line why it has no figures, and is None where it has them.
"""

import json
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from data_prep.shard import write_atomically
from pretrain.bench_rows import NOT_ASKED_FOR, NOT_TIMED
from pretrain.config import flat
from pretrain.sections import Config
from pretrain.versions import own_version, versions

Row = dict[str, Any]

CRIA = own_version()
"""What is measured, as it was when it began."""
LIBRARIES = ("torch", "triton", "lightning", "transformers", "liger-kernel", "flash-attn", "xformers", "torchao")

FIGURES = {
    "tokens_per_sec_per_gpu": ("tokens/s/GPU", "{:,.0f}"),
    "ratio": ("ours is", "{:.2f}x"),
    "mfu_m1_pct": ("MFU (M1) %", "{:.1f}"),
    "mfu_m3_pct": ("MFU (M3) %", "{:.1f}"),
    "step_time_s": ("step s", "{:.4f}"),
    "step_time_spread_pct": ("spread %", "{:.1f}"),
    "data_wait_pct": ("data %", "{:.1f}"),
    "communication_pct": ("communication %", "{:.1f}"),
    "peak_mem_gib": ("peak GiB", "{:.2f}"),
    "first_loss": ("first loss", "{:.5f}"),
    "gpu_hours": ("GPU hours", "{:,.0f}"),
    "paper_a100_hours": ("A100 hours, paper", "{:,.0f}"),
}
"""A row's figures that stand in the table, with their heading and format; those that no row has are left out."""


@dataclass
class Result:
    """One benchmark: what was timed, on what, and its rows."""

    kind: str
    """step, sweep, peers or paper."""
    title: str
    """What was timed, in one line."""
    subject: dict[str, Any]
    """What must be the same for two results to be compared: the model, the batch, the device."""
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=lambda: machine())

    def save(self, out: Path) -> None:
        """Write OUT.json and OUT.md, each at once or not at all: an earlier one may hold rows that took an hour."""
        out.parent.mkdir(parents=True, exist_ok=True)
        content = {"json": json.dumps(asdict(self), indent=1) + "\n", "md": self.markdown()}
        for suffix, text in content.items():
            write_atomically(out.with_name(f"{out.name}.{suffix}"), text.encode())

    def markdown(self) -> str:
        """The table, with what one must know to read it."""
        shown = [key for key in FIGURES if any(row.get(key) is not None for row in self.rows)]
        lines = [["", *(FIGURES[key][0] for key in shown), ""]]
        for row in self.rows:
            cells = ["" if row.get(key) is None else FIGURES[key][1].format(row[key]) for key in shown]
            lines.append([row["name"], *cells, row["problem"] or row.get("note", "")])
        table = [f"| {' | '.join(cells)} |" for cells in lines]
        table.insert(1, f"|{' --- |' * (len(shown) + 2)}")
        where = f"{self.machine['chip']}, {self.machine['threads']} threads; " + ", ".join(
            f"{name} {number}" for name, number in self.machine["versions"].items()
        )
        operations = _operations(self.rows) if self.kind == "step" else []
        notes = [f"- {note}" for note in [*_kernels(self.rows), *self.notes]]
        return "\n".join([f"# {self.title}", "", where, "", *table, "", *operations, *notes, ""])


def _kernels(rows: Sequence[Row]) -> list[str]:
    """What our rows ran on, and why: a line for all that ran on the same."""
    ran: dict[str, list[str]] = {}
    for row in rows:
        if kernels := row.get("kernels"):
            ran.setdefault("; ".join(f"{name}: {kernel}" for name, kernel in kernels.items()), []).append(row["name"])
    timed = [row["name"] for row in rows if row["problem"] is None]
    if len(timed) > 1 and all(set(timed) <= set(names) for names in ran.values()):
        return [f"All ran on: {kernels}." for kernels in ran]
    return [f"{', '.join(names)} ran on: {kernels}." for kernels, names in ran.items()]


def _operations(rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    for row in rows:
        if row.get("groups"):
            groups = ", ".join(f"{name} {ms:.2f} ms" for name, ms in row["groups"].items())
            lines += [
                f"Kernels by kind, a step: {groups}; none runs in {row['idle_pct']:.1f}% of the profiled window.",
                "",
            ]
        if row.get("operations"):
            lines += ["| operation | ms a step | % | calls a step |", "| --- | --- | --- | --- |"]
            lines += [
                f"| `{o['name'][:80]}` | {o['ms']:.3f} | {o['pct']:.1f} | {o['calls']:g} |" for o in row["operations"]
            ]
            lines.append("")
    return lines


def subject(settings: Config, world_size: int, data: str = "random") -> dict[str, Any]:
    """What must be the same for two results to be compared; data: random ids, or the run's own (real)."""
    return {
        "chip": _chip(),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "model": {**settings.model.shape(), "ops": asdict(settings.model.ops)},
        "seq_len": settings.data.seq_len,
        "micro_batch_size": settings.train.micro_batch_size,
        "global_batch_size": settings.train.global_batch_size,
        "parallel": asdict(settings.parallel),
        "data": data,
        "intra_document": settings.data.intra_document,
        "deterministic": settings.train.deterministic,
        "z_loss": settings.train.z_loss,
    }


def notes(steps: int, warmup: int, waits: bool = True) -> list[str]:
    """What the figures mean, for the reader of the table; waits: whether they tell of data and communication, too."""
    lines = [
        f"Tokens/s from the median of {steps} steps after {warmup} of warm-up; spread: slowest minus fastest.",
        "M1 = 6 N + 12 L D T FLOPs a token, M3 = 6 N_matmul + 6 L D T (causal); MFU of the chip's dense bf16 peak, where known.",
    ]
    of_waits = [
        "Data: share of the time that a step waits for its next batch, from the loader's threads or its own reading.",
        "Communication: share of a profiled window of two steps in which a NCCL kernel (CPU: a gloo collective) runs.",
    ]
    return lines + of_waits if waits else lines


def of_documents(settings: Config, data: str = "random") -> list[str]:
    """What figures on random ids do not tell where attention stays within documents."""
    if not settings.data.intra_document or data == "real":
        return []
    return [
        f"data.intra_document is on, and random ids have an EOS only every {settings.model.vocab_size:,} tokens: what attention "
        "within documents costs or saves is not in these figures (pretrain bench --data real has it)."
    ]


def machine() -> dict[str, Any]:
    """The chip, and the versions of what may matter; a library that is not installed is not named."""
    found = {**versions(*LIBRARIES), "cria": CRIA, "torch": torch.__version__}
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
    return {"chip": _chip(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "versions": found}


def _chip() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


@dataclass(frozen=True)
class Earlier:
    """An earlier result to compare with. Read before anything is timed: its file may be the one that the new result goes to."""

    path: Path
    kind: str
    subject: dict[str, Any]
    figures: dict[str, float]
    """Tokens/s/GPU by row; those with a problem have none."""

    @classmethod
    def read(cls, path: Path) -> "Earlier":
        """Raises OSError, ValueError: the file cannot be read, or nothing can be compared with it."""
        try:
            found = json.loads(path.read_text())
            rows = [row for row in found["rows"] if row.get("problem") is None]
            figures = {row["name"]: float(row["tokens_per_sec_per_gpu"]) for row in rows}
            earlier = cls(path, found["kind"], dict(found["subject"]), figures)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"--compare {path} is not a result of pretrain bench: {error!r}") from error
        for name, tokens in figures.items():
            if not tokens > 0:
                raise ValueError(
                    f"--compare {path} has {tokens:g} tokens/s/GPU for {name}: nothing is slower than that"
                )
        if not figures:
            raise ValueError(f"--compare {path} has no row with figures")
        return earlier

    def check(self, kind: str, subject: dict[str, Any]) -> None:
        """Raises ValueError: it was measured on something else. What an older version did not note is taken as the same."""
        before, now = flat(self.subject), flat(json.loads(json.dumps(subject)))
        differs = [f"{key} was {before[key]} and is {now[key]}" for key in now if before.get(key, now[key]) != now[key]]
        what = f"a {self.kind} and this is a {kind}" if self.kind != kind else "; ".join(differs)
        if what:
            raise ValueError(f"--compare {self.path} cannot be compared: {what}")

    def unsaid(self, subject: dict[str, Any]) -> list[str]:
        """What an older version did not note of its subject."""
        return sorted(flat(subject).keys() - flat(self.subject).keys())


def compare(result: Result, earlier: Earlier, noise_pct: float, all_asked_for: bool) -> tuple[list[str], list[str]]:
    """One line for each row that had figures, and the names of those that lost more than `noise_pct` of their tokens/s.

    A row that has none now is lost as well, but for those that were not to be timed: left out by --rows (`all_asked_for` is
    False then), or by a sweep, whose search goes where it finds speed.
    """
    found = {row["name"]: row for row in result.rows}
    free = result.kind == "sweep" or not all_asked_for
    lines, lost = [], []
    if unsaid := earlier.unsaid(result.subject):
        lines.append(f"{earlier.path} is older and does not say {', '.join(unsaid)}: taken as the same")
    for name, was in earlier.figures.items():
        row = found.get(name, {"problem": NOT_ASKED_FOR if free else "missing"})
        if row["problem"] == NOT_ASKED_FOR:
            figure = NOT_TIMED
        elif row["problem"]:
            figure = row["problem"]
            lost.append(name)
        else:
            change_pct = 100 * (row["tokens_per_sec_per_gpu"] / was - 1)
            figure = f"{row['tokens_per_sec_per_gpu']:,.0f} ({change_pct:+.1f}%)"
            lost += [name] if change_pct < -noise_pct else []
        lines.append(f"{name}: {was:,.0f} tokens/s/GPU before, now {figure}")
    return lines, lost


UNFINISHED = "Interrupted, or still being timed: these are the rows so far."


class SoFar:
    """What a benchmark has found so far: saved with each row, so that none is lost when it is interrupted."""

    def __init__(self, out: Path | None, earlier: Earlier | None = None):
        self._out, self._earlier = out, earlier
        self.result: Result | None = None

    def check_comparable(self, kind: str, subject: dict[str, Any]) -> None:
        """Raises ValueError: what is about to be timed cannot be compared with --compare."""
        if self._earlier is not None:
            self._earlier.check(kind, subject)

    def add(self, result: Result) -> None:
        """There is one more row."""
        self.result = replace(result, notes=[UNFINISHED, *result.notes])
        if self._out is not None:
            with suppress(OSError):  # a disk that is full now does not end the timing; the last save says what is wrong
                self.result.save(self._out)
