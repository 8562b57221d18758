"""`pretrain plan`: what a run needs, before it starts, without a GPU.

Config, chip, nodes ─> every strategy x micro-batch x checkpointing ─> memory, seconds (memory.py, speed.py)
─> the fastest that fits ─> days, disk, epochs ─> the advice in one line
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pretrain import config, data, published, sharding, speed
from pretrain.chips import CHIPS, Chip
from pretrain.cli import Parser, fail
from pretrain.history import short
from pretrain.memory import GIB, Layout, Memory, checkpoint_bytes, checkpoints_kept, memory
from pretrain.model import count
from pretrain.speed import Rates, Step

ROOM = 0.05
"""Share of a GPU's memory that is left free, since the model of memory is not exact."""

RECOMPUTED = ((0, "none"), (0, "elementwise"), (0, "mlp"), (1, "none"), (2, "none"), (4, "none"))
"""Settings of `activation_checkpointing` and `recompute` to choose from."""


@dataclass(frozen=True)
class Basis:
    """What the figures rest on: a chip, what it attains, and by how much that is uncertain."""

    name: str
    chip: Chip
    rates: Rates
    activations: float
    """A probe's correction of the activations; 1 without."""
    error: str
    """Of the tokens/s, with where it comes from."""
    note: str
    """The error alone, for the line of advice."""
    network: str = "assumed"
    """What the chip's network is: assumed, or given."""


@dataclass(frozen=True)
class Outcome:
    """A layout, and what it means."""

    layout: Layout
    memory: Memory
    fits: bool
    step: Step
    tokens_per_sec_per_gpu: float


def main(argv: list[str]) -> None:
    """The command `pretrain plan`."""
    parser = Parser(prog="pretrain plan", description="What a run needs, before it starts; no GPU is needed.")
    parser.add_argument("--config", type=Path | None, default=None, help="The run's configuration (path).")
    parser.add_argument("--chip", type=str | None, default=None, help=f"One of {', '.join(CHIPS)}.")
    parser.add_argument("--nodes", type=int, default=1, help="Machines.")
    parser.add_argument("--gpus_per_node", type=int | None, default=None, help="GPUs in each; 8, or with --probe all.")
    parser.add_argument("--tokens", type=float | None, default=None, help="Plan for so many, not train.max_steps.")
    parser.add_argument(
        "--network_gbits", type=float | None, default=None, help="Of a node to the others, all its cards (Gbit/s)."
    )
    parser.add_argument("--probe", action="store_true", help="Measure a few steps on this machine first.")
    parser.add_argument("--published", action="store_true", help="Show the model of time against published runs.")
    args = parser.parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console.width = 120  # lines stay whole in a file
    try:
        if args.published:
            console.print(published.table())
            return
        if args.config is None:
            raise ValueError("say what to plan: --config FILE; or --published")
        settings = _for_tokens(config.load(args.config, parser.prog), args.tokens)
        basis, gpus = _probed(settings, args.chip) if args.probe else (_known(args.chip, settings.parallel.compile), 8)
        gpus = gpus if args.gpus_per_node is None else args.gpus_per_node
        basis = _with_network(basis, gpus, args.network_gbits)
        length = "" if args.tokens is None else f"--train.max_steps {settings.train.max_steps}"
        _print_plan(console, settings, basis, args.nodes, gpus, length)
    except (ValueError, OSError) as error:
        fail(parser.prog, error)


def _for_tokens(settings: config.Config, tokens: float | None) -> config.Config:
    if tokens is None:
        return settings
    a_step = settings.train.global_batch_size * settings.data.seq_len
    if not (math.isfinite(tokens) and tokens >= a_step):
        raise ValueError(f"--tokens {tokens:g} must be at least one step's {a_step:,}")
    settings = replace(settings, train=replace(settings.train, max_steps=math.ceil(tokens / a_step)))
    config.check(settings)
    return settings


