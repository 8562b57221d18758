"""What a training step holds in a GPU's memory, formula by formula; no GPU is needed, and nothing is run.

ModelConfig, T, Layout (how the run lies over the GPUs) ─> memory() ─> Memory, in bytes: parameters, gradients, optimizer,
activations, logits, ... The formulas follow this project's own model: `layer_keeps` names every tensor that a layer keeps
for its backward, and a test counts them in the real model (tests/test_memory.py).

What is not computed but assumed is a constant here, with its reason. D, F, V, L, T, H as everywhere; P parameters; c bytes of a
number in the compute, the residual stream too.
"""

from dataclasses import KW_ONLY, dataclass, fields, replace

from pretrain import ops
from pretrain.model import count
from pretrain.sections import ModelConfig, ParallelConfig
from pretrain.sharding import Sharding

FP32, BF16 = 4, 2
GIB = 2**30

CONTEXT = int(0.6 * GIB)
"""A process's CUDA context, loaded kernels and cuBLAS workspaces (bytes); assumed: 0.4 to 0.6 GiB on A100 and H100."""
NCCL = int(0.9 * GIB)
"""NCCL's channels and the streams of FSDP on more than one GPU (bytes); assumed."""
FRAGMENTATION = 0.04
"""Share of what is allocated that the caching allocator loses between blocks; assumed, for shapes that never change."""


