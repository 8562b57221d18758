"""How a plan is worded: the table, what it rests on, and the advice in one line."""

from dataclasses import fields

from rich.console import Console
from rich.table import Table

from pretrain import config, data, published
from pretrain.choice import ROOM, Basis, Outcome, keys_to_set, larger, look, nodes_needed
from pretrain.disk import checkpoint_bytes, checkpoints_kept
from pretrain.history import short
from pretrain.left_out import spans, trained_steps
from pretrain.memory import GIB, Layout, Memory
from pretrain.model import count
from pretrain.speed import Step


def seconds(settings: config.Config, found: Outcome) -> float:
    """Of training, without validation, saving and waiting."""
    return trained_steps(0, settings.train.max_steps, settings.train.leave_out) * found.step.seconds


def tokens(settings: config.Config) -> int:
    """What the run trains on, without the steps that it leaves out."""
    steps = trained_steps(0, settings.train.max_steps, settings.train.leave_out)
    return steps * settings.train.global_batch_size * settings.data.seq_len


def disk(settings: config.Config) -> tuple[int, int]:
    """Checkpoints that are there at most, the one that is being written included, and their bytes."""
    kept = checkpoints_kept(settings.checkpoint, settings.train.max_steps, settings.optim.lr_decay_steps)
    return kept, kept * checkpoint_bytes(settings.model)


def epochs(settings: config.Config) -> dict[str, float] | str:
    """How often the run goes through each source; or why that is not known.

    Raises:
        ValueError: the sources do not fit together, the model or the batch.
    """
    try:
        sources = data.open_sources(settings.data, settings.model.vocab_size)
    except FileNotFoundError as error:
        return f"not known before the data is prepared ({error})"
    mixture = data.make_mixture(sources, settings.data, settings.seed, settings.train.global_batch_size)
    taken = mixture.taken(spans(0, settings.train.max_steps, settings.train.leave_out))
    return {source.name: n / length for source, n, length in zip(sources, taken, mixture.lengths)}


def show(console: Console, settings: config.Config, basis: Basis, nodes: int, gpus_per_node: int, length: str) -> bool:
    """Print the plan; returns whether anything fits. length: the key that sets how long the run is, where it is not set."""
    found = look(settings, basis, nodes, gpus_per_node)
    best, as_is = found.best, found.as_configured
    columns = [] if as_is is None else [("as configured", as_is)]
    if found.refused:
        console.print(f"as configured it cannot run: {found.refused}", soft_wrap=True, highlight=False, markup=False)
    if best is not None and best is not as_is:
        columns.append(("fastest that fits" if basis.chip.memory else "fastest", best))
    title = (
        f"{count(settings.model).total:,} parameters, {settings.train.max_steps:,} steps, {tokens(settings):,} tokens"
    )
    network = f", {basis.chip.network_gbits:,.0f} Gbit/s a node {basis.network}" if nodes > 1 else ""
    console.print(f"{title}; {nodes} x {gpus_per_node} {basis.name}{network}", soft_wrap=True, highlight=False)
    if columns:
        console.print(plan_table(settings, basis, columns))
    beyond = not_covered(settings, basis, columns[-1][1].layout) if columns else {}
    kept, size = disk(settings)
    lines = [
        f"checkpoints    {_size(checkpoint_bytes(settings.model))} each, {kept} at most: {_size(size)} of disk",
        f"epochs         {_epochs_line(settings)}",
        f"error          {'; '.join([basis.explained, *beyond.values()])}",
    ]
    others = [] if best is None or basis.chip.memory is None else larger(found.outcomes, best)
    if others:
        lines.append(f"also fits      {'; '.join(map(_words_and_speed, others))}")
    keys = [length] if length else []
    keys += [keys_to_set(settings, best.layout, basis.chip)] if best is not None and best is not as_is else []
    if any(keys):
        lines.append(f"to set         {' '.join(keys)}")
    lines.append(advice(settings, basis, best, beyond) if best is not None else _least(settings, basis, found.outcomes))
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)
    return best is not None


def not_covered(settings: config.Config, basis: Basis, layout: Layout) -> dict[str, str]:
    """What the stated error says nothing of: each in a few words, and what is known of it."""
    if not basis.measured:
        return published.not_covered(settings.model, settings.data, layout, basis.chip)
    return {"communication": "communication is not measured"} if layout.world_size > 1 else {}


