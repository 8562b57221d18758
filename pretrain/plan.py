"""`pretrain plan`: what a run needs, before it starts, without a GPU.

Config, chip, nodes ─> every strategy x micro-batch x checkpointing ─> memory, seconds (memory.py, speed.py)
─> the fastest that fits (choice.py) ─> days, disk, epochs ─> the advice in one line (answer.py)
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from pretrain import answer, config, published, speed
from pretrain.chips import CHIPS
from pretrain.choice import ROOM, Basis
from pretrain.cli import OptionsParser, fail

PROG = "pretrain plan"

MOST_TOKENS = 1e15
"""More is a typing error: ten times beyond what anybody has trained on."""


def main(argv: list[str]) -> int:
    """The command `pretrain plan`; 1: nothing fits."""
    args, keys = _parser().parse_known_args(argv)
    console = Console()
    if not console.is_terminal:
        console.width = 120  # lines stay whole in a file
    try:
        if args.published:
            if len(argv) > 1:
                raise ValueError("--published shows the model of time and would heed nothing else: leave the rest out")
            console.print(published.tables())
            return 0
        if args.config is None:
            raise ValueError("say what to plan: --config FILE; or --published")
        as_written = config.parse(["--config", str(args.config), *keys], PROG)
        settings = _for_tokens(as_written, args.tokens)
        basis, gpus = _probed(settings, args.chip) if args.probe else (_known(args.chip, settings.parallel.compile), 8)
        gpus = gpus if args.gpus_per_node is None else args.gpus_per_node
        basis = _with_network(basis, gpus, args.network_gbits)
        length = "" if settings == as_written else f"--train.max_steps {settings.train.max_steps}"
        return int(not answer.show(console, settings, basis, args.nodes, gpus, length))
    except (ValueError, OSError) as error:
        fail(PROG, error)


def _parser() -> argparse.ArgumentParser:
    parser = OptionsParser(
        prog=PROG,
        description="What a run needs, before it starts; no GPU is needed.",
        epilog="Any key of the configuration can be set as well: pretrain train --help names them.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", type=Path, help="The run's configuration (path).")
    add("--chip", help=f"One of {', '.join(CHIPS)}.")
    add("--nodes", type=int, default=1, help="Machines.")
    add("--gpus_per_node", type=int, help="GPUs in each; 8, or with --probe all.")
    add("--tokens", help="Plan for so many, not train.max_steps: 300B, 3T, 1e9.")
    add("--network_gbits", type=float, help="Of a node to the others, all its cards (Gbit/s).")
    add("--probe", action="store_true", help="Measure a few steps on this machine first.")
    add("--published", action="store_true", help="Show the model of time against published runs.")
    return parser


def _for_tokens(settings: config.Config, text: str | None) -> config.Config:
    """With as many steps as so many tokens take; None: with its own."""
    a_step, most = settings.train.global_batch_size * settings.data.seq_len, f"{MOST_TOKENS / 1e12:,.0f}T"
    if text is None:
        if settings.train.max_steps * a_step > MOST_TOKENS:
            raise ValueError(
                f"train.max_steps {settings.train.max_steps:,} of {a_step:,} tokens: more than {most} in all"
            )
        return settings
    unit = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper())
    try:
        tokens = float(text if unit is None else text[:-1]) * (unit or 1)
    except ValueError:
        tokens = math.nan
    if not a_step <= tokens <= MOST_TOKENS:
        raise ValueError(
            f"--tokens {text or 'empty'}: it must be a number such as 300B, 3T or 1e9, at least one step's {a_step:,} and at "
            f"most {most}"
        )
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
    known = {chip.lower(): chip for chip in CHIPS}
    if name.lower() not in known:
        raise ValueError(f"--chip {name}: there are {', '.join(CHIPS)}; another one is measured by --probe")
    name = known[name.lower()]
    chip = CHIPS[name]
    error = f"±{100 * published.stated_error(chip, compiled):.0f}%"
    rates, runs = speed.rates_of(chip), published.counted(chip)
    explained = (
        f"{error}: nine of ten of {len(runs)} published runs on {rates.fitted_on}, each left out of the fit, lie within "
        f"{100 * rates.fit_error:.1f}% (pretrain plan --published)"
    )
    if compiled:
        explained += f"; {100 * speed.COMPILED_ERROR:.0f}% is what the gain of torch.compile is uncertain by"
    explained += (
        f"; memory lies within the {100 * ROOM:.0f}% that are left free of what an allocator took (benchmarks/notes.md)"
    )
    return Basis(name, chip, rates, 1.0, explained, error)


def _probed(settings: config.Config, name: str | None) -> tuple[Basis, int]:
    """By measurement on this machine; and its GPUs."""
    if name is not None:
        raise ValueError(f"--probe measures this machine's chip; leave --chip {name} out, or --probe")
    from pretrain.probe import FITTED, HELD_OUT, probe  # lightning takes seconds: a plan without it should not

    found = probe(settings)
    error = f"±{max(1, math.ceil(100 * found.time_error))}%"
    explained = (
        f"{error}: measured on this machine at {FITTED[0]} and {FITTED[1]} layers, and the largest of its errors: "
        f"{100 * found.held_out_error:.1f}% at {HELD_OUT} layers between them, {100 * found.drift:.1f}% at {FITTED[0]} layers "
        f"measured again at the end, {100 * found.spread:.1f}% from step to step; "
    )
    explained += (
        "memory is not measured on a CPU" if found.memory_error is None else f"memory ±{100 * found.memory_error:.0f}%"
    )
    if settings.data.intra_document:
        explained += f"; documents are as long as random ids make them, about {settings.model.vocab_size:,} tokens"
    basis = Basis(
        found.chip.device, found.chip, found.rates, found.activations_factor or 1.0, explained, error, measured=True
    )
    return basis, found.gpus
