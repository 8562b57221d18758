"""TinyLlama's paper's table: GPU hours for 300B tokens of three models of its size.

    shapes (published) ─> ours, and transformers' GPTNeoX and Mpt, each in its own process ─> tokens/s ─> hours

The paper's hours are of A100-40G GPUs (arXiv 2401.02385, table 2); those here are of the chip that is here, and of transformers'
code for the two others, not of the frameworks that their authors used. At `--scale` below 1 smaller models are timed, and their
speed is scaled by FLOPs a token (M1): such hours are extrapolated, and the row says so.

All three take the same tokens an update, accumulated over micro-batches of the size that each can hold.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pretrain import bench_peers, bench_result, config
from pretrain.bench_result import Result, Row, SoFar
from pretrain.bench_rows import Child
from pretrain.bench_timing import DOES_NOT_FIT
from pretrain.sections import ModelConfig

TOKENS = 300e9
SEQ_LEN = 2048

ACCUMULATED = 4
"""Micro-batches of ours an update: few, to be quick, and yet an update is a small part of the step, as in a run of 2M tokens."""


@dataclass(frozen=True)
class Shape:
    """A decoder of the table; the fields are those of ModelConfig."""

    name: str
    paper_a100_hours: float
    model_type: str
    hidden_size: int
    layers: int
    head_dim: int
    intermediate_size: int
    vocab_size: int

    def scaled(self, scale: float) -> "Shape":
        """A model of the same make, with width, depth and vocabulary at about `scale` of these."""
        hidden = max(64, round(self.hidden_size * scale / 64) * 64)
        return replace(
            self,
            hidden_size=hidden,
            layers=max(1, round(self.layers * scale)),
            head_dim=min(self.head_dim, hidden // 2),
            intermediate_size=self.intermediate_size * hidden // self.hidden_size,
            vocab_size=max(256, round(self.vocab_size * scale)),
        )

    def parameters(self) -> int:
        """Weights of the model, counted by hand; the tests count them in the models."""
        D, L, V, wide = self.hidden_size, self.layers, self.vocab_size, self.intermediate_size
        heads = D // self.head_dim
        if self.model_type == "llama":  # shared keys and values, SwiGLU, RMSNorm
            return 2 * V * D + L * (2 * D * D + 2 * D * _kv_heads(heads) * self.head_dim + 3 * D * wide + 2 * D) + D
        if self.model_type == "gpt_neox":  # biases and LayerNorm with bias
            return 2 * V * D + L * (4 * D * D + 2 * D * wide + 9 * D + wide) + 2 * D
        return V * D + L * (4 * D * D + 2 * D * wide + 2 * D) + D  # mpt: tied, no biases

    def flops_per_token(self, seq_len: int) -> float:
        """M1: 6 N + 12 L D T."""
        return 6 * self.parameters() + 12 * self.layers * self.hidden_size * seq_len

    def hf_config(self, seq_len: int) -> dict[str, Any]:
        """What transformers builds it from."""
        heads = self.hidden_size // self.head_dim
        if self.model_type == "gpt_neox":
            return {
                "model_type": "gpt_neox",
                "vocab_size": self.vocab_size,
                "hidden_size": self.hidden_size,
                "num_hidden_layers": self.layers,
                "num_attention_heads": heads,
                "intermediate_size": self.intermediate_size,
                "max_position_embeddings": seq_len,
                "rotary_pct": 0.25,
                "use_parallel_residual": True,
            }
        return {
            "model_type": "mpt",
            "vocab_size": self.vocab_size,
            "d_model": self.hidden_size,
            "n_layers": self.layers,
            "n_heads": heads,
            "expansion_ratio": self.intermediate_size // self.hidden_size,
            "max_seq_len": seq_len,
        }


def _kv_heads(heads: int) -> int:
    return max(1, heads // 8)


SHAPES = (
    Shape("TinyLlama-1.1B (cria)", 3456, "llama", 2048, 22, 64, 5632, 32000),
    Shape("Pythia-1.0B (transformers)", 4830, "gpt_neox", 2048, 16, 256, 8192, 50304),
    Shape("MPT-1.3B (transformers)", 7920, "mpt", 2048, 24, 128, 8192, 50368),
)
"""Shapes as published: TinyLlama's and Pythia's papers (arXiv 2401.02385, 2304.01373), MPT-1b's llm-foundry configuration."""