@dataclass(frozen=True)
class Layout:
    """How a run lies over its GPUs."""

    strategy: str = "single"
    """single, full_shard, shard_grad_op, hybrid: as in `parallel.strategy`."""
    nodes: int = 1
    gpus_per_node: int = 1
    _: KW_ONLY
    micro_batch_size: int = 1
    """Sequences a GPU takes in one forward."""
    grad_accum_steps: int = 1
    """Forwards in an optimizer step."""
    activation_checkpointing: int = 0
    """0: none; n: every n-th layer is computed again in the backward."""
    precision: str = "bf16"
    compile: bool = True
    gather: str = "layer"
    """How long gathered weights are kept: for a layer, a micro_step, a whole step."""
    reduce: str = "step"
    """When gradients are reduced: once a step, the sum being kept whole till then, or in every micro_step."""
    shard_size: int = 0
    """GPUs that share one copy of weights and optimizer in hybrid; 0: those of a node."""
    recompute: str = "none"
    """What the layers that are not checkpointed compute again: none, elementwise, mlp, as in `parallel.recompute`."""
    fused_norm: bool = True
    """PyTorch's RMSNorm is one kernel on CUDA; on a CPU, not compiled, it is made of fp32 operations that keep more."""
    fused_swiglu: bool = False
    """Liger's SwiGLU computes SiLU again in its backward; PyTorch's, not compiled, keeps it."""

    @classmethod
    def of(
        cls,
        parallel: ParallelConfig,
        chosen: Sharding,
        nodes: int,
        gpus_per_node: int,
        micro_batch_size: int,
        grad_accum_steps: int,
    ) -> "Layout":
        """That of a run whose sharding was chosen."""
        return cls(
            chosen.strategy,
            nodes,
            gpus_per_node,
            micro_batch_size=micro_batch_size,
            grad_accum_steps=grad_accum_steps,
            activation_checkpointing=parallel.activation_checkpointing,
            precision=parallel.precision,
            compile=parallel.compile,
            gather=chosen.gather,
            reduce=chosen.reduce,
            shard_size=chosen.shard_size,
            recompute=parallel.recompute,
        )

    @property
    def world_size(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node

    @property
    def shards(self) -> int:
        """GPUs that share one copy of weights and optimizer."""
        return {"single": 1, "hybrid": self.shard_size or self.gpus_per_node}.get(self.strategy, self.world_size)

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in products and attention, c."""
        return FP32 if self.precision == "fp32" else BF16


def layer_keeps(model: ModelConfig, layout: Layout) -> dict[str, float]:
    """Bytes for each token that one layer keeps from its forward for its backward, by tensor.

    Flash attention (arXiv 2205.14135) keeps q, k, v, its result and a log-sum a head: nothing of T x T. Compiled, the
    partitioner of AOTAutograd keeps every operand of a product that the backward needs (the two norms' results, SwiGLU's
    gate, up and their product) and o_proj's result, and computes what lies between again. Eager keeps SiLU's result too.
    `recompute` leaves out what it computes again.
    """
    D, F = model.hidden_size, model.intermediate_size
    kv, c = model.num_key_value_heads * model.head_dim, layout.compute_bytes
    keeps: dict[str, float] = {
        "input": D * c,
        "norm 1": D * c,
        "q, k, v": (D + 2 * kv) * c,
        "attention": D * c,
        "log-sums": model.num_attention_heads * FP32,
        "norm 2": D * c,
        "gate, up": 2 * F * c,
        "gate * up": F * c,
        "root mean squares": 2 * FP32,
    }
    mlp = layout.recompute == "mlp"
    if layout.compile:
        keeps["o_proj"] = D * c
        again = ["norm 1", "norm 2", "gate * up"] if layout.recompute != "none" else []
    else:
        keeps |= {"after attention": D * c} | ({} if layout.fused_swiglu else {"silu(gate)": F * c})
        if not layout.fused_norm:
            keeps |= {"input": D * FP32, "normalised": (1 if mlp else 2) * D * FP32}
            keeps |= {} if mlp else {"after attention": D * FP32}
        again = ["silu(gate)"] if layout.recompute != "none" else []
    again += ["norm 2", "gate, up", "gate * up"] if mlp else []
    return {name: size for name, size in keeps.items() if name not in again}


def kept_bytes(model: ModelConfig, seq_len: int, layout: Layout) -> int:
    """All that one micro-batch's forward keeps for its backward, in the layers and before the loss, on one GPU (bytes).

    Of a checkpointed layer only its input is kept (arXiv 1604.06174). After the layers the last norm's input, and the ids.
    """
    B, L, n = layout.micro_batch_size, model.num_hidden_layers, layout.activation_checkpointing
    tokens = B * seq_len
    checkpointed = -(-L // n) if n else 0
    a_token = sum(layer_keeps(model, layout).values())
    layers = (L - checkpointed) * a_token * tokens
    inputs = checkpointed * model.hidden_size * layout.compute_bytes * tokens
    last_norm = model.hidden_size * (layout.compute_bytes if layout.fused_norm else 2 * FP32) + FP32
    return int(layers + inputs + (last_norm + 8) * tokens)


def copied(model: ModelConfig, layout: Layout) -> int:
    """Number of weights whose bf16 copies stay until the backward, on a single GPU; what is recomputed casts its weights again
    instead.
    """
    recast = model.num_hidden_layers - 1 if layout.recompute == "mlp" and not layout.activation_checkpointing else 0
    return count(model).in_products - recast * 3 * model.hidden_size * model.intermediate_size


def loss_keeps(model: ModelConfig, seq_len: int, layout: Layout) -> int:
    """`ops.linear_cross_entropy` keeps both gradients from the forward on: of its input (c), of its weight (fp32) (bytes)."""
    D, V = model.hidden_size, model.vocab_size
    return layout.micro_batch_size * seq_len * D * layout.compute_bytes + V * D * FP32


def logits_bytes(model: ModelConfig, seq_len: int, layout: Layout) -> int:
    """The logits that exist at a time: the product (c), in fp32, their gradient (c); and the weight's gradient once (bytes).

    Compiled, none are in fp32, and of the weight's gradient there is a part from each chunk.
    """
    V, D, c = model.vocab_size, model.hidden_size, layout.compute_bytes
    tokens, chunk = layout.micro_batch_size * seq_len, tokens_at_a_time(model, seq_len, layout)
    if layout.compile:
        return chunk * V * 2 * c + -(-tokens // chunk) * V * D * c
    return chunk * V * (2 * c + FP32) + V * D * c


def tokens_at_a_time(model: ModelConfig, seq_len: int, layout: Layout) -> int:
    """How many of a micro-step's tokens have their logits in memory at the same time."""
    tokens = layout.micro_batch_size * seq_len
    hidden_elements = tokens * model.hidden_size if layout.compile else 0
    return min(ops.logits_chunk(model.vocab_size, "cuda", hidden_elements), tokens)


def layer_backward(model: ModelConfig, seq_len: int, layout: Layout) -> int:
    """What one layer's backward holds at its widest: gradients of gate, up and their product, and four as wide as D (bytes).

    What is computed again of its forward is there again at that time.
    """
    wide = (3 * model.intermediate_size + 4 * model.hidden_size) * layout.compute_bytes
    whole = sum(layer_keeps(model, replace(layout, recompute="none")).values())
    again = whole if layout.activation_checkpointing else whole - sum(layer_keeps(model, layout).values())
    return int((wide + again) * layout.micro_batch_size * seq_len)


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU at the peak of a step, at the start of the backward (bytes)."""

    parameters: int
    """fp32, sharded; alone also the bf16 copies that the products take, which live as long as the forward's graph."""
    gradients: int
    """fp32, sharded; whole too where micro-steps are added up before the reduction (FSDP2 adds up in the reduction's type)."""
    optimizer: int
    """AdamW's two moments, fp32, sharded."""
    activations: int
    logits: int
    """The chunk of logits, and the two gradients that the loss keeps."""
    working: int
    """What a layer's backward needs beyond the room that the logits left."""
    communication: int
    """Gathered weights, and gradients on their way (FSDP2: the layer in use, the next one, and its copy)."""
    context: int
    fragmentation: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def memory(model: ModelConfig, seq_len: int, layout: Layout, activations_factor: float = 1.0) -> Memory:
    """The peak memory of a training step on one GPU, in bytes; activations_factor: a probe's correction of the activations."""
    counts, sharded = count(model), layout.strategy != "single"
    share = counts.total / layout.shards
    copies = 0 if sharded or layout.precision == "fp32" else BF16 * copied(model, layout)
    adds_up_whole = sharded and layout.reduce == "step" and layout.grad_accum_steps > 1
    chunk = logits_bytes(model, seq_len, layout)
    parts = {
        "parameters": FP32 * share + copies,
        "gradients": FP32 * share + (FP32 * counts.total if adds_up_whole else 0),
        "optimizer": 2 * FP32 * share,
        "activations": activations_factor * kept_bytes(model, seq_len, layout),
        "logits": loss_keeps(model, seq_len, layout) + chunk,
        "working": max(0, layer_backward(model, seq_len, layout) - chunk),
        "communication": _communication(model, layout) if sharded else 0,
        "context": CONTEXT + (NCCL if layout.world_size > 1 else 0),
    }
    allocated = sum(parts.values()) - parts["context"]
    return Memory(**{name: int(size) for name, size in parts.items()}, fragmentation=int(FRAGMENTATION * allocated))


def _communication(model: ModelConfig, layout: Layout) -> float:
    """Embedding and head stay gathered; of the layers three copies, or all where they are kept. Two reductions are in flight,
    each a gradient in the compute's type and its fp32 copy: of a layer, and of another or of head or embedding.
    """
    counts, c = count(model), layout.compute_bytes
    gathered = counts.total if layout.gather != "layer" else counts.root + 3 * counts.layer
    return c * gathered + (c + FP32) * (counts.layer + max(counts.layer, model.vocab_size * model.hidden_size))
