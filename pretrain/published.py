"""Published runs, and what the time model says of them: the evidence behind `plan`'s figures.

`published.csv` has MPT's, from llm-foundry's benchmark tables (scripts/train/benchmarking/README.md): all in bf16 without
offloading, 125M to 70B, 512 to 65,536 tokens, 8 to 512 GPUs. Its feed-forward of 2 x 4 D^2 is written as ours of 3 x 8/3 D^2,
the same products. All but the compiled one run hand-fused kernels without torch.compile.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from rich.console import Group
from rich.table import Table

from pretrain.chips import CHIPS, Chip
from pretrain.history import short
from pretrain.memory import Layout
from pretrain.model import count
from pretrain.sections import DataConfig, ModelConfig
from pretrain.speed import COMPILED_ERROR, rates_of, step_seconds, tokens_per_sec_per_gpu


def _mpt(hidden_size: int, layers: int, heads: int) -> ModelConfig:
    return ModelConfig(50368, hidden_size, round(hidden_size * 8 / 3), layers, heads, heads, tie_word_embeddings=True)


TINYLLAMA = ModelConfig()
MPT = {
    "125M": _mpt(768, 12, 12),
    "350M": _mpt(1024, 24, 16),
    "760M": _mpt(1536, 24, 12),
    "1B": _mpt(2048, 24, 16),
    "3B": _mpt(2560, 32, 20),
    "7B": _mpt(4096, 32, 32),
    "13B": _mpt(5120, 40, 40),
    "30B": _mpt(7168, 48, 56),
    "70B": _mpt(8192, 80, 64),
}


@dataclass(frozen=True)
class Published:
    """One run's figure."""

    name: str
    size: str
    """Runs of one size are left out of the fit together."""
    model: ModelConfig
    chip: str
    layout: Layout
    tokens_per_sec_per_gpu: float
    seq_len: int = 2048
    assumed: str = ""
    """What of the run was not published; such a row is shown and not counted."""


def _mpt_runs() -> list[Published]:
    with open(Path(__file__).with_name("published.csv"), newline="") as file:
        return [_mpt_run(row) for row in csv.DictReader(file)]


