"""The sections of a configuration: every key, its default and its unit, on one page.

What computes takes its own section, or the values that it needs; the whole tree goes to what prepares, describes or checks a
run. `pretrain.config` reads and checks them.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints


@dataclass(frozen=True)
class OpsConfig:
    """Which library computes each operation. auto takes the fastest that is installed and fits chip, type and compilation.

    What was taken stands in the log and in RUN_DIR/operations.json. What is asked for by name and cannot be had is an error.
    `model.ops: torch` is short for torch in each that has it, and auto in the others.
    """

    attention: Literal["auto", "torch", "torch_flash", "flash_attn", "xformers"] = "auto"
    """torch is its fused attention (cuDNN's on Hopper and later, FlashAttention-2 on Ampere); torch_flash is its
    FlashAttention-2 on any GPU, flash_attn the library's."""
    swiglu: Literal["auto", "torch", "xformers", "liger"] = "auto"
    """xformers has it before 0.0.34 only, and takes the whole block; liger fuses the elementwise part (Triton)."""
    rope: Literal["auto", "torch", "flash_attn", "liger"] = "auto"
    """Rotary embedding of queries and keys."""
    rms_norm: Literal["auto", "torch", "liger"] = "auto"
    """Root-mean-square norms."""
    cross_entropy: Literal["auto", "torch", "flash_attn", "liger"] = "auto"
    """Output projection and loss. torch and liger never hold all logits; flash_attn does."""

    @classmethod
    def by(cls, backend: str) -> dict[str, str]:
        """The settings that `model.ops: backend` stands for: `backend` for each operation that it has, auto for the others.

        Raises:
            ValueError: no operation has it.
        """
        known = {name: get_args(hint) for name, hint in get_type_hints(cls).items()}
        if not any(backend in backends for backends in known.values()):
            names = ", ".join(dict.fromkeys(name for backends in known.values() for name in backends))
            raise ValueError(f"model.ops is {backend}; one word for all operations is one of {names}")
        return {name: backend if backend in backends else "auto" for name, backends in known.items()}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled: Hugging Face's rope_type llama3. It acts on short texts as on long ones."""

    factor: float
    """Low frequencies are divided by it (no unit): 8 in Llama 3.1, 32 in Llama 3.2."""
    low_freq_factor: float = 1.0
    """Low is what turns at most so many times within the original length (no unit)."""
    high_freq_factor: float = 4.0
    """What turns at least so many times within it stays as it is; between the two there is a passage (no unit)."""
    original_max_position_embeddings: int = 8192
    """The original length, of the sequences before the model was made to read longer ones (tokens)."""


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
    rope_scaling: RopeScaling | None = None
    """Llama 3.1's and 3.2's scaling of the rotary frequencies: factor (8 in Llama 3.1, 32 in Llama 3.2), low_freq_factor and
    high_freq_factor (1 and 4), original_max_position_embeddings (8192 tokens). none: not scaled."""
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
        """What the weights and what they mean depend on: every field but `ops`, as JSON has them.

        `rope_scaling` is left out where there is none, as by versions of Cria that did not know it.
        """
        shape = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        scaling = shape.pop("rope_scaling")
        return shape if scaling is None else {**shape, "rope_scaling": asdict(scaling)}

    @classmethod
    def of_shape(cls, shape: dict[str, Any]) -> "ModelConfig":
        """The inverse of `shape`."""
        scaling = shape.get("rope_scaling")
        return cls(**{**shape, "rope_scaling": None if scaling is None else RopeScaling(**scaling)})


FREE_TO_CHANGE = {"max_position_embeddings"}
"""Fields of a model's shape that no weight depends on."""


def unlike(its: dict[str, Any], ours: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where two of `ModelConfig.shape` differ, so that weights of one do not fit the other: field -> (its value, ours)."""
    # Only a shape with rope_scaling names it: it may have been taken away as well as added.
    values = {name: (its.get(name), value) for name, value in {"rope_scaling": None, **ours}.items()}
    return {name: (a, b) for name, (a, b) in values.items() if a != b and name not in FREE_TO_CHANGE}


@dataclass(frozen=True)
class SourceConfig:
    """One dataset of the mixture: folders that `data-prep` wrote."""

    name: str
    """What the source is called in metrics and pictures, e.g. slimpajama."""
    train: str
    """Folder with the manifest of the training split (path)."""
    weight: float | None = None
    """This source's share of every step (sequences), relative to the other sources' weights: 7 and 3 is 7:3. 0: it comes in
    with a stage. none, which must then hold for all sources: in proportion to their sizes, so that every sequence is drawn
    equally often."""
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
    7 and 3 is 7:3; 0, it comes in with a stage; without weights every sequence is drawn equally often)."""
    stages: list[StageConfig] = field(default_factory=list)
    """Changes of the mixture (list of first_step, weights), in the order of their steps; before the first, the weights above."""
    verify: Literal["full", "sizes"] = "full"
    """What is checked of the shards before the first step. full: every byte's checksum and every token id, the ranks sharing the
    work; a dataset that passed is read again by neither this run nor those begun from its checkpoints, until a file changes.
    sizes: only the files' sizes, for instance after data-prep verify."""
    allow_change: bool = False
    """Go on from a checkpoint that was trained on other data, another mixture or seed; what changed is said."""
    num_workers: int = 2
    """Number of threads a rank that read ahead; with 0 the training thread reads. The order of the data does not depend on it."""
    intra_document: bool = False
    """No attention across the documents of a sequence, and positions counted from each document's start; in validation too.
    Documents end with EOS, which the shards must have; prepare them with BOS too if the model is to begin texts of its own, for
    no document sees the EOS of the one before."""


@dataclass(frozen=True)
class StepRange:
    """Steps one after the other."""

    first_step: int
    """The first of them (steps, counted from 1)."""
    last_step: int
    """The last of them (steps)."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, and how large a step."""

    max_steps: int = 1_430_512
    """Optimizer steps in the whole run (steps). The schedule ends there."""
    stop_after_step: int = 0
    """End after this step, saved and with status 0, though the schedule goes on to max_steps: to try the first part of a long
    run, which then goes on with another value (steps); 0: end at max_steps."""
    leave_out: list[StepRange] = field(default_factory=list)
    """Steps that are not trained, as those whose data make the loss spike, a list of first_step and last_step (steps, both left
    out). Their sequences are not seen; every other step has the sequences and the learning rate that it has without this. For
    steps that lie behind the newest checkpoint, go back to one before them with `resume`."""
    global_batch_size: int = 1024
    """Sequences an optimizer step takes, over all ranks."""
    micro_batch_size: int = 8
    """Sequences a rank takes in one forward. Changes memory and speed, not the run."""
    log_every: int = 10
    """A line of metrics every so many steps; each costs one device synchronisation (steps)."""
    z_loss: float = 0.0
    """Adds z_loss (no unit) x log^2 Z to what is minimised, Z the sum of a token's exp(logits), so that logits do not drift
    (PaLM, arXiv 2204.02311, section 5, uses 1e-4). It acts through the gradient; what is logged stays the cross-entropy."""
    max_skipped_steps: int = 10
    """Stop when so many steps in a row updated nothing, because the gradient norm was infinite, NaN, 0 or above
    `optim.skip_grad_norm_above`; or nearly in a row: ten that update make up for one that did not (steps)."""
    deterministic: bool = False
    """On a GPU, only algorithms that give the same bits every time; slower. A CPU always does."""
    max_hours: float = 0.0
    """Save and leave before so many hours are over, where the scheduler does not tell its limit (hours); 0: no limit."""
    stop_margin_s: float = 60.0
    """Kept free at the end of the job's time (seconds), in addition to the longest step and twice the longest of the last 8
    saves. Together they take at most half of the time that was left when training began."""
    max_restarts: int = 3
    """Refuse to start after so many failed restarts in a row that added no update to the newest checkpoint; preemptions do not
    count under launch/slurm.sbatch."""

    @property
    def last_step(self) -> int:
        """The step after which training ends here."""
        return self.stop_after_step or self.max_steps


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule, and clipping."""

    max_lr: float = 4e-4
    """Learning rate after the warm-up (no unit)."""
    min_lr: float = 4e-5
    """Learning rate of the last step (no unit)."""
    warmup_steps: int = 2000
    """Linear warm-up, from max_lr / warmup_steps to max_lr (steps)."""
    lr_decay: Literal["cosine", "linear", "sqrt"] = "cosine"
    """How the learning rate falls from max_lr to min_lr: half a cosine, a line, or 1 - the root of the way (fast at first)."""
    lr_decay_steps: int = 0
    """How many steps it falls for, the last ones of the run; before them it stays at max_lr (steps). 0: all after the warm-up.
    With a number, what is trained before them does not depend on max_steps, and the checkpoint that lies before them is kept
    for good."""
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
    skip_grad_norm_above: float = 10.0
    """Skip an update whose gradient norm, before clipping, is more than so many times the median of the last 128 that were not
    skipped, once there are 64 (no unit); 0: none is skipped for that."""


@dataclass(frozen=True)
class ValidationSet:
    """Data that a run is only validated on: a folder that `data-prep` wrote."""

    name: str
    """What the set is called in metrics and pictures, e.g. wiki; unlike every source's name."""
    path: str
    """Folder with the manifest (path). Its tokenizer and its policy on BOS and EOS are those of the sources."""


@dataclass(frozen=True)
class ValidationConfig:
    """Validation loss, one figure a source, and one a set."""

    every_steps: int = 5000
    """Validate every so many steps, before the first and after the last (steps); 0: never."""
    max_sequences: int = 1024
    """Sequences of each source's validation split, and of each set, to take, spread evenly over it; the same ones every time."""
    sets: list[ValidationSet] = field(default_factory=list)
    """Data that is only validated on, whatever the mixture, a list of: name (what the set is called in metrics and pictures,
    unlike every source's); path (the folder that data-prep wrote, a path). No step of training depends on them: they may be
    added, changed and removed whenever the run goes on."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep. A run always ends with a save."""

    every_steps: int = 1000
    """Save every so many steps (steps); 0: only at the end, and as `every_minutes` says."""
    every_minutes: float = 30.0
    """Save, too, when the last save is so long ago: what a crash costs at most (minutes); 0: by steps only, and so
    where `keep_last` is 0."""
    keep_last: int = 3
    """How many checkpoints of multiples of `every_steps` to keep, the newest ones. One saved between them, by the clock or a
    signal, is kept while it is one of the two newest. 0: keep all, for good as below."""
    keep_every: int = 0
    """Keep the checkpoints of every so many steps for good (steps, a multiple of `every_steps`), whatever is set here later;
    0: none."""


@dataclass(frozen=True)
class ParallelConfig:
    """Devices, precision, sharding."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes CUDA where there is a GPU."""
    strategy: Literal["auto", "single", "full_shard", "shard_grad_op", "hybrid"] = "auto"
    """single: one rank, not sharded. full_shard: parameters, gradients and optimizer state over all ranks. shard_grad_op:
    alike, but parameters stay gathered. hybrid: sharded over groups of ranks (`shard_size`), the groups replicas of each
    other. auto: single for one rank. Several nodes: hybrid, unless weights, gradients and optimizer divided over one node take
    more than half of a GPU's memory; then full_shard. One node: shard_grad_op where parameters and gradients kept whole take at
    most a sixth of a GPU's memory, else full_shard. With `cpu_offload`: hybrid for several nodes, else full_shard. The log says
    what and why."""
    shard_size: int = 0
    """Ranks (processes) of a group in hybrid, neighbours in rank; 0: those of a node."""
    gather: Literal["auto", "layer", "micro_step", "step"] = "auto"
    """How long gathered parameters are kept (2 bytes a parameter in bf16, 4 in fp32). layer: for one layer's forward, gathered
    again for its backward. micro_step: from a micro-step's forward to its backward. step: from a step's first forward to its
    last backward. auto: step for shard_grad_op, and for hybrid without `cpu_offload` where they take at most a sixth of the GPU's
    memory, else layer."""
    reduce: Literal["auto", "micro_step", "step"] = "auto"
    """When gradients are reduced: in every micro-step, so that a rank keeps its shard of the sum; or once a step, so that
    it keeps the whole sum between micro-steps (4 bytes a parameter). hybrid reduces over its replicas once a step in any case.
    auto: micro_step where the whole sum, in hybrid with the gathered parameters, is more than a sixth of the GPU's memory, and in
    hybrid on CPUs or with `cpu_offload`; else step."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in the host's memory, and update them there: for models that do not fit,
    and slow. Needs a sharded strategy; on a CPU it changes nothing."""
    activation_checkpointing: int = 0
    """Every so many layers, drop one's activations in the forward and compute them again in the backward (layers): 1, every
    layer; 0, none."""
    recompute: Literal["none", "elementwise", "mlp"] = "none"
    """What layers without `activation_checkpointing` compute again in the backward. elementwise: the results of norms and of
    SwiGLU, no matrix product. mlp: also gate_proj and up_proj, about a sixth more products. TinyLlama in bf16 keeps 59.5 kB a
    token and layer with none, 40.1 with elementwise, 17.5 with mlp. Without `compile`, elementwise saves only SiLU's result, and
    only where `ops.swiglu` is torch: a norm's result is kept for the product that takes it. mlp works without `compile` too."""
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
    """Compare the ranks' own work, on GPUs their waits for data and a matrix product, every so many lines of metrics, and name
    the slow (lines); 0: never."""


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
    """A committed checkpoint to go back to (path); none: the newest whole one in run_dir, if there is one. A scheduler's
    restart of the same command goes on from what has been saved since."""
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

    @property
    def branch_point(self) -> int:
        """The last step before the learning rate falls in `optim.lr_decay_steps`; 0: none. From its checkpoint, which is kept for
        good, the run can be made longer, or cooled down on other data.
        """
        return self.train.max_steps - self.optim.lr_decay_steps if self.optim.lr_decay_steps else 0