def _with_network(basis: Basis, gpus_per_node: int, network_gbits: float | None) -> Basis:
    """With the network that is given, or else with the usual one: a card for each GPU."""
    if network_gbits is None:
        usual = basis.chip.network_gbits * min(1.0, gpus_per_node / 8)
        return replace(basis, chip=replace(basis.chip, network_gbits=usual))
    if not (math.isfinite(network_gbits) and network_gbits > 0):
        raise ValueError(f"--network_gbits {network_gbits:g} must be a number of Gbit/s above 0")
    return replace(basis, chip=replace(basis.chip, network_gbits=network_gbits), network="given")


def _known(name: str | None, compiled: bool) -> Basis:
    """By datasheet and published runs."""
    if name is None:
        raise ValueError(f"say which --chip: {', '.join(CHIPS)}; or measure this machine's by --probe")
    if name not in CHIPS:
        raise ValueError(f"--chip {name}: there are {', '.join(CHIPS)}; another one is measured by --probe")
    chip = CHIPS[name]
    error = f"±{100 * published.stated_error(chip, compiled):.0f}%"
    rates = speed.rates_of(chip)
    runs = [run for run in published.PUBLISHED if speed.rates_of(CHIPS[run.chip]) is rates]
    most = max(run.layout.world_size for run in runs if not run.assumed)
    text = (
        f"{error}: the largest error on a published run on {rates.fitted_on} that was left out of the fit "
        f"(pretrain plan --published), of up to {most} GPUs"
    )
    if compiled:
        text += ", and what the gain of torch.compile is uncertain by"
    text += (
        f"; memory lies within the {100 * ROOM:.0f}% that are left free of what an allocator took (benchmarks/notes.md)"
    )
    return Basis(name, chip, rates, 1.0, text, error)


def _probed(settings: config.Config, name: str | None) -> tuple[Basis, int]:
    """By measurement on this machine; and its GPUs."""
    if name is not None:
        raise ValueError(f"--probe measures this machine's chip; leave --chip {name} out, or --probe")
    from pretrain.probe import FITTED, HELD_OUT, probe  # lightning takes seconds: a plan without it should not

    found = probe(settings)
    error = f"±{max(1, math.ceil(100 * found.time_error))}%"
    memory_error = (
        "memory is not measured on a CPU" if found.memory_error is None else f"memory ±{100 * found.memory_error:.0f}%"
    )
    text = (
        f"{error}: measured on this machine at {FITTED[0]} and {FITTED[1]} layers, its error at {HELD_OUT} between them; "
        f"{memory_error}; communication is not measured"
    )
    return Basis(found.chip.device, found.chip, found.rates, found.activations or 1.0, text, error), found.gpus


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
    held = memory(settings.model, T, layout, basis.activations)
    step = speed.step_seconds(settings.model, T, layout, basis.chip, basis.rates)
    fits = held.total <= basis.chip.memory_gib * GIB
    return Outcome(layout, held, fits, step, speed.tokens_per_second(T, layout, step))


def choose(outcomes: list[Outcome], chip: Chip, as_configured: Outcome | None = None) -> Outcome | None:
    """The fastest that leaves `ROOM`, or where none does, that fits; or `as_configured`, where that is within 1% of it.

    The model cannot tell so small a difference. So of those that are like the fastest but for the micro-batch, and within 1%,
    it is the one with the largest: a larger product is never slower.
    """
    fitting = [o for o in outcomes if o.fits]
    roomy = [o for o in fitting if has_room(o, chip)] or fitting
    fastest = max(roomy, key=lambda o: o.tokens_per_sec_per_gpu, default=None)
    if fastest is None:
        return None
    least = 0.99 * fastest.tokens_per_sec_per_gpu
    if as_configured is not None and has_room(as_configured, chip) and as_configured.tokens_per_sec_per_gpu >= least:
        return as_configured
    alike = [o for o in roomy if _same_but_batch(o.layout, fastest.layout) and o.tokens_per_sec_per_gpu >= least]
    return max(alike, key=lambda o: o.layout.micro_batch_size)


