"""`pretrain plan`: what a run needs, before it starts, without a GPU.

Config, chip, nodes ─> every strategy x micro-batch x checkpointing ─> memory, seconds (memory.py, speed.py)
─> the fastest that fits (choice.py) ─> days, disk, epochs ─> the advice in one line (answer.py)
"""

import math
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from pretrain import answer, config, published, speed
from pretrain.chips import CHIPS
from pretrain.choice import ROOM, Basis
from pretrain.cli import Parser, fail


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
        answer.show(console, settings, basis, args.nodes, gpus, length)
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