def paper(args: Any, settings: config.Config, so_far: SoFar) -> Result:
    """Time the three at `args.scale`, with the configuration's batch, precision and compilation."""
    seq_len = SEQ_LEN if args.scale == 1 else settings.data.seq_len
    ours, *others = [shape if args.scale == 1 else shape.scaled(args.scale) for shape in SHAPES]
    settings = replace(settings, model=_model(ours, seq_len), data=replace(settings.data, seq_len=seq_len))
    sequences = ACCUMULATED * settings.train.micro_batch_size
    settings = replace(settings, train=replace(settings.train, global_batch_size=sequences))
    subject = {**bench_result.subject(settings, 1), "scale": args.scale}
    so_far.check_comparable("paper", subject)
    title = f"GPU hours for {TOKENS / 1e9:.0f}B tokens, beside those of TinyLlama's paper (table 2)"
    notes = [
        "Hours here are of the chip named above, and of transformers' code for the two others; the paper's are A100-40G hours.",
        f"Each model is updated once every {sequences:,} x {seq_len:,} tokens, {ACCUMULATED} micro-batches of ours.",
        *bench_result.notes(args.steps, args.warmup, waits=False),
        *bench_result.of_documents(settings),
    ]
    result = Result("paper", title, subject, [], notes)
    with tempfile.TemporaryDirectory(prefix="cria-paper-") as scratch:
        bench = bench_peers.Bench(args, settings, Path(scratch), in_turns=False)
        bench.hand_over()
        for shape, whole in zip((ours, *others), SHAPES):
            if shape is ours:
                row = {**bench.cria(shape.name, []).row(), "name": shape.name, "parameters": shape.parameters()}
            else:
                row = _time(bench, shape, seq_len)
            row["paper_a100_hours"] = whole.paper_a100_hours
            if row["problem"] is None:
                _set_hours(row, shape, whole, seq_len)
            result.rows.append(row)
            so_far.add(result)
    return result


def _model(shape: Shape, seq_len: int) -> ModelConfig:
    heads = shape.hidden_size // shape.head_dim
    return ModelConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=_kv_heads(heads),
        max_position_embeddings=seq_len,
    )


def _time(bench: bench_peers.Bench, shape: Shape, seq_len: int) -> Row:
    """Time one of the others, compiled where ours is; with smaller micro-batches until one fits, as many tokens an update."""
    options = {"config": shape.hf_config(seq_len), "compile": bench.settings.parallel.compile}
    variant = bench_peers.Variant(shape.name, "causal_lm", "transformers", options)
    sequences, micro_batch_size = bench.settings.train.global_batch_size, bench.settings.train.micro_batch_size
    if shape.model_type == "mpt":  # its attention holds all T x T scores
        micro_batch_size = _divisor(sequences, micro_batch_size // 4)
    while True:
        child = bench.peer(variant, micro_batch_size)
        row = {**(child.row() if isinstance(child, Child) else child), "name": shape.name}
        if not (row["problem"] or "").startswith(DOES_NOT_FIT) or micro_batch_size == 1:
            break
        micro_batch_size = _divisor(sequences, micro_batch_size // 2)
    if row["problem"] is None:
        row["note"] = f"micro-batch {micro_batch_size}, {row['note']}"
    return row


def _divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is no larger; 1 where there is none."""
    return next((n for n in range(at_most, 1, -1) if number % n == 0), 1)


def _set_hours(row: Row, timed: Shape, whole: Shape, seq_len: int) -> None:
    share = timed.flops_per_token(seq_len) / whole.flops_per_token(SEQ_LEN)
    row["gpu_hours"] = TOKENS / (row["tokens_per_sec_per_gpu"] * share) / 3600
    if timed != whole:
        row["note"] = ", ".join(
            [f"hours extrapolated by FLOPs from {timed.parameters():,} parameters", *filter(None, [row.get("note")])]
        )