def has_room(found: Outcome, chip: Chip) -> bool:
    """Whether it fits, and `ROOM` is left."""
    return found.memory.total <= (1 - ROOM) * chip.memory_gib * GIB


def days(settings: config.Config, found: Outcome) -> float:
    """Days of training, without validation, saving and waiting."""
    return settings.train.max_steps * found.step.seconds / 86400


def disk(settings: config.Config) -> tuple[int, int]:
    """Checkpoints that are there at most, the one that is being written included, and their bytes."""
    kept = checkpoints_kept(settings.checkpoint, settings.train.max_steps, settings.optim.lr_decay_steps)
    return kept, kept * checkpoint_bytes(settings.model)


def epochs(settings: config.Config) -> dict[str, float] | str:
    """How often the run goes through each source; or why that is not known."""
    try:
        sources = data.open_sources(settings.data, settings.model.vocab_size)
    except FileNotFoundError as error:
        return f"not known before the data is prepared ({error})"
    mixture = data.make_mixture(sources, settings.data, settings.seed, settings.train.global_batch_size)
    drawn = mixture.drawn(settings.train.max_steps)
    return {source.name: n / length for source, n, length in zip(sources, drawn, mixture.lengths)}


def advice(settings: config.Config, basis: Basis, outcomes: list[Outcome], best: Outcome | None) -> str:
    """What to set, in one line; or what is missing."""
    T, gpus = settings.data.seq_len, outcomes[0].layout.world_size
    tokens = settings.train.max_steps * settings.train.global_batch_size * T
    if best is None:
        least = min(outcomes, key=lambda o: o.memory.total)
        return (
            f"does not fit: the least is {least.memory.total / GIB:.1f} GiB a GPU ({_words(least.layout)}), and a "
            f"{basis.name} has {basis.chip.memory_gib:.1f}; take more GPUs or another chip"
        )
    alike = [o for o in outcomes if has_room(o, basis.chip) and _same_but_batch(o.layout, best.layout)]
    largest = max((o.layout.micro_batch_size for o in alike), default=0)
    also = f" (up to {largest} fits)" if largest > best.layout.micro_batch_size else ""
    speed_found = _thousands(best.tokens_per_sec_per_gpu)
    return (
        f"{_fits(best, basis.chip)}: {_words(best.layout)}{also}; {gpus} {basis.name}: {speed_found} tokens/s/GPU "
        f"({basis.note}), {_days(days(settings, best))} for {short(tokens)} tokens"
    )


def keys_to_set(settings: config.Config, layout: Layout, chip: Chip) -> str:
    """What to add to the command for training to take `layout`; empty where it does by itself."""
    p, nodes, gpus_per_node = settings.parallel, layout.nodes, layout.gpus_per_node
    keys: dict[str, Any] = {"parallel.cpu_offload": "false"} if p.cpu_offload else {}
    if settings.train.micro_batch_size != layout.micro_batch_size:
        keys["train.micro_batch_size"] = layout.micro_batch_size
    asked: dict[str, Any] = {name: getattr(layout, name) for name in ("activation_checkpointing", "recompute")}
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


def _words(layout: Layout) -> str:
    every = layout.activation_checkpointing
    checkpointing = "" if not every else f", activation_checkpointing {every}"
    checkpointing += "" if layout.recompute == "none" else f", recompute {layout.recompute}"
    often = ", reduce micro_step" if layout.reduce == "micro_step" and layout.grad_accum_steps > 1 else ""
    return f"micro-batch {layout.micro_batch_size}, {layout.strategy}{often}{checkpointing}"


def _thousands(number: float) -> str:
    return f"{number:,.0f}" if number < 1000 else f"{number / 1000:,.1f}k"


def _days(number: float) -> str:
    return (
        f"{number:,.0f} days" if number >= 10 else f"{number:.1f} days" if number >= 0.1 else f"{24 * number:.1f} hours"
    )


