"""What a run could be set to, what each setting means for memory and time, and which is the best.

Config, nodes, chip ─> layouts(): every strategy x micro-batch x what is computed again ─> outcome(): memory, seconds
─> choose(): the fastest that fits ─> keys_to_set(): what to add to the command for it
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from pretrain import config, float8, sharding, speed
from pretrain.chips import Chip
from pretrain.memory import Layout, Memory, memory
from pretrain.model import Llama, count
from pretrain.speed import Rates, Step

ROOM = 0.05
"""Share of a GPU's memory that is left free, since the model of memory is not exact."""

UNSEEN = 0.9
"""What counts, in a choice, of the speed of `shard_grad_op` over several nodes: what it gains over `hybrid` is small, and of the
runs that are known one was 14% slower than is predicted (`published.not_covered`)."""

RECOMPUTED = ((0, "none"), (0, "elementwise"), (0, "mlp"), (1, "none"), (2, "none"), (4, "none"))
"""Settings of `activation_checkpointing` and `recompute` to choose from."""


@dataclass(frozen=True)
class Basis:
    """What the figures rest on: a chip, what it attains, and by how much that is uncertain."""

    name: str
    chip: Chip
    rates: Rates
    activations_factor: float
    """A probe's correction of the activations; 1 without."""
    explained: str
    """The error of the tokens/s, and where it comes from."""
    error: str
    """The error alone, for the line of advice."""
    network: str = "assumed"
    """What the chip's network is: assumed, or given."""
    measured: bool = False
    """By a probe; or else by datasheet and published runs."""


@dataclass(frozen=True)
class Outcome:
    """A layout, and what it means."""

    layout: Layout
    memory: Memory
    fits: bool
    """True for all where the chip's memory is not known."""
    roomy: bool
    """It fits, and `ROOM` is left."""
    step: Step
    tokens_per_sec_per_gpu: float


@dataclass(frozen=True)
class Choice:
    """All that was looked at, and what is best of it."""

    outcomes: list[Outcome]
    as_configured: Outcome | None
    refused: str
    """Why it cannot run as configured; empty where it can."""
    best: Outcome | None
    """None where nothing fits."""


def look(settings: config.Config, basis: Basis, nodes: int, gpus_per_node: int) -> Choice:
    """Every layout on these GPUs, and the best; in bf16 where the configuration asks for an fp8 that cannot be had.

    Without a known memory only what is configured can be judged.

    Raises:
        ValueError: the sequences of a step cannot be divided among the GPUs.
    """
    as_configured, possible = None, settings
    refused = _fp8_refused(settings, basis.chip, basis.name)
    if refused:
        possible = replace(settings, parallel=replace(settings.parallel, precision="bf16"))
    outcomes = [outcome(possible, layout, basis) for layout in layouts(possible, nodes, gpus_per_node)]
    if not refused:
        try:
            as_configured = outcome(settings, configured(settings, nodes, gpus_per_node, basis.chip), basis)
        except ValueError as error:
            refused = str(error)
    known = basis.chip.memory is not None
    best = choose(outcomes, as_configured) if known or as_configured is None else as_configured
    return Choice(outcomes, as_configured, refused, best)


def _fp8_refused(settings: config.Config, chip: Chip, name: str) -> str:
    """What training would say of fp8 on this chip; empty where it would take it, or is not asked to."""
    if settings.parallel.precision != "fp8":
        return ""
    with torch.device("meta"):
        model = Llama(settings.model)
    try:
        float8.check(model, chip.capability, name)
    except ValueError as error:
        return str(error)
    return ""


def layouts(settings: config.Config, nodes: int, gpus_per_node: int) -> Iterator[Layout]:
    """Every layout to choose from: strategies and checkpointing that the configuration knows, each micro-batch that divides.

    Raises:
        ValueError: the sequences of a step cannot be divided among the GPUs.
    """
    world_size = nodes * gpus_per_node
    if nodes < 1 or gpus_per_node < 1:
        raise ValueError(f"--nodes {nodes} and --gpus_per_node {gpus_per_node} must be at least 1")
    share = config.grad_accum_steps(replace(settings.train, micro_batch_size=1), world_size)
    for strategy, gather, reduce in _shardings(nodes, world_size):
        for micro_batch_size in (b for b in range(1, share + 1) if share % b == 0):
            for every, recompute in RECOMPUTED:
                yield Layout(
                    strategy,
                    nodes,
                    gpus_per_node,
                    micro_batch_size=micro_batch_size,
                    grad_accum_steps=share // micro_batch_size,
                    activation_checkpointing=every,
                    precision=settings.parallel.precision,
                    compile=settings.parallel.compile,
                    gather=gather,
                    reduce=reduce,
                    recompute=recompute,
                )


def _shardings(nodes: int, world_size: int) -> list[tuple[str, str, str]]:
    """Strategy, gather and reduce to choose from."""
    if world_size == 1:
        return [("single", "step", "step")]
    gathers = [("full_shard", "layer"), ("shard_grad_op", "step")]
    gathers += [("hybrid", "layer"), ("hybrid", "step")] if nodes > 1 else []
    return [(strategy, gather, reduce) for strategy, gather in gathers for reduce in ("step", "micro_step")]


