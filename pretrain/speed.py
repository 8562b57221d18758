"""How long a training step takes, formula by formula; no GPU is needed, and nothing is run.

    ModelConfig, T, Layout, Chip ─> step_seconds() ─> Step: products, attention, memory-bound, loss, recomputed, communication,
                                                                 optimizer

Products and attention run at a share of the chip's dense peak, everything between them at a share of its memory's
bandwidth, collectives at the link's and by steps of a ring, hidden behind the computation as far as that goes. The shares are
`Rates`, fitted to published runs (`published.py` has them, and what the fit is worth); a probe corrects them by what it
measures on its machine.
"""

from dataclasses import dataclass, fields, replace

from pretrain.chips import Chip
from pretrain.memory import FP32, Layout, tokens_at_a_time
from pretrain.model import count
from pretrain.sections import ModelConfig


@dataclass(frozen=True)
class Rates:
    """What a chip attains of its datasheet; shares of 1."""

    fitted_on: str
    """The generation of chips whose published runs it is fitted to."""
    products: float
    """Of the dense peak, in matrix products."""
    attention: float
    """Of the dense peak, in flash attention's forward and backward, causal, heads of 64 to 128."""
    traffic: float
    """How much more than `layer_traffic` the published runs' hand-fused kernels move; compiled ones move that."""
    bandwidth: float = 0.8
    """Of the memory's bandwidth, in elementwise kernels; usual for streaming kernels."""
    link: float = 0.7
    """Of the link's bandwidth, in all-gather and reduce-scatter."""
    hidden: float = 0.25
    """Of communication behind computation, where there is computation enough: collectives take multiprocessors and bandwidth."""
    hop_s: float = 4e-6
    """A step of a ring between nodes, however little is sent (seconds)."""
    fit_error: float = 0.0
    """Nine of ten published runs, each left out of the fit, lie within it (share of 1): benchmarks/plan_fit.py."""
    layers: float = 1.0
    """A probe's correction: measured over predicted seconds of the layers."""
    rest: float = 1.0
    """A probe's correction: measured over predicted seconds of the loss and all else outside of the layers."""


A100 = Rates("A100", products=0.83, attention=0.31, traffic=1.9, fit_error=0.085)
"""Three numbers, fitted to 140 runs on A100 in `published.PUBLISHED`; `hidden` and `hop_s` fit both generations."""
HOPPER = Rates("H100", products=0.76, attention=0.18, traffic=2.5, fit_error=0.045)
"""As many, fitted to 70 runs on H100. Their attention was written for A100: what cuDNN's gives is not counted in."""

COMPILED_ERROR = 0.03
"""What it costs TinyLlama-1.1B where compiled kernels move a quarter more than `layer_traffic` (share of 1). For an H200 Inductor
itself counts a fifth less (benchmarks/notes.md)."""

LAUNCH_S = 40 * 5e-6
"""A layer's forward and backward are at least this long: about 40 kernels, 5 us each to start (seconds); assumed."""


def rates_of(chip: Chip) -> Rates:
    """The calibration of a chip's generation, or of the one that is nearest."""
    return HOPPER if chip.capability >= (9, 0) else A100


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step, by what they go to."""

    products: float
    attention: float
    memory_bound: float
    loss: float
    recomputed: float
    communication: float
    """What is not hidden behind the computation."""
    optimizer: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def step_seconds(model: ModelConfig, seq_len: int, layout: Layout, chip: Chip, rates: Rates) -> Step:
    """One optimizer step on every GPU of the layout: its seconds, by what they go to."""
    counts, L, n = count(model), model.num_hidden_layers, layout.activation_checkpointing
    if layout.precision == "fp32":
        chip = replace(chip, flops=chip.fp32_flops)
    tokens = layout.micro_batch_size * seq_len * layout.grad_accum_steps
    bandwidth = rates.bandwidth * chip.bytes_per_s
    products = 6 * L * counts.layer_in_products * tokens / (rates.products * chip.flops)
    # Causal: 2 T D forward, and 2.5 times as much backward, where the scores are computed again (arXiv 2307.08691, 3.2).
    attention = 7 * L * model.hidden_size * seq_len * tokens / (rates.attention * chip.flops)
    traffic = (1.0 if layout.compile else rates.traffic) * layer_traffic(model, layout)
    between = traffic * L * tokens / bandwidth
    between = max(between, L * LAUNCH_S * layout.grad_accum_steps - products - attention)
    checkpointed = -(-L // n) / L if n else 0
    recomputed = checkpointed * (products / 3 + attention / 3.5 + between / 3)
    recomputed += (1 - checkpointed) * _recomputed_part(model, tokens, layout, chip, rates)
    loss = _loss_seconds(model, seq_len, tokens, layout, chip, rates)
    products, attention, between, recomputed = (
        seconds * rates.layers for seconds in (products, attention, between, recomputed)
    )
    loss *= rates.rest
    spread, at_the_end = communication_seconds(model, layout, chip, rates)
    updated = L * counts.layer * rates.layers + (counts.total - L * counts.layer) * rates.rest
    optimizer = 40 * updated / layout.shards / bandwidth  # AdamW moves 28 bytes a parameter, norm and clipping 12
    computation = products + attention + between + recomputed + loss
    # The last micro-step's backward, two thirds of all but recomputing, hides what is reduced once a step.
    last_backward = (2 / 3 * (computation - recomputed) + recomputed) / layout.grad_accum_steps
    return Step(
        products=products,
        attention=attention,
        memory_bound=between,
        loss=loss,
        recomputed=recomputed,
        communication=exposed(spread, computation - min(at_the_end, last_backward), rates)
        + exposed(at_the_end, last_backward, rates),
        optimizer=optimizer,
    )


def layer_traffic(model: ModelConfig, layout: Layout) -> float:
    """Bytes that a layer's fused elementwise kernels read and write for a token, forward and backward.

    Forward, in numbers: norm 2 D; rotary 2 (D + D_kv); residual with the second norm 4 D; SwiGLU 3 F; residual 3 D. The
    backward moves about twice as much.
    """
    D, F, kv = model.hidden_size, model.intermediate_size, model.num_key_value_heads * model.head_dim
    return 3 * (11 * D + 2 * kv + 3 * F) * layout.compute_bytes


def _recomputed_part(model: ModelConfig, tokens: int, layout: Layout, chip: Chip, rates: Rates) -> float:
    """Seconds of `recompute`: gate_proj and up_proj are 4 D F a token; then both norms and SwiGLU's product are written again."""
    if layout.recompute == "none":
        return 0.0
    D, F, L = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    flops = 4 * D * F if layout.recompute == "mlp" else 0
    moved = (2 * D + F) * layout.compute_bytes
    return L * tokens * (flops / (rates.products * chip.flops) + moved / (rates.bandwidth * chip.bytes_per_s))


