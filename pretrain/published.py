"""Published runs, and what the time model says of them: the evidence behind `plan`'s figures.

MPT's rows are llm-foundry's benchmark tables (scripts/train/benchmarking/README.md), full shard, T = 2048, the sizes that
lie within ours; its feed-forward of 2 x 4 D^2 is written as ours of 3 x 8/3 D^2, the same products. All but the compiled one
run hand-fused kernels without torch.compile.
"""

from dataclasses import dataclass

from rich.table import Table

from pretrain.chips import CHIPS, Chip
from pretrain.history import short
from pretrain.memory import GIB, Layout, memory
from pretrain.model import count
from pretrain.sections import DataConfig, ModelConfig
from pretrain.speed import rates_of, step_seconds, tokens_per_sec_per_gpu


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
    model: ModelConfig
    chip: str
    layout: Layout
    tokens_per_sec_per_gpu: float
    seq_len: int = 2048
    assumed: str = ""
    """What of the run was not published; such a row is shown and not counted."""


def _mosaic(
    size: str, chip: str, gpus: int, micro: int, accum: int, checkpointed: bool, tokens_per_sec_per_gpu: float
) -> Published:
    layout = Layout(
        "full_shard",
        max(1, gpus // 8),
        min(8, gpus),
        micro_batch_size=micro,
        grad_accum_steps=accum,
        activation_checkpointing=int(checkpointed),
        compile=False,
        reduce="micro_step",
    )
    return Published(f"MPT-{size}, {gpus} {chip}", MPT[size], chip, layout, tokens_per_sec_per_gpu)


PUBLISHED = [
    Published(
        "TinyLlama-1.1B, 16 A100-40G",
        TINYLLAMA,
        "A100-40G",
        Layout("full_shard", 2, 8, micro_batch_size=8, grad_accum_steps=8, compile=False),
        24_000,
    ),
    _mosaic("125M", "A100-40G", 8, 26, 3, False, 136_334),
    _mosaic("350M", "A100-40G", 8, 16, 4, False, 55_995),
    _mosaic("350M", "A100-40G", 16, 18, 1, False, 55_413),
    _mosaic("760M", "A100-40G", 8, 12, 4, False, 30_173),
    _mosaic("760M", "A100-40G", 64, 12, 1, False, 29_344),
    _mosaic("1B", "A100-40G", 8, 8, 8, False, 19_271),
    _mosaic("1B", "A100-40G", 16, 8, 1, False, 19_085),
    _mosaic("1B", "A100-40G", 128, 10, 1, False, 18_647),
    _mosaic("3B", "A100-40G", 8, 5, 8, False, 10_065),
    _mosaic("3B", "A100-40G", 64, 6, 1, False, 9_736),
    _mosaic("7B", "A100-40G", 16, 16, 1, True, 3_645),
    _mosaic("13B", "A100-40G", 64, 16, 1, True, 1_976),
    _mosaic("30B", "A100-40G", 32, 4, 1, True, 857),
    _mosaic("70B", "A100-40G", 128, 4, 1, True, 376),
    _mosaic("1B", "A100-80G", 8, 14, 4, False, 20_513),
    _mosaic("7B", "A100-80G", 8, 6, 2, False, 4_641),
    _mosaic("760M", "H100", 16, 24, 1, False, 68_551),
    _mosaic("1B", "H100", 8, 14, 1, False, 45_455),
    _mosaic("1B", "H100", 16, 20, 1, False, 46_037),
    _mosaic("1B", "H100", 64, 20, 1, False, 44_402),
    _mosaic("3B", "H100", 16, 10, 3, False, 24_142),
    _mosaic("7B", "H100", 8, 6, 1, False, 10_643),
    _mosaic("13B", "H100", 16, 2, 1, False, 4_767),
    _mosaic("30B", "H100", 32, 14, 3, True, 2_308),
    _mosaic("70B", "H100", 64, 8, 4, True, 1_039),
]


def _nanotron(nodes: int, mfu: float, accum: int) -> Published:
    """MFU in the products' FLOPs: 6 N_matmul + 12 L D T, N_matmul 1.31e9, L 24, D 2048, T 4096."""
    tokens_per_sec_per_gpu = mfu * 989e12 / (6 * 1.31e9 + 12 * 24 * 2048 * 4096)
    layout = Layout("shard_grad_op", nodes, 8, micro_batch_size=4, grad_accum_steps=accum, compile=False, gather="step")
    assumed = "its shape, T = 4096, 1M tokens a step, ZeRO-1"
    return Published(
        f"nanotron 1.3B, {8 * nodes} H100", MPT["1B"], "H100", layout, tokens_per_sec_per_gpu, 4096, assumed
    )


PUBLISHED += [
    Published(
        "nanochat d24 as TinyLlama-1.1B, 8 H100",
        TINYLLAMA,
        "H100",
        Layout("full_shard", 1, 8, micro_batch_size=16, grad_accum_steps=2),
        68_000,
        assumed="the figure is scaled from its own shape; torch.compile's gain is fitted to it",
    ),
    _nanotron(1, 0.44, 8),
    _nanotron(2, 0.42, 4),
    _nanotron(8, 0.33, 1),
]


def predicted(run: Published) -> float:
    """What the time model says (tokens/s/GPU)."""
    chip = CHIPS[run.chip]
    step = step_seconds(run.model, run.seq_len, run.layout, chip, rates_of(chip))
    return tokens_per_sec_per_gpu(run.seq_len, run.layout, step)


def error(run: Published) -> float:
    """Predicted over published, less 1."""
    return predicted(run) / run.tokens_per_sec_per_gpu - 1


def stated_error(chip: Chip, compiled: bool) -> float:
    """The largest error on a run left out of its generation's fit, and what compiling is uncertain by (share of 1)."""
    rates = rates_of(chip)
    return rates.fit_error + (rates.compiled_error if compiled else 0)


def not_covered(model: ModelConfig, data: DataConfig, layout: Layout, chip: Chip) -> dict[str, str]:
    """What `stated_error` says nothing of, for no run that is counted had it: each in a few words, and what is known of it."""
    counted = [run for run in PUBLISHED if not run.assumed and rates_of(CHIPS[run.chip]) is rates_of(chip)]
    none, found = f"no run on {rates_of(chip).fitted_on} that is counted", {}
    if layout.precision == "fp8":
        found["fp8"] = "no published run is in fp8: its gain over bf16 is not counted in"
    elif layout.precision != "bf16":
        found[layout.precision] = f"no published run is in {layout.precision}: its speed is by the datasheet's peak"
    smallest = min(count(run.model).total for run in counted)
    if 2 * count(model).total < smallest:
        found["so small a model"] = f"{none} is of less than {short(smallest)} parameters"
    longest = max(run.seq_len for run in counted)
    if data.seq_len > longest:
        found[f"sequences of {data.seq_len:,} tokens"] = (
            f"{none} has sequences of more than {longest:,} tokens, and attention's part grows with them"
        )
    if data.intra_document:
        found["data.intra_document"] = (
            "no published run keeps attention within documents: neither what that saves is counted in, nor other kernels"
        )
    most = max(run.layout.world_size for run in counted)
    if layout.world_size > most:
        found[f"{layout.world_size:,} GPUs"] = f"{none} has more than {most} GPUs"
    if layout.nodes > 1 and not any(_alike(run.layout, layout) for run in counted):
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


def table() -> Table:
    """One row a published run: its tokens/s/GPU, what the model of time says, and the error."""
    found = Table(
        title="published runs against the model of time, tokens/s/GPU",
        title_justify="left",
        caption="Memory is computed for this project's code. By it MPT's runs, made with other code, come out up to 8% above the "
        "GPU's memory.",
        caption_justify="left",
    )
    for name in ("run", "published", "predicted", "error", "memory, GiB"):
        found.add_column(name, justify="left" if name == "run" else "right")
    found.add_column("not published, assumed (not counted)")
    for run in PUBLISHED:
        held = memory(run.model, run.seq_len, run.layout).total / GIB
        found.add_row(
            run.name,
            f"{run.tokens_per_sec_per_gpu:,.0f}",
            f"{predicted(run):,.0f}",
            f"{100 * error(run):+.1f}%",
            f"{held:.1f} of {CHIPS[run.chip].memory_gib:.1f}",
            run.assumed,
        )
    return found