def configured(settings: config.Config, nodes: int, gpus_per_node: int, chip: Chip) -> Layout:
    """The layout that the configuration asks for; what is auto in it, as training will decide it.

    Raises:
        ValueError: its micro-batch does not divide, its strategy does not fit the GPUs, or it asks for cpu_offload.
    """
    p, world_size = settings.parallel, nodes * gpus_per_node
    if p.cpu_offload:
        raise ValueError("parallel.cpu_offload is true, for which the plan has no figures")
    chosen = sharding.choose(p, count(settings.model).total, world_size, gpus_per_node, chip.memory)
    grad_accum_steps = config.grad_accum_steps(settings.train, world_size)
    return Layout.of(p, chosen, nodes, gpus_per_node, settings.train.micro_batch_size, grad_accum_steps)


def outcome(settings: config.Config, layout: Layout, basis: Basis) -> Outcome:
    """Memory and speed of one layout."""
    T = settings.data.seq_len
    held = memory(settings.model, T, layout, basis.activations_factor)
    step = speed.step_seconds(settings.model, T, layout, basis.chip, basis.rates)
    room = basis.chip.memory
    fits, roomy = (room is None or held.total <= share * room for share in (1, 1 - ROOM))
    return Outcome(layout, held, fits, roomy, step, speed.tokens_per_sec_per_gpu(T, layout, step))


def choose(outcomes: list[Outcome], as_configured: Outcome | None = None) -> Outcome | None:
    """The fastest that leaves `ROOM`, or where none does, that fits; or `as_configured`, where that is within 1% of it.

    The model cannot tell so small a difference, and what it does not know well counts less (`UNSEEN`). So of those that are like
    the fastest but for the micro-batch, and within 1%, it is the one with the largest: a larger product is never slower.
    """
    roomy = [o for o in outcomes if o.roomy] or [o for o in outcomes if o.fits]
    fastest = max(roomy, key=_trusted, default=None)
    if fastest is None:
        return None
    least = 0.99 * _trusted(fastest)
    if as_configured is not None and as_configured.roomy and as_configured.tokens_per_sec_per_gpu >= least:
        return as_configured
    alike = [o for o in roomy if _same_but_batch(o.layout, fastest.layout) and _trusted(o) >= least]
    return max(alike, key=lambda o: o.layout.micro_batch_size)


def _trusted(found: Outcome) -> float:
    """Tokens/s and GPU as far as they count in a choice."""
    unseen = found.layout.nodes > 1 and found.layout.strategy == "shard_grad_op"
    return found.tokens_per_sec_per_gpu * (UNSEEN if unseen else 1.0)


def keys_to_set(settings: config.Config, layout: Layout, chip: Chip) -> str:
    """What to add to the command for training to take `layout`; empty where it does by itself."""
    p, nodes, gpus_per_node = settings.parallel, layout.nodes, layout.gpus_per_node
    keys: dict[str, Any] = {"parallel.cpu_offload": "false"} if p.cpu_offload else {}
    if settings.train.micro_batch_size != layout.micro_batch_size:
        keys["train.micro_batch_size"] = layout.micro_batch_size
    asked: dict[str, Any] = {
        name: getattr(layout, name) for name in ("activation_checkpointing", "recompute", "precision")
    }
    keys |= {f"parallel.{name}": wanted for name, wanted in asked.items() if getattr(p, name) != wanted}
    if p.shard_size and layout.strategy == "hybrid":  # a plan's groups are nodes
        keys["parallel.shard_size"] = asked["shard_size"] = 0
    train = replace(settings.train, micro_batch_size=layout.micro_batch_size)
    settings = replace(settings, train=train, parallel=replace(p, **asked, cpu_offload=False))
    try:
        same = configured(settings, nodes, gpus_per_node, chip).strategy == layout.strategy
    except ValueError:
        same = False
    if not same:
        keys["parallel.strategy"] = asked["strategy"] = layout.strategy
        settings = replace(settings, parallel=replace(p, **asked, cpu_offload=False))
    taken = configured(settings, nodes, gpus_per_node, chip)  # what is auto may depend on the strategy
    keys |= {
        f"parallel.{n}": getattr(layout, n) for n in ("gather", "reduce") if getattr(taken, n) != getattr(layout, n)
    }
    return " ".join(f"--{key} {value}" for key, value in keys.items())


def _same_but_batch(a: Layout, b: Layout) -> bool:
    ours, others = (replace(x, micro_batch_size=1, grad_accum_steps=1, shard_size=0) for x in (a, b))
    return ours == others and a.shards == b.shards


def larger(outcomes: list[Outcome], best: Outcome) -> list[Outcome]:
    """Larger micro-batches that fit with room, each in its fastest layout; of those that compute the same again, the largest."""
    above = [o for o in outcomes if o.roomy and o.layout.micro_batch_size > best.layout.micro_batch_size]
    found = {}
    for size in sorted({o.layout.micro_batch_size for o in above}):
        of_size = (o for o in above if o.layout.micro_batch_size == size)
        fastest = max(of_size, key=_trusted)
        found[fastest.layout.activation_checkpointing, fastest.layout.recompute] = fastest
    return sorted(found.values(), key=lambda o: o.layout.micro_batch_size)


def nodes_needed(settings: config.Config, basis: Basis, nodes: int, gpus_per_node: int) -> int | None:
    """The fewest nodes, more than `nodes`, on which something fits with room; None where no number of them does."""
    batch = settings.train.global_batch_size
    for more in range(nodes + 1, batch // gpus_per_node + 1):
        if batch % (more * gpus_per_node):
            continue
        if any(outcome(settings, layout, basis).roomy for layout in layouts(settings, more, gpus_per_node)):
            return more
    return None
