"""What a benchmark leaves: a JSON file, the same as a Markdown table, and the comparison with an earlier one.

    rows ─> Result ─> OUT.json, OUT.md        Result, an earlier OUT.json ─> regressions

A row is a dictionary with a `name`; `problem` says in one line why it has no figures, and is None where it has them.
"""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

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
        """Write OUT.json and OUT.md."""
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_name(f"{out.name}.json").write_text(json.dumps(asdict(self), indent=1) + "\n")
        out.with_name(f"{out.name}.md").write_text(self.markdown())

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
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"# {self.title}", "", where, "", *table, "", *operations, *notes, ""])


def _operations(rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    for row in rows:
        if row.get("operations"):
            lines += ["| operation | ms a step | % | calls a step |", "| --- | --- | --- | --- |"]
            lines += [
                f"| `{o['name'][:80]}` | {o['ms']:.3f} | {o['pct']:.1f} | {o['calls']:g} |" for o in row["operations"]
            ]
            lines.append("")
    return lines


def subject(settings: Config, world_size: int) -> dict[str, Any]:
    """What must be the same for two results to be compared."""
    return {
        "chip": _chip(),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "model": asdict(settings.model),
        "seq_len": settings.data.seq_len,
        "micro_batch_size": settings.train.micro_batch_size,
        "global_batch_size": settings.train.global_batch_size,
        "parallel": asdict(settings.parallel),
    }


def notes(steps: int, warmup: int) -> list[str]:
    """What the figures mean, for the reader of the table."""
    return [
        f"Tokens/s from the median of {steps} steps after {warmup} of warm-up; spread: slowest minus fastest.",
        "M1 = 6 N + 12 L D T FLOPs a token, M3 = 6 N_matmul + 6 L D T (causal); MFU of the chip's dense bf16 peak, where known.",
        "Data: share of the time that a step waits for its next batch, from the loader's threads or its own reading.",
        "Communication: share of a profiled window of two steps in which a NCCL kernel (CPU: a gloo collective) runs.",
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


def compare(result: Result, earlier: Path, noise_pct: float) -> tuple[list[str], list[str]]:
    """One line for each row that both have, and the names of those that lost more than `noise_pct` of their tokens/s.

    A row that had figures and has none now is lost as well.

    Raises:
        OSError, ValueError: the file cannot be read, or was measured on something else.
    """
    try:
        before = json.loads(earlier.read_text())
        old_subject, old_rows = before["subject"], {row["name"]: row for row in before["rows"]}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"--compare {earlier} is not a result of pretrain bench: {error!r}") from error
    now = json.loads(json.dumps(result.subject))
    differs = [f"{key} was {old_subject.get(key)} and is {now[key]}" for key in now if now[key] != old_subject.get(key)]
    if before["kind"] != result.kind or differs:
        what = f"a {before['kind']} and this is a {result.kind}" if before["kind"] != result.kind else differs[0]
        raise ValueError(f"--compare {earlier} cannot be compared: {what}")
    lines, lost = [], []
    for row in result.rows:
        was = old_rows.get(row["name"], {}).get("tokens_per_sec_per_gpu")
        if was is None:
            continue
        change_pct = 100 * ((row.get("tokens_per_sec_per_gpu") or 0) / was - 1)
        if row["problem"] or change_pct < -noise_pct:
            lost.append(row["name"])
        figure = row["problem"] or f"{row['tokens_per_sec_per_gpu']:,.0f} ({change_pct:+.1f}%)"
        lines.append(f"{row['name']}: {was:,.0f} tokens/s/GPU before, now {figure}")
    if not lines:
        raise ValueError(f"--compare {earlier} has no row with figures that this result has too")
    return lines, lost
