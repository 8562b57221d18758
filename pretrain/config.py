"""Typed configuration: defaults < YAML < command line.

The way of a setting:

    configs/demo.yaml ─┐
    --optim.max_lr 3e-4 ┴─> parse() ─> Config (frozen, one dataclass a section) ─> check() ─> the one function that needs it
                                         │
                                         └─> write() ─> RUN_DIR/config.yaml, the resolved whole

Each field is followed by its unit. Functions elsewhere take their own section and never the whole tree. What depends on
the number of ranks is derived once, in `grad_accum_steps`.
"""

import dataclasses
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import yaml


@dataclass(frozen=True)
class OpsConfig:
    """Which library computes each operation. auto takes the fastest that is installed and fits chip, type and compilation.

    What was taken stands in the log and in RUN_DIR/operations.json. What is asked for by name and cannot be had is an error.
    """

    attention: Literal["auto", "torch", "flash_attn", "xformers"] = "auto"
    """torch is its fused attention (cuDNN's on Hopper and later, FlashAttention-2 on Ampere); flash_attn is FlashAttention-2."""
    swiglu: Literal["auto", "torch", "xformers", "liger"] = "auto"
    """xformers has it before 0.0.34 only, and takes the whole block; liger fuses the elementwise part (Triton)."""
    rope: Literal["auto", "torch", "flash_attn", "liger"] = "auto"
    """Rotary embedding of queries and keys."""
    rms_norm: Literal["auto", "torch", "liger"] = "auto"
    """Root-mean-square norms."""
    cross_entropy: Literal["auto", "torch", "flash_attn", "liger"] = "auto"
    """Output projection and loss. torch and liger never hold all logits; flash_attn does."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-family decoder, in Hugging Face's names. The defaults are TinyLlama-1.1B's."""

    vocab_size: int = 32000
    """Rows of the embedding, V (tokens). At least the tokenizer's vocabulary."""
    hidden_size: int = 2048
    """Width of the residual stream, D (features)."""
    intermediate_size: int = 5632
    """Width inside SwiGLU (features)."""
    num_hidden_layers: int = 22
    """Decoder layers, L."""
    num_attention_heads: int = 32
    """Query heads, H. D is a multiple of it; each head has D / H features."""
    num_key_value_heads: int = 4
    """Key and value heads: H is multi-head, 1 is multi-query, in between is grouped-query attention."""
    max_position_embeddings: int = 2048
    """Longest sequence that the rotary table covers (tokens)."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies (no unit)."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square before its root (no unit)."""
    tie_word_embeddings: bool = False
    """Use the embedding as the output projection too."""
    ops: OpsConfig = field(default_factory=OpsConfig, compare=False)
    """Who computes it; no part of the shape, and free to change when a run goes on."""

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.hidden_size // self.num_attention_heads

    def shape(self) -> dict[str, Any]:
        """What the weights and what they mean depend on: every field but `ops`."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.compare}


@dataclass(frozen=True)
class SourceConfig:
    """One dataset of the mixture: folders that `data-prep` wrote."""

    name: str
    """What the source is called in metrics and pictures, e.g. slimpajama."""
    train: str
    """Folder with the manifest of the training split (path)."""
    weight: float | None = None
    """Share of this source in every step, relative to the other sources' weights (sequences to sequences; 7 and 3 is 7:3);
    none, for all sources alike: by size, each sequence of all as often as any other."""
    validation: str | None = None
    """Folder with the manifest of the validation split (path); none: this source is not validated."""


@dataclass(frozen=True)
class StageConfig:
    """From some step on, another mixture of the same sources."""

    first_step: int
    """The first step of the stage (steps, counted from 1)."""
    weights: dict[str, float]
    """Source's name -> its share relative to the others'; a source that is not named is not drawn from."""


@dataclass(frozen=True)
class DataConfig:
    """The mixture that is trained on, and how it is read."""

    seq_len: int = 2048
    """Tokens a sequence predicts, T; T + 1 are read."""
    sources: list[SourceConfig] = field(default_factory=list)
    """The mixture, a list of: name (what the source is called in metrics and pictures); train and validation (folders that
    data-prep wrote, paths; without validation it is not validated); weight (its share of every step, relative to the others':
    7 and 3 is 7:3; without weights each sequence of all is as likely as any other)."""
    stages: list[StageConfig] = field(default_factory=list)
    """Changes of the mixture (list of first_step, weights), in the order of their steps; before the first, the weights above."""
    verify: Literal["full", "sizes"] = "full"
    """What is checked of the shards before the first step: their sizes only, or every byte's checksum and every id, shared
    among the ranks and done once until a file changes."""
    allow_change: bool = False
    """Go on from a checkpoint that was trained on other data, another mixture or seed; what changed is said."""
    num_workers: int = 2
    """Loader processes a rank; 0 reads in the training process. The order of the data does not depend on it."""
    intra_document: bool = False
    """No attention across the documents of a sequence, and positions counted from each document's start; in validation too.
    Documents end with EOS, which the shards must have."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, and how large a step."""

    max_steps: int = 1_430_512
    """Optimizer steps in the whole run (steps). The schedule ends there."""
    global_batch_size: int = 1024
    """Sequences an optimizer step takes, over all ranks."""
    micro_batch_size: int = 8
    """Sequences a rank takes in one forward. Changes memory and speed, not the run."""
    log_every: int = 10
    """A line of metrics every so many steps; each costs one device synchronisation (steps)."""
    z_loss: float = 0.0
    """Adds z_loss x log^2 Z to what is minimised, Z the sum of a token's exp(logits), which keeps logits from drifting (PaLM,
    arXiv 2204.02311, section 5, uses 1e-4). It acts through the gradient; the loss that is logged stays the cross-entropy."""
    max_skipped_steps: int = 10
    """Stop when so many steps in a row were left out because a gradient was not finite (steps)."""
    deterministic: bool = False
    """On a GPU, only algorithms that give the same bits every time; slower. A CPU always does."""
    max_hours: float = 0.0
    """Save and leave before so many hours are over, where the scheduler does not tell its limit (hours); 0: no limit."""
    stop_margin_s: float = 60.0
    """Kept free at the end of the job's time, besides the longest step and twice the longest save so far (seconds)."""
    max_restarts: int = 3
    """Refuse to start after so many restarts by the scheduler without a new checkpoint between them."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule, and clipping."""

    max_lr: float = 4e-4
    """Learning rate after the warm-up (no unit)."""
    min_lr: float = 4e-5
    """Learning rate of the last step (no unit)."""
    warmup_steps: int = 2000
    """Linear warm-up, from max_lr / warmup_steps to max_lr (steps)."""
    beta1: float = 0.9
    """Decay of the gradient's running mean (per step)."""
    beta2: float = 0.95
    """Decay of the squared gradient's running mean (per step)."""
    eps: float = 1e-8
    """Added to the root of the second moment (no unit)."""
    weight_decay: float = 0.1
    """Decoupled weight decay (times the learning rate, per step)."""
    decay_norms_and_embeddings: bool = False
    """Decay the norms' weights and the embedding too, as TinyLlama's own run did."""
    max_grad_norm: float = 1.0
    """The global gradient norm is clipped to this (L2 norm over all parameters)."""


