"""pretrain report: pictures and a page of a run, from its folder alone.

    RUN_DIR/metrics.jsonl ── history.read ──> History ─┬─ pictures.draw ──> RUN_DIR/report/*.png
    RUN_DIR/config.yaml ───────────────────────────────┼─ page.render ────> RUN_DIR/report/index.html
                                                       └─ show ───────────> a short table on the terminal

Works on a run that is still going, and on one with a single line.
"""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pretrain import history, page
from pretrain.cli import Parser, fail
from pretrain.folder import staged
from pretrain.history import History
from pretrain.reading import yaml_mapping


def main(argv: list[str]) -> None:
    """The command `pretrain report`."""
    parser = Parser(prog="pretrain report", description="Draw pictures and a page of a run.")
    parser.add_argument("run_dir", type=Path, help="Folder of the run (path).")
    parser.add_argument("--out", type=Path | None, default=None, help="Folder to write; none: RUN_DIR/report (path).")
    args = parser.parse_args(argv)
    out = args.out or args.run_dir / "report"
    try:
        show(report(args.run_dir, out), out, Console(highlight=False))
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
    for heading in ("tokens\nprepared", "share", "validation loss\nbefore → after", "unigram\nentropy"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for line in past.source_lines():
        below = {None: "", True: "[green]below it[/]", False: "[red]not below it[/]"}[line.below_entropy]
        table.add_row(
            escape(line.name),
            "—" if line.train_tokens is None else f"{line.train_tokens:,}",
            "—" if line.share is None else f"{100 * line.share:.1f}%",
            f"{_loss(line.loss_before)} → {_loss(line.loss_after)}",
            _loss(line.unigram_entropy),
            below,
        )
    if past.sources:
        console.print(table)
    facts = [("run", past.status), *page.key_figures(past)]
    if past.torn_lines:
        facts.append(("torn lines left out", str(past.torn_lines)))
    facts += [("pictures", f"{out}/*.png"), ("page", f"{out}/index.html")]
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        console.print(f"{name:<{width}}  {value}", markup=False, soft_wrap=True)


def _loss(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}"