def advice(settings: config.Config, basis: Basis, best: Outcome, beyond: dict[str, str]) -> str:
    """What to set, in one line; beyond: what the stated error says nothing of."""
    but = f", but not for {'; '.join(beyond)}" if beyond else ""
    return (
        f"{_fits(best) if basis.chip.memory else 'memory aside'}: {_words(best.layout)}; {best.layout.world_size} "
        f"{basis.name}: {_thousands(best.tokens_per_sec_per_gpu)} tokens/s/GPU ({basis.error}{but}), "
        f"{_duration(seconds(settings, best))} for {short(tokens(settings))} tokens"
    )


def _least(settings: config.Config, basis: Basis, outcomes: list[Outcome]) -> str:
    """What is missing, in one line."""
    least = min(outcomes, key=lambda o: o.memory.total)
    nodes, gpus = least.layout.nodes, least.layout.gpus_per_node
    enough = nodes_needed(settings, basis, nodes, gpus)
    remedy = "take another chip" if enough is None else f"{enough} nodes of {gpus} would do, or another chip"
    return (
        f"does not fit: the least is {least.memory.total / GIB:.1f} GiB a GPU ({_words(least.layout)}), and "
        f"{basis.name} has {basis.chip.memory_gib:.1f}; {remedy}"
    )


def _words(layout: Layout) -> str:
    every = layout.activation_checkpointing
    checkpointing = "" if not every else f", activation_checkpointing {every}"
    checkpointing += "" if layout.recompute == "none" else f", recompute {layout.recompute}"
    often = ", reduce micro_step" if layout.reduce == "micro_step" and layout.grad_accum_steps > 1 else ""
    return f"micro-batch {layout.micro_batch_size}, {layout.strategy}{often}{checkpointing}"


def _words_and_speed(found: Outcome) -> str:
    return f"{_words(found.layout)}: {_thousands(found.tokens_per_sec_per_gpu)} tokens/s/GPU"


def _thousands(number: float) -> str:
    return f"{number:,.0f}" if number < 1000 else f"{number / 1000:,.1f}k"


def _size(number: float) -> str:
    """Bytes in the unit that fits."""
    if number >= 1e11:
        return f"{number / 1e12:,.2f} TB"
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _duration(number: float) -> str:
    """Seconds in the unit that fits."""
    for unit, size, least in (
        ("years", 365.25 * 86400, 10),
        ("days", 86400, 0.1),
        ("hours", 3600, 1),
        ("minutes", 60, 1),
    ):
        if number >= least * size:
            return f"{number / size:,.0f} {unit}" if number >= 10 * size else f"{number / size:.1f} {unit}"
    return f"{number:.1f} seconds"


def _fits(found: Outcome) -> str:
    if not found.fits:
        return "does not fit"
    return "fits" if found.roomy else f"fits, with less than {100 * ROOM:.0f}% free"


def _epochs_line(settings: config.Config) -> str:
    found = epochs(settings)
    return found if isinstance(found, str) else ", ".join(f"{name} {n:.2f}" for name, n in found.items())


def plan_table(settings: config.Config, basis: Basis, columns: list[tuple[str, Outcome]]) -> Table:
    """Memory by part, and speed, one column a layout."""
    table = Table()
    table.add_column("a GPU" if basis.chip.memory else "a device")
    for name, _ in columns:
        table.add_column(name, justify="right")
    found = [o for _, o in columns]
    table.add_row("setting", *(_words(o.layout) for o in found))
    table.add_row("micro-steps a step", *(str(o.layout.grad_accum_steps) for o in found))
    table.add_section()
    if basis.chip.memory is not None:
        for part in fields(Memory):
            table.add_row(f"{part.name}, GiB", *(f"{getattr(o.memory, part.name) / GIB:.2f}" for o in found))
        total = f"total, of {basis.chip.memory_gib:.1f} GiB"
        table.add_row(total, *(f"{_fits(o)}: {o.memory.total / GIB:.2f}" for o in found), style="bold")
        table.add_section()
    for item in fields(Step):
        name = item.name.replace("_", "-")
        table.add_row(f"{name}, s a step", *(f"{getattr(o.step, item.name):.3f}" for o in found))
    table.add_row("tokens/s/GPU", *(f"{o.tokens_per_sec_per_gpu:,.0f}" for o in found), style="bold")
    table.add_row("training alone", *(_duration(seconds(settings, o)) for o in found), style="bold")
    return table