@dataclass(frozen=True)
class ValidationConfig:
    """Validation loss, one figure a source."""

    every_steps: int = 5000
    """Validate every so many steps, before the first and after the last (steps); 0: never."""
    max_sequences: int = 1024
    """Sequences of each source's validation split to take, spread evenly over it; the same ones every time."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep. A run always ends with a save."""

    every_steps: int = 1000
    """Save every so many steps (steps); 0: only at the end."""
    keep_last: int = 3
    """Committed checkpoints to keep, newest first; 0: all of them."""
    keep_every: int = 0
    """Keep the checkpoints of every so many steps for good (steps); 0: none."""
    in_background: bool = True
    """Training goes on while a checkpoint is written; it waits only for a copy in the host's memory."""


@dataclass(frozen=True)
class ParallelConfig:
    """Devices, precision, sharding."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes CUDA where there is a GPU."""
    strategy: Literal["auto", "single", "full_shard", "shard_grad_op", "hybrid"] = "auto"
    """single: one rank, not sharded. full_shard: parameters, gradients and optimizer state over all ranks. shard_grad_op:
    alike, but parameters stay gathered. hybrid: sharded over groups of ranks (`shard_size`), the groups replicas of each
    other. auto: single for one rank, hybrid for several nodes, else shard_grad_op where it fits the GPU, else full_shard; the
    log says what and why."""
    shard_size: int = 0
    """Ranks (processes) of a group in hybrid, neighbours in rank; 0: those of a node."""
    gather: Literal["auto", "layer", "micro_step", "step"] = "auto"
    """How long gathered parameters are kept (2 bytes a parameter in bf16, 4 in fp32): for a layer's forward and again for its
    backward; from a micro-step's forward to its backward; from a step's first forward to its last backward. auto: step for
    shard_grad_op, else layer."""
    reduce: Literal["auto", "micro_step", "step"] = "auto"
    """When gradients are reduced: in every micro-step, so that a rank keeps its shard of the sum; or once a step, so that
    it keeps the whole sum between micro-steps (4 bytes a parameter). hybrid reduces over its replicas once a step in any case.
    auto: micro_step for hybrid and where the whole sum is more than a sixth of the GPU's memory, else step."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in the host's memory, and update them there: for models that do not fit,
    and slow. Needs a sharded strategy; on a CPU it changes nothing."""
    activation_checkpointing: int = 0
    """Every so many layers, drop one's activations in the forward and compute them again in the backward (layers): 1, every
    layer; 0, none."""
    precision: Literal["bf16", "fp32", "fp8"] = "bf16"
    """Type of the products and of the residual stream; weights, optimizer, reductions, statistics of norms and the loss are
    always fp32. fp8: the layers' linear products in float8 with one scale a tensor (torchao), all else bf16."""
    compile: bool = True
    """torch.compile: the whole model on one device, each layer under FSDP2."""