def _fits(found: Outcome, chip: Chip) -> str:
    if not found.fits:
        return "does not fit"
    return "fits" if has_room(found, chip) else f"fits, with less than {100 * ROOM:.0f}% free"


def _print_plan(
    console: Console, settings: config.Config, basis: Basis, nodes: int, gpus_per_node: int, length: str
) -> None:
    """length: the key that sets how long the run is, where the configuration does not."""
    outcomes = [outcome(settings, layout, basis) for layout in layouts(settings, nodes, gpus_per_node)]
    columns: list[tuple[str, Outcome]] = []
    as_is = None
    try:
        as_is = outcome(settings, configured(settings, nodes, gpus_per_node, basis.chip), basis)
        columns.append(("as configured", as_is))
    except ValueError as error:
        console.print(f"as configured it cannot run: {error}", soft_wrap=True, highlight=False)
    best = choose(outcomes, basis.chip, as_is)
    if best is not None and best is not as_is:
        columns.append(("fastest that fits", best))
    tokens = settings.train.max_steps * settings.train.global_batch_size * settings.data.seq_len
    title = f"{count(settings.model).total:,} parameters, {settings.train.max_steps:,} steps, {tokens:,} tokens"
    network = f", {basis.chip.network_gbits:,.0f} Gbit/s a node {basis.network}" if nodes > 1 else ""
    console.print(f"{title}; {nodes} x {gpus_per_node} {basis.name}{network}", soft_wrap=True, highlight=False)
    console.print(plan_table(settings, basis, columns))
    kept, size = disk(settings)
    beyond = "" if best is None else published.not_covered(best.layout, basis.chip)
    lines = [
        f"checkpoints    {checkpoint_bytes(settings.model) / 1e9:,.1f} GB each, {kept} at most: {size / 1e12:,.2f} TB of disk",
        f"epochs         {_epochs_line(settings)}",
        f"error          {basis.error}" + (f"; {beyond}" if beyond else ""),
        advice(settings, basis, outcomes, best),
    ]
    keys = [length] if length else []
    keys += [keys_to_set(settings, best.layout, basis.chip)] if best is not None and best is not as_is else []
    if any(keys):
        lines.insert(-1, f"to set         {' '.join(keys)}")
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)


def _epochs_line(settings: config.Config) -> str:
    found = epochs(settings)
    return found if isinstance(found, str) else ", ".join(f"{name} {n:.2f}" for name, n in found.items())


def plan_table(settings: config.Config, basis: Basis, columns: list[tuple[str, Outcome]]) -> Table:
    """Memory by part, and speed, one column a layout."""
    table = Table()
    table.add_column("a GPU")
    for name, _ in columns:
        table.add_column(name, justify="right")
    found = [o for _, o in columns]
    table.add_row("setting", *(_words(o.layout) for o in found))
    table.add_row("micro-steps a step", *(str(o.layout.grad_accum_steps) for o in found))
    table.add_section()
    for part in fields(Memory):
        table.add_row(f"{part.name}, GiB", *(f"{getattr(o.memory, part.name) / GIB:.2f}" for o in found))
    table.add_row(
        "total, GiB" if math.isinf(basis.chip.memory_gib) else f"total, of {basis.chip.memory_gib:.1f} GiB",
        *(f"{_fits(o, basis.chip)}: {o.memory.total / GIB:.2f}" for o in found),
        style="bold",
    )
    table.add_section()
    for item in fields(Step):
        name = item.name.replace("_", "-")
        table.add_row(f"{name}, s a step", *(f"{getattr(o.step, item.name):.3f}" for o in found))
    table.add_row("tokens/s/GPU", *(f"{o.tokens_per_sec_per_gpu:,.0f}" for o in found), style="bold")
    table.add_row("training alone", *(_days(days(settings, o)) for o in found), style="bold")
    return table
