"""How a plan is worded: the table, what it rests on, and the advice in one line."""

from dataclasses import fields

from rich.console import Console
from rich.table import Table

from pretrain import config, data, published
from pretrain.choice import ROOM, Basis, Outcome, choose, configured, keys_to_set, layouts, outcome, same_but_batch
from pretrain.history import short
from pretrain.memory import GIB, Layout, Memory, checkpoint_bytes, checkpoints_kept
from pretrain.model import count
from pretrain.speed import Step


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
    alike = [o for o in outcomes if o.roomy and same_but_batch(o.layout, best.layout)]
    largest = max((o.layout.micro_batch_size for o in alike), default=0)
    also = f" (up to {largest} fits)" if largest > best.layout.micro_batch_size else ""
    speed_found = _thousands(best.tokens_per_sec_per_gpu)
    return (
        f"{_fits(best)}: {_words(best.layout)}{also}; {gpus} {basis.name}: {speed_found} tokens/s/GPU "
        f"({basis.note}), {_days(days(settings, best))} for {short(tokens)} tokens"
    )


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


def _fits(found: Outcome) -> str:
    if not found.fits:
        return "does not fit"
    return "fits" if found.roomy else f"fits, with less than {100 * ROOM:.0f}% free"


def show(console: Console, settings: config.Config, basis: Basis, nodes: int, gpus_per_node: int, length: str) -> None:
    """Print the plan. length: the key that sets how long the run is, where the configuration does not."""
    outcomes = [outcome(settings, layout, basis) for layout in layouts(settings, nodes, gpus_per_node)]
    columns: list[tuple[str, Outcome]] = []
    as_is = None
    try:
        as_is = outcome(settings, configured(settings, nodes, gpus_per_node, basis.chip), basis)
        columns.append(("as configured", as_is))
    except ValueError as error:
        console.print(f"as configured it cannot run: {error}", soft_wrap=True, highlight=False)
    best = choose(outcomes, as_is)
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
        "total, GiB" if basis.chip.memory is None else f"total, of {basis.chip.memory_gib:.1f} GiB",
        *(f"{_fits(o)}: {o.memory.total / GIB:.2f}" for o in found),
        style="bold",
    )
    table.add_section()
    for item in fields(Step):
        name = item.name.replace("_", "-")
        table.add_row(f"{name}, s a step", *(f"{getattr(o.step, item.name):.3f}" for o in found))
    table.add_row("tokens/s/GPU", *(f"{o.tokens_per_sec_per_gpu:,.0f}" for o in found), style="bold")
    table.add_row("training alone", *(_days(days(settings, o)) for o in found), style="bold")
    return table