@dataclass(frozen=True)
class WatchdogConfig:
    """When a rank is taken to hang, or to be slow."""

    limit_s: float = 600.0
    """A rank that stays so long in one place of the loop hangs: it is named, stacks are written, the job ends (seconds);
    0: no watchdog."""
    first_step_limit_s: float = 1800.0
    """The same until the first step is done: shards are checked, a checkpoint is loaded, the model compiled (seconds)."""
    stragglers_every: int = 10
    """Compare what each rank's own work takes every so many lines of metrics, and name the slow (lines); 0: never."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run_dir: str = "runs/unnamed"
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, tensorboard/ (path). A run found there is resumed."""
    seed: int = 1337
    """Fixes the initial weights and the order of the data (whole number)."""
    logger: Literal["none", "tensorboard", "wandb"] = "tensorboard"
    """Where metrics go besides metrics.jsonl. wandb takes its key from the environment and works offline."""
    resume: str | None = None
    """A committed checkpoint to go on from (path); none: the newest whole one in run_dir, if there is one."""
    init_from: str | None = None
    """Weights to begin a new run with: a checkpoint of Cria's or a Hugging Face folder (path). Only the weights are taken."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)


def parse(
    argv: list[str],
    prog: str = "pretrain train",
    purpose: str = "Train, or go on with, the run that the configuration describes.",
) -> Config:
    """Read `--config FILE` and the overrides in `argv`, and check the result; `prog` and `purpose` are for --help.

    Raises:
        ValueError: with all problems found, one after the other.
        SystemExit: status 2 for an unknown key or a wrong type, 0 after --help; one line is printed.
    """
    import jsonargparse  # slow to import, and only commands need it

    from pretrain.cli import Parser

    parser = Parser(prog=prog, description=purpose)
    parser.add_argument("--config", action="config", help="A YAML file with any of the keys below.")
    parser.add_class_arguments(Config)
    parsed = parser.parse_args(argv)
    for section in dataclasses.fields(Config):
        if dataclasses.is_dataclass(section.type) and not isinstance(parsed[section.name], jsonargparse.Namespace):
            parser.error(f"{section.name} is {parsed[section.name]!r}; it must hold keys, or be left out")
    instantiate = (
        getattr(parser, "instantiate", None) or parser.instantiate_classes
    )  # its name before jsonargparse 4.49
    values = instantiate(parsed).as_dict()
    del values["config"]
    config = Config(**values)
    check(config)
    return config


def load(path: Path) -> Config:
    """Read a complete or partial YAML file, e.g. RUN_DIR/config.yaml, and check it."""
    return parse(["--config", str(path)])


def write(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def check(config: Config) -> None:
    """Raise one ValueError that names everything in `config` that cannot work on any number of ranks."""
    problems = [] if config.run_dir.strip() else ["run_dir is empty; name a folder for the run"]
    problems += [*_check_model(config.model), *_check_data(config.data), *_check_optim(config.optim, config.train)]
    problems += _check_parallel(config.parallel)
    positive = {
        "data.seq_len": config.data.seq_len,
        "train.max_steps": config.train.max_steps,
        "train.global_batch_size": config.train.global_batch_size,
        "train.micro_batch_size": config.train.micro_batch_size,
        "train.log_every": config.train.log_every,
        "train.max_skipped_steps": config.train.max_skipped_steps,
        "validation.max_sequences": config.validation.max_sequences,
    }
    problems += [f"{name} is {value}; it must be at least 1" for name, value in positive.items() if value < 1]
    at_least_zero = {
        "data.num_workers": config.data.num_workers,
        "train.max_hours": config.train.max_hours,
        "train.stop_margin_s": config.train.stop_margin_s,
        "train.max_restarts": config.train.max_restarts,
        "validation.every_steps": config.validation.every_steps,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "parallel.shard_size": config.parallel.shard_size,
        "parallel.activation_checkpointing": config.parallel.activation_checkpointing,
        "watchdog.limit_s": config.watchdog.limit_s,
        "watchdog.first_step_limit_s": config.watchdog.first_step_limit_s,
        "watchdog.stragglers_every": config.watchdog.stragglers_every,
    }
    problems += [f"{name} is {value}; it must be at least 0" for name, value in at_least_zero.items() if value < 0]
    if config.data.seq_len > config.model.max_position_embeddings:
        problems.append(
            f"data.seq_len {config.data.seq_len} tokens is longer than model.max_position_embeddings "
            f"{config.model.max_position_embeddings}; set the latter to at least {config.data.seq_len}"
        )
    if not problems:
        _check_batch(config.train, world_size=1, problems=problems)
    if problems:
        raise ValueError("; ".join(problems))


def _check_model(model: ModelConfig) -> list[str]:
    sizes = [f.name for f in dataclasses.fields(model) if f.type is int]
    problems = [f"model.{n} is {getattr(model, n)}; it must be at least 1" for n in sizes if getattr(model, n) < 1]
    if problems:
        return problems
    for name in ("rope_theta", "rms_norm_eps"):
        if not (isfinite(getattr(model, name)) and getattr(model, name) > 0):
            problems.append(f"model.{name} is {getattr(model, name)}; it must be a number above 0")
    D, H, H_kv = model.hidden_size, model.num_attention_heads, model.num_key_value_heads
    if D % H:
        problems.append(f"model.hidden_size {D} is not a multiple of model.num_attention_heads {H}")
    elif model.head_dim % 2:
        problems.append(
            f"model.hidden_size {D} / model.num_attention_heads {H} = {model.head_dim} features a head; "
            "rotary embeddings need an even number"
        )
    if H % H_kv:
        problems.append(f"model.num_attention_heads {H} is not a multiple of model.num_key_value_heads {H_kv}")
    return problems


def _check_data(data: DataConfig) -> list[str]:
    if not data.sources:
        return ["data.sources is empty; name at least one source with its folder (data-prep writes them)"]
    names = [source.name for source in data.sources]
    problems = [
        f"data.sources has {name!r} twice; names must differ" for name in sorted(set(names)) if names.count(name) > 1
    ]
    for source in data.sources:
        if source.weight is not None and not (isfinite(source.weight) and source.weight > 0):
            problems.append(f"data.sources: weight of {source.name} is {source.weight}; it must be a number above 0")
        if not source.name or set(source.name) & set("/ \t\n"):
            problems.append(f"data.sources: {source.name!r} cannot be a name; use letters without spaces or slashes")
    weighted = [source.name for source in data.sources if source.weight is not None]
    if weighted and len(weighted) < len(names):
        problems.append(
            f"data.sources: {', '.join(weighted)} have a weight and the others none; give all of them one, or none"
        )
    return problems + _check_stages(data.stages, names)


def _check_stages(stages: list[StageConfig], names: list[str]) -> list[str]:
    problems = []
    steps = [1, *(stage.first_step for stage in stages)]
    if any(later <= earlier for earlier, later in pairwise(steps)):
        problems.append(f"data.stages: first_step must rise from above 1; they are {steps[1:]}")
    for stage in stages:
        if unknown := sorted(set(stage.weights) - set(names)):
            problems.append(f"data.stages: {unknown[0]!r} at step {stage.first_step} is not one of the sources {names}")
        if not stage.weights or not all(isfinite(w) and w > 0 for w in stage.weights.values()):
            problems.append(
                f"data.stages: the weights at step {stage.first_step} must be numbers above 0; leave a source out for 0"
            )
    return problems


def _check_optim(optim: OptimConfig, train: TrainConfig) -> list[str]:
    problems = []
    if not (isfinite(train.z_loss) and train.z_loss >= 0):
        problems.append(f"train.z_loss is {train.z_loss}; it must be a number of at least 0")
    for name in ("max_lr", "min_lr", "eps", "weight_decay", "max_grad_norm"):
        if not (isfinite(getattr(optim, name)) and getattr(optim, name) >= 0):
            problems.append(f"optim.{name} is {getattr(optim, name)}; it must be a number of at least 0")
    if not 0 <= optim.min_lr <= optim.max_lr:
        problems.append(f"optim.min_lr {optim.min_lr} must lie between 0 and optim.max_lr {optim.max_lr}")
    if not 0 <= optim.warmup_steps <= train.max_steps:
        problems.append(
            f"optim.warmup_steps {optim.warmup_steps} must lie between 0 and train.max_steps {train.max_steps}"
        )
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optim, name) < 1:
            problems.append(f"optim.{name} is {getattr(optim, name)}; it must lie in [0, 1)")
    if not optim.max_grad_norm > 0:
        problems.append(f"optim.max_grad_norm is {optim.max_grad_norm}; it must be above 0")
    return problems


def _check_parallel(parallel: ParallelConfig) -> list[str]:
    problems = []
    strategy = f"parallel.strategy is {parallel.strategy}"
    if parallel.shard_size and parallel.strategy not in ("auto", "hybrid"):
        problems.append(f"parallel.shard_size is {parallel.shard_size} and {strategy}; set it to 0, or take hybrid")
    if (parallel.strategy == "full_shard" and parallel.gather not in ("auto", "layer")) or (
        parallel.strategy == "shard_grad_op" and parallel.gather == "layer"
    ):
        problems.append(
            f"parallel.gather is {parallel.gather} and {strategy}; full_shard gathers a layer, shard_grad_op a "
            "micro_step or a step"
        )
    if parallel.cpu_offload and parallel.strategy == "single":
        problems.append(f"parallel.cpu_offload is true and {strategy}, which is not sharded; take full_shard")
    return problems


def grad_accum_steps(train: TrainConfig, world_size: int) -> int:
    """Forward passes a rank makes in one optimizer step: global_batch_size / (micro_batch_size x world_size).

    Raises:
        ValueError: when that is not whole, with the nearest batch sizes that are.
    """
    problems: list[str] = []
    _check_batch(train, world_size, problems)
    if problems:
        raise ValueError(problems[0])
    return train.global_batch_size // (train.micro_batch_size * world_size)


def _check_batch(train: TrainConfig, world_size: int, problems: list[str]) -> None:
    unit = train.micro_batch_size * world_size
    below = train.global_batch_size // unit * unit
    if below == train.global_batch_size:
        return
    nearest = f"{below} or {below + unit}" if below else f"{unit}"
    problems.append(
        f"train.global_batch_size {train.global_batch_size} is not a multiple of train.micro_batch_size "
        f"{train.micro_batch_size} x world_size {world_size} = {unit} sequences; nearest: {nearest}"
    )