def _loss_seconds(model: ModelConfig, seq_len: int, tokens: int, layout: Layout, chip: Chip, rates: Rates) -> float:
    """Three products with the head, and about 40 bytes moved a logit: cast, log-sum, exp, cast; d_weight once a chunk.

    Compiled, d_weight is added up once, from the chunks' parts.
    """
    V, D, c = model.vocab_size, model.hidden_size, layout.compute_bytes
    chunk = tokens_at_a_time(model, seq_len, layout)
    moved = 40 * V * tokens + V * D * (2 * c if layout.compile else 2 * FP32 + 2 * c) * tokens / chunk
    return 6 * V * D * tokens / (rates.products * chip.flops) + moved / (rates.bandwidth * chip.bytes_per_s)


def communication_seconds(model: ModelConfig, layout: Layout, chip: Chip, rates: Rates) -> tuple[float, float]:
    """Seconds of collectives in a step, hidden or not: of those spread over all of it, and of those in its last backward.

    A ring runs at the slowest link that it crosses; a node's ring has all of its network cards. Between nodes each of its steps
    takes `hop_s` besides: n - 1 for what a layer gathers or reduces among n, twice that for what replicas add up.
    """
    gathered, reduced, to_replicas = sent_bytes(count(model).total, layout)
    gathers, reductions = _times(layout)
    inside = rates.link * chip.link
    between_nodes = rates.link * chip.network_gbits / 8 * 1e9
    in_ring, hops_s, groups = inside, 0.0, model.num_hidden_layers + 1
    if layout.shards > layout.gpus_per_node:
        in_ring, hops_s = min(inside, between_nodes), groups * (layout.shards - 1) * rates.hop_s
    gathered_s, reduced_s = gathered / in_ring + gathers * hops_s, reduced / in_ring + reductions * hops_s
    replicas_s = to_replicas / inside
    if layout.nodes > 1:
        among = min(layout.shards, layout.gpus_per_node)  # the rings of a node's shards share its cards
        replicas = layout.world_size // layout.shards
        replicas_s = to_replicas * among / between_nodes + 2 * groups * (replicas - 1) * rates.hop_s
    if layout.reduce == "step":
        return gathered_s, reduced_s + replicas_s
    return gathered_s + reduced_s, replicas_s


def _times(layout: Layout) -> tuple[int, int]:
    """How often in a step a layer's weights are gathered, and its gradients reduced."""
    micro_steps = layout.grad_accum_steps
    gathers = {"layer": 2 * micro_steps, "micro_step": micro_steps, "step": 1}[layout.gather]
    return gathers, 1 if layout.reduce == "step" else micro_steps


def sent_bytes(parameters: int, layout: Layout) -> tuple[float, float, float]:
    """What a GPU sends in a step: weights and gradients to those with which it shares a copy, and to its replicas (bytes).

    Weights are gathered in the compute's type, twice a micro-step or as `gather` says; gradients are reduced in fp32, once a
    step or in every micro-step: (n - 1) / n of each go around a ring of n. Replicas add up their shards once a step, which
    takes a ring twice that.
    """
    P, G = parameters, layout.shards
    replicas = layout.world_size // G
    gathers, reductions = _times(layout)
    in_ring = P * (G - 1) / G
    return (
        in_ring * layout.compute_bytes * gathers,
        in_ring * FP32 * reductions,
        2 * FP32 * P / G * (replicas - 1) / replicas,
    )


def exposed(communication: float, computation: float, rates: Rates) -> float:
    """What of the communication is not behind the computation (seconds)."""
    return max(communication - computation, (1 - rates.hidden) * communication)


def tokens_per_sec_per_gpu(seq_len: int, layout: Layout, step: Step) -> float:
    """Tokens of a step over its seconds, on one GPU."""
    return layout.micro_batch_size * layout.grad_accum_steps * seq_len / step.seconds
