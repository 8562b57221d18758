"""pretrain report: pictures and a page of a run, from its folder alone, or of several runs side by side.

    RUN_DIR/metrics.jsonl ── history.read ──> History ─┬─ pictures.draw ──> RUN_DIR/report/*.png
    RUN_DIR/config.yaml ───────────────────────────────┼─ page.render ────> RUN_DIR/report/index.html
                                                       └─ show ───────────> a short table on the terminal

    RUN_DIRs ── several.read ──> Runs ─┬─ overlay.draw ────────> DIR/*.png
                                       ├─ page.render_several ─> DIR/index.html
                                       └─ show_several ────────> their key figures on the terminal

Works on a run that is still going, and on one with a single line.
"""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pretrain import history, page, several
from pretrain.cli import Parser, fail
from pretrain.folder import staged
from pretrain.history import History
from pretrain.reading import yaml_mapping
from pretrain.several import Run


def main(argv: list[str]) -> None:
    """The command `pretrain report`."""
    parser = Parser(prog="pretrain report", description="Draw pictures and a page of a run, or of several.")
    parser.add_argument("run_dir", type=Path, nargs="+", help="Folder of the run, or folders of several (paths).")
    help_out = "Folder to write; none: RUN_DIR/report, for one run (path)."
    parser.add_argument("--out", type=Path | None, default=None, help=help_out)
    args = parser.parse_args(argv)
    console = Console(highlight=False)
    try:
        if len(args.run_dir) > 1:
            show_several(report_several(args.run_dir, args.out), args.out, console)
        else:
            (run_dir,) = args.run_dir
            out = args.out or run_dir / "report"
            show(report(run_dir, out), out, console)
    except (ValueError, OSError) as error:
        fail(parser.prog, error)


def report(run_dir: Path, out: Path) -> History:
    """Write pictures and page into `out`, replacing an earlier report there.

    Raises:
        FileNotFoundError: no metrics.jsonl in `run_dir`.
        ValueError: nothing in it yet, a config.yaml that is not YAML, or an `out` that holds something else.
    """
    past = history.read(run_dir)
    config_file = run_dir / "config.yaml"
    config_text, max_grad_norm = _read_config(config_file) if config_file.is_file() else (None, None)
    from pretrain import pictures  # matplotlib takes a second, which a mistyped folder need not wait for

    with staged(out, {"run": run_dir.resolve().name}) as folder:
        drawn = pictures.draw(past, folder, max_grad_norm)
        text = page.render(run_dir.resolve().name, past, drawn, config_text)
        (folder / "index.html").write_text(text, encoding="utf-8")
    return past


def report_several(run_dirs: list[Path], out: Path | None) -> list[Run]:
    """Write pictures and page of several runs into `out`, replacing an earlier report there.

    Raises:
        FileNotFoundError: a run's folder or its metrics.jsonl is not there.
        ValueError: no `out`, or one that holds something else; what `several.read` refuses; more runs than colours.
    """
    if out is None:
        raise ValueError(f"the page of {len(run_dirs)} runs lies in none of their folders; say where: --out DIR")
    runs = several.read(run_dirs)
    from pretrain import overlay, pictures

    if len(runs) > len(pictures.PALETTE):
        raise ValueError(
            f"{len(runs)} runs are more than the {len(pictures.PALETTE)} colours there are; leave some out"
        )
    with staged(out, {"runs": [run.name for run in runs]}) as folder:
        drawn = overlay.draw({run.name: run.history for run in runs}, folder)
        text = page.render_several(runs, drawn, pictures.PALETTE)
        (folder / "index.html").write_text(text, encoding="utf-8")
    return runs


def _read_config(file: Path) -> tuple[str, float | None]:
    """Its text, and its optim.max_grad_norm if there is one. Raises ValueError."""
    try:
        text = file.read_text(encoding="utf-8")
        limit = yaml_mapping(text).get("optim", {}).get("max_grad_norm")
        return text, None if limit is None else float(limit)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {error}; mend it or move it away, a report can do without") from error


def show(past: History, out: Path, console: Console) -> None:
    """Print what was prepared and learnt, how fast, and where the page lies."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("source")
    for heading in ("tokens\nprepared", "share", "validation loss\nbefore → after", "bits\na byte", "unigram\nentropy"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for line in past.source_lines():
        below = {None: "", True: "[green]below it[/]", False: "[red]not below it[/]"}[line.below_entropy]
        table.add_row(
            escape(line.name),
            "—" if line.train_tokens is None else f"{line.train_tokens:,}",
            "—" if line.share is None else f"{100 * line.share:.1f}%",
            f"{_loss(line.loss_before)} → {_loss(line.loss_after)}",
            _loss(line.bits_per_byte),
            _loss(line.unigram_entropy),
            below,
        )
    if past.sources:
        console.print(table)
    facts = [("run", past.status), *page.key_figures(past)]
    if past.torn_lines:
        facts.append(("torn lines left out", str(past.torn_lines)))
    _show_facts([*facts, ("pictures", f"{out}/*.png"), ("page", f"{out}/index.html")], console)


def show_several(runs: list[Run], out: Path, console: Console) -> None:
    """Print the runs' key figures and states, in which keys they differ, and where the page lies."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    shown = ("last step", "training loss", "validation loss", "tokens/s, median", "last step that is saved")
    figures = [(name, values) for name, values in page.figures_of_several(runs) if name.startswith(shown)]
    for name, _ in figures:
        table.add_column(escape(name), justify="right")
    for run, *values in zip(runs, *(values for _, values in figures)):
        table.add_row(escape(run.name), *map(escape, values))
    console.print(table)
    facts = [(run.name, run.history.status) for run in runs]
    facts += [("keys that differ", ", ".join(key for key, _ in several.differences(runs)) or "none")]
    facts += [("without configuration", run.name) for run in runs if run.settings is None]
    _show_facts([*facts, ("pictures", f"{out}/*.png"), ("page", f"{out}/index.html")], console)


def _show_facts(facts: list[tuple[str, str]], console: Console) -> None:
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        console.print(f"{name:<{width}}  {value}", markup=False, soft_wrap=True)


def _loss(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}"
