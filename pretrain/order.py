"""`pretrain order`: which sequences a step is made of, and from which documents; how often each source is seen.

The order is a pure function, so any step of any run can be looked at, without the run, in a second. Where the run has logged the
step, its fingerprint of what it read is compared with the order's: they differ where a change was allowed in between.
"""

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pretrain import config, data, history, left_out
from pretrain.cli import Parser, fail
from pretrain.mixture import Mixture


def main(argv: list[str]) -> None:
    """The command `pretrain order`."""
    parser = Parser(prog="pretrain order", description="What a configuration's run reads, step by step.")
    parser.add_argument("--config", type=Path, required=True, help="The run's configuration (path).")
    parser.add_argument(
        "--step", type=int | None, default=None, help="Show this step's sequences (steps, counted from 1)."
    )
    parser.add_argument("--summary", action="store_true", help="Show epochs and tokens of each source over the run.")
    args = parser.parse_args(argv)
    try:
        if (args.step is None) == (not args.summary):
            raise ValueError("say which: --step K, or --summary")
        settings = config.load(args.config, parser.prog)
        sources = data.open_sources(settings.data, settings.model.vocab_size)
        mixture = data.make_mixture(sources, settings.data, settings.seed, settings.train.global_batch_size)
        table = (
            summary(settings, sources, mixture) if args.summary else step_table(settings, sources, mixture, args.step)
        )
        console = Console()
        if not console.is_terminal:
            console.width = 200  # lines stay whole in a file
        console.print(table)
        if not args.summary and (compared := compare_with_log(settings, sources, mixture, args.step)):
            console.print(compared, soft_wrap=True)
    except (ValueError, OSError) as error:
        fail(parser.prog, error)


def step_table(settings: config.Config, sources: list[data.Source], mixture: Mixture, step: int) -> Table:
    """One row a document: slot in the step, source, epoch, sequence, and the document's file and line.

    Raises:
        ValueError: a step that the run does not have.
    """
    if not 1 <= step <= settings.train.max_steps:
        raise ValueError(f"--step {step}: the run has steps 1 to {settings.train.max_steps:,}")
    left = not left_out.trained_steps(step - 1, step, settings.train.leave_out)
    title = f"step {step:,} of {settings.run_dir}" + (", which train.leave_out leaves out" if left else "")
    table = Table(title=title, title_justify="left")
    for name in ("slot", "source", "epoch", "sequence"):
        table.add_column(name, justify="left" if name == "source" else "right")
    table.add_column("file", overflow="fold")
    for name in ("line", "tokens"):
        table.add_column(name, justify="right")
    T = settings.data.seq_len
    step_slots = list(zip(*(column.tolist() for column in mixture.sequences(step))))
    # Shard by shard: where nobody has listed a shard's documents it is read whole.
    held = {(s, n): sources[s].train.documents(n * T, T + 1) for s, n in sorted({(s, n) for s, _, n in step_slots})}
    for slot, (s, epoch, sequence) in enumerate(step_slots):
        place = (str(slot), sources[s].name, str(epoch), str(sequence))
        for part in held[s, sequence]:
            line = f"{part.line:,}" if part.line is not None else f"document {part.document + 1:,}"
            table.add_row(*place, part.source_file, line, f"{part.tokens:,}")
            place = ("", "", "", "")
    return table


def compare_with_log(settings: config.Config, sources: list[data.Source], mixture: Mixture, step: int) -> str | None:
    """Says that the run has read just this in `step`, by the fingerprint in its metrics.jsonl; None where it has none.

    Raises:
        ValueError: it has read other sequences.
    """
    run_dir = Path(settings.run_dir)
    try:
        trained = history.read(run_dir).train
    except (FileNotFoundError, ValueError):  # not begun
        return None
    logged = next((record.get("data_hash") for record in trained if record["step"] == step), None)
    if logged is None:
        return None
    whole_step = data.MicroBatches(sources, mixture, settings.data.seq_len, settings.train.global_batch_size, 0, 1)
    found = data.data_hash_in_words(whole_step[step - 1][1])
    if found != logged:
        raise ValueError(
            f"{run_dir} has read other sequences in step {step}: it logged data_hash {logged}, and these have {found}. Its "
            f"mixture, seed, batch or shards were others: take the configuration of that time, {run_dir}/before-config.yaml.N"
        )
    return f"{run_dir} has read these sequences: data_hash {logged}"


def summary(settings: config.Config, sources: list[data.Source], mixture: Mixture) -> Table:
    """One row a source, and a stage of the mixture: share, tokens that the run takes, epochs that this means."""
    steps, T, without = settings.train.max_steps, settings.data.seq_len, settings.train.leave_out
    trained = left_out.trained_steps(0, steps, without)
    title = f"{trained:,} steps, {trained * settings.train.global_batch_size * T:,} tokens"
    title += f" (train.leave_out: without steps {left_out.in_words(without)})" if trained < steps else ""
    table = Table(title=title, title_justify="left")
    for name in ("from step", "source", "share", "tokens taken", "tokens there", "epochs"):
        table.add_column(name, justify="left" if name == "source" else "right")
    ends = [*(min(stage.first_step - 1, steps) for stage in mixture.stages[1:]), steps]
    total: Counter[str] = Counter()
    for stage, end in zip(mixture.stages, ends):
        in_stage = mixture.taken(left_out.spans(min(stage.first_step - 1, steps), end, without))
        for s, (source, taken) in enumerate(zip(sources, in_stage)):
            total[source.name] += taken
            epochs = f"{taken / mixture.lengths[s]:.3f}"
            row = (f"{taken * T:,}", f"{source.train.num_tokens:,}", epochs)
            table.add_row(f"{stage.first_step:,}", source.name, f"{100 * float(stage.shares[s]):.2f}%", *row)
    if len(mixture.stages) > 1:
        table.add_section()
        for source, length in zip(sources, mixture.lengths):
            taken = total[source.name]
            row = (f"{taken * T:,}", f"{source.train.num_tokens:,}", f"{taken / length:.3f}")
            table.add_row("all", source.name, "", *row)
    return table