def _mpt_run(row: dict[str, str]) -> Published:
    size, chip, T, gpus = row["model"], row["chip"], int(row["seq_len"]), int(row["gpus"])
    layout = Layout(
        row["strategy"],
        max(1, gpus // 8),
        min(8, gpus),
        micro_batch_size=int(row["micro_batch_size"]),
        grad_accum_steps=int(row["grad_accum_steps"]),
        activation_checkpointing=int(row["activation_checkpointing"]),
        compile=False,
        gather="layer" if row["strategy"] == "full_shard" else "micro_step",
        reduce="micro_step",
    )
    speed = float(row["tokens_per_sec_per_gpu"])
    return Published(f"MPT-{size}, T {T:,}, {gpus} {chip}", f"MPT-{size}", MPT[size], chip, layout, speed, T)


def _nanotron(nodes: int, mfu: float, accum: int) -> Published:
    """MFU in the products' FLOPs: 6 N_matmul + 12 L D T, N_matmul 1.31e9, L 24, D 2048, T 4096."""
    tokens_per_sec_per_gpu = mfu * 989e12 / (6 * 1.31e9 + 12 * 24 * 2048 * 4096)
    layout = Layout("shard_grad_op", nodes, 8, micro_batch_size=4, grad_accum_steps=accum, compile=False, gather="step")
    assumed = "its shape, T = 4096, 1M tokens a step, ZeRO-1"
    name = f"nanotron 1.3B, {8 * nodes} H100"
    return Published(name, "nanotron 1.3B", MPT["1B"], "H100", layout, tokens_per_sec_per_gpu, 4096, assumed)


PUBLISHED = [
    Published(
        "TinyLlama-1.1B, 16 A100-40G",
        "TinyLlama-1.1B",
        TINYLLAMA,
        "A100-40G",
        Layout("full_shard", 2, 8, micro_batch_size=8, grad_accum_steps=8, compile=False),
        24_000,
    ),
    *_mpt_runs(),
    Published(
        "nanochat d24 as TinyLlama-1.1B, 8 H100",
        "TinyLlama-1.1B",
        TINYLLAMA,
        "H100",
        Layout("full_shard", 1, 8, micro_batch_size=16, grad_accum_steps=2),
        68_000,
        assumed="the figure is scaled from its own shape; compiled",
    ),
    _nanotron(1, 0.44, 8),
    _nanotron(2, 0.42, 4),
    _nanotron(8, 0.33, 1),
]


def counted(chip: Chip) -> list[Published]:
    """The runs that the rates of the chip's generation rest on."""
    return [run for run in PUBLISHED if not run.assumed and rates_of(CHIPS[run.chip]) is rates_of(chip)]


def predicted(run: Published) -> float:
    """What the time model says (tokens/s/GPU)."""
    chip = CHIPS[run.chip]
    step = step_seconds(run.model, run.seq_len, run.layout, chip, rates_of(chip))
    return tokens_per_sec_per_gpu(run.seq_len, run.layout, step)


def error(run: Published) -> float:
    """Predicted over published, less 1."""
    return predicted(run) / run.tokens_per_sec_per_gpu - 1


def nine_of_ten(errors: list[float]) -> float:
    """What nine of ten of them lie within."""
    return quantiles(map(abs, errors), n=10, method="inclusive")[-1]


def stated_error(chip: Chip, compiled: bool) -> float:
    """That of nine of ten runs left out of their generation's fit, and what compiling is uncertain by (share of 1)."""
    return rates_of(chip).fit_error + (COMPILED_ERROR if compiled else 0)


def not_covered(model: ModelConfig, data: DataConfig, layout: Layout, chip: Chip) -> dict[str, str]:
    """What `stated_error` says nothing of, for no run that is counted had it: each in a few words, and what is known of it."""
    runs = counted(chip)
    none, found = f"no run on {rates_of(chip).fitted_on} that is counted", {}
    if layout.precision == "fp8":
        found["fp8"] = "no published run is in fp8: its gain over bf16 is not counted in"
    elif layout.precision != "bf16":
        found[layout.precision] = f"no published run is in {layout.precision}: its speed is by the datasheet's peak"
    smallest = min(count(run.model).total for run in runs)
    if 2 * count(model).total < smallest:
        found["so small a model"] = f"{none} is of less than {short(smallest)} parameters"
    longest = max(run.seq_len for run in runs)
    if data.seq_len > longest:
        found[f"sequences of {data.seq_len:,} tokens"] = (
            f"{none} has sequences of more than {longest:,} tokens, and attention's part grows with them"
        )
    if data.intra_document:
        found["data.intra_document"] = (
            "no published run keeps attention within documents: neither what that saves is counted in, nor other kernels"
        )
    most = max(run.layout.world_size for run in runs)
    if layout.world_size > most:
        found[f"{layout.world_size:,} GPUs"] = f"{none} has more than {most} GPUs"
    if layout.nodes > 1 and not any(_alike(run.layout, layout) for run in runs):
        known = [run for run in PUBLISHED if _alike(run.layout, layout)]
        worst = max(known, key=error, default=None)
        words, sentence = f"{layout.strategy} over several nodes", ""
        if worst is not None:
            slower = f"{100 * (1 - worst.tokens_per_sec_per_gpu / predicted(worst)):.0f}% slower"
            words += f", where one run was {slower}"
            sentence = f"; {worst.name}, not counted, was {slower} than is predicted"
        found[words] = f"{none} is {layout.strategy} over several nodes{sentence}"
    return found


def _alike(a: Layout, b: Layout) -> bool:
    return a.nodes > 1 and a.strategy == b.strategy


def tables() -> Group:
    """MPT's runs by chip and length, then all others: predicted over published tokens/s/GPU, less 1."""
    groups: dict[tuple[str, int], list[Published]] = {}
    for run in (run for run in PUBLISHED if run.model in MPT.values() and not run.assumed):
        groups.setdefault((run.chip, run.seq_len), []).append(run)
    mpt = Table(title="MPT, 125M to 70B, on 8 to 512 GPUs: error", title_justify="left")
    for name in ("chip", "tokens a sequence", "runs", "median", "nine of ten within", "largest"):
        mpt.add_column(name, justify="left" if name == "chip" else "right")
    for (chip, seq_len), runs in groups.items():
        errors = [error(run) for run in runs]
        figures = (f"{seq_len:,}", str(len(runs)), f"{100 * median(errors):+.1f}%", f"{100 * nine_of_ten(errors):.1f}%")
        mpt.add_row(chip, *figures, f"{100 * max(errors, key=abs):+.1f}%")
    others = Table(title="others, tokens/s/GPU", title_justify="left")
    for name in ("run", "published", "predicted", "error", "not published, assumed (not counted)"):
        others.add_column(name, justify="right" if name in ("published", "predicted", "error") else "left")
    for run in (run for run in PUBLISHED if run.model not in MPT.values() or run.assumed):
        speeds = (f"{run.tokens_per_sec_per_gpu:,.0f}", f"{predicted(run):,.0f}")
        others.add_row(run.name, *speeds, f"{100 * error(run):+.1f}%", run.assumed)
    return Group(mpt, others)
