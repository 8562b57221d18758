"""One HTML page of a run, or of several side by side, which needs nothing but itself.

    History, pictures, config.yaml ── render ──> index.html: key figures, sources, pictures, processes, configuration
    Runs, pictures ── render_several ──> index.html: key figures, pictures, what differs in the configurations

Pictures lie in the page as base64; there is no script and no address of anything elsewhere, so that the page can be
mailed, archived, and opened on a machine without a network. Every string from the run is escaped.
"""

import base64
import html
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pretrain.history import History, Record, short
from pretrain.several import NOT_SET, Run, differences, origin

_CSS = """
:root { color-scheme: light; --ink: #22282f; --faint: #6b747d; --line: #e1e5e8; --blue: #0072b2; --paper: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 48px; }
h1 { margin: 0; font-size: 28px; letter-spacing: -0.01em; }
h2 { margin: 36px 0 12px; font-size: 18px; }
.status { margin: 4px 0 24px; color: var(--faint); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; }
.tile, figure, .box { background: #fff; border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: 12px 16px; }
.tile span { display: block; color: var(--faint); font-size: 13px; }
.tile b { display: block; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 16px; }
figure { margin: 0; padding: 12px; break-inside: avoid; }
figure img { display: block; width: 100%; height: auto; }
.box { padding: 4px 16px; overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px 8px 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
th { color: var(--faint); font-size: 13px; font-weight: 500; }
.number { text-align: right; }
.good { color: #00785a; font-weight: 600; }
.bad { color: #b84a00; font-weight: 600; }
pre { margin: 12px 0; font: 13px/1.5 ui-monospace, monospace; }
footer { margin-top: 36px; color: var(--faint); font-size: 13px; }
"""

_CSS_SEVERAL = """
h1 { overflow-wrap: anywhere; }
thead th { color: var(--ink); font-weight: 600; }
th, td { white-space: normal; vertical-align: top; overflow-wrap: break-word; min-width: 110px; padding-right: 24px; }
thead th + th { position: relative; padding-left: 18px; }
td + td { padding-left: 18px; }
th i { position: absolute; left: 0; top: 13px; width: 11px; height: 11px; border-radius: 3px; }
td:first-child { color: var(--faint); }
.key { font: 13px/1.7 ui-monospace, monospace; }
.note { margin: 0 0 12px; color: var(--faint); font-size: 13px; }
"""

Cell = tuple[str, str]
"""Text and CSS class of a table's cell."""


def key_figures(history: History) -> list[tuple[str, str]]:
    """Names and values of what one looks at first; only what the run has."""
    about = history.about
    figures: list[tuple[str, str]] = []
    if history.steps:
        figures.append(("training loss, last step", f"{history.series('loss')[1][-1]:.4f}"))
    if history.train:
        figures.append(("tokens seen", short(history.series("tokens")[1][-1])))
    speed, world_size = history.typical("tokens_per_sec"), about.get("world_size")
    if speed is not None:
        figures.append(("tokens/s, median", f"{speed:,.0f}"))
    each = history.typical("tokens_per_sec_per_gpu")
    if each is not None and world_size and world_size > 1:
        figures.append(("tokens/s a rank, median", f"{each:,.0f}"))
    for name, convention in (("m1", "all parameters"), ("m3", "products, causal")):
        mfu = history.typical(f"mfu_{name}_pct")
        if mfu is not None:
            figures.append((f"MFU {name}, {convention}", f"{mfu:.1f}%"))
    memory = [record["peak_mem_gib"] for record in history.train if record.get("peak_mem_gib") is not None]
    if memory:
        figures.append(("peak memory", f"{max(memory):.1f} GiB"))
    if history.saved is not None:
        figures.append(("last step that is saved", f"{history.saved:,}"))
    if about.get("init_from"):
        figures.append(("first weights from", str(about["init_from"])))
    if about.get("branched_from"):
        figures.append(("a branch of", str(about["branched_from"])))
    if "parameters" in about:
        figures.append(("parameters", f"{about['parameters']:,}"))
    if about.get("leave_out"):
        figures.append(("steps left out", str(about["leave_out"])))
    skipped = max((record.get("skipped_steps") or 0 for record in history.train), default=0)
    if skipped:
        figures.append(("steps that updated nothing", f"{skipped:,}"))
    return figures


def render(name: str, history: History, pictures: dict[str, Path], config_text: str | None) -> str:
    """The page as a string.

    name: of the run. pictures: PNG files by title. config_text: config.yaml as it stands, None where there is none.
    """
    tiles = "".join(f'<div class="tile"><span>{_(k)}</span><b>{_(v)}</b></div>' for k, v in key_figures(history))
    figures = "".join(
        f'<figure><img alt="{_(title)}" src="{_inline(file)}"></figure>' for title, file in pictures.items()
    )
    torn = f" {history.torn_lines} of its lines were torn by a kill and left out." if history.torn_lines else ""
    sections = [
        f'<h1>{_(name)}</h1><p class="status">{_(history.status[0].upper() + history.status[1:])}</p>',
        f'<div class="tiles">{tiles}</div>',
        f"<h2>Sources</h2>{_sources(history)}" if history.sources else "",
        f'<h2>Pictures</h2><div class="pictures">{figures}</div>' if figures else "",
        f"<h2>Processes</h2>{_processes(history.starts)}" if history.starts else "",
        f'<h2>Configuration</h2><div class="box"><pre>{_(config_text)}</pre></div>' if config_text else "",
        f"<footer>Drawn by <code>pretrain report</code> from the run's folder alone.{torn} Losses are in nats a token, "
        "over all ranks. The median of tokens/s leaves out the first line, which holds the warming up.</footer>",
    ]
    return _document(name, _CSS, sections)


def figures_of_several(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Names of the key figures, and the value of each in every run."""
    columns: list[dict[str, str]] = []
    for run in runs:
        past = run.history
        about = {"state": past.status, "last step": f"{past.last_step:,}"}
        if past.about.get("branched_from"):
            about["a branch of"] = str(origin(run, runs))
        figures = {**about, **dict(key_figures(past)), **about}
        for source in past.sources:
            steps, losses = past.validation_series(source)
            if len(steps):
                figures[f"validation loss, {source}"] = f"{losses[-1]:.4f}" + (
                    f" at step {steps[-1]:,.0f}" if steps[-1] < past.last_step else ""
                )
        if "device" in past.about:
            figures["ranks"] = f"{past.about.get('world_size', NOT_SET)} x {past.about['device']}"
        columns.append(figures)
    names = dict.fromkeys(name for figures in columns for name in figures)
    first = ["state", "a branch of", "last step", "tokens seen", "training loss, last step"]
    first += [
        *(name for name in names if name.startswith("validation loss, ")),
        "tokens/s, median",
        "last step that is saved",
    ]
    ordered = [name for name in first if name in names] + [name for name in names if name not in first]
    return [(name, [figures.get(name, NOT_SET) for figures in columns]) for name in ordered]


def render_several(runs: list[Run], pictures: dict[str, Path], colours: Sequence[str]) -> str:
    """The page of several runs as a string. pictures: PNG files by title. colours: of the runs in them (#rrggbb)."""
    title = " · ".join(run.name for run in runs)
    figures = "".join(
        f'<figure><img alt="{_(name)}" src="{_inline(file)}"></figure>' for name, file in pictures.items()
    )
    torn = sum(run.history.torn_lines for run in runs)
    sections = [
        f'<h1>{len(runs)} runs side by side</h1><p class="status">{_(title)}</p>',
        _beside([run.name for run in runs], colours, figures_of_several(runs)),
        f'<h2>Pictures</h2><div class="pictures">{figures}</div>' if figures else "",
        f"<h2>Where the configurations differ</h2>{_differences(runs, colours)}",
        "<footer>Drawn by <code>pretrain report</code> from the runs' folders alone."
        + (f" {torn} of their lines were torn by a kill and left out." if torn else "")
        + " Losses are in nats a token, over all ranks. The median of tokens/s leaves out the first line, which holds "
        "the warming up. A thick line is the running mean of the thin one behind it. A dotted line stands where a branch "
        "begins.</footer>",
    ]
    return _document(title, _CSS + _CSS_SEVERAL, sections)


def _differences(runs: list[Run], colours: Sequence[str]) -> str:
    without = [run.name for run in runs if run.settings is None]
    note = f'<p class="note">Without configuration (no config.yaml): {_(", ".join(without))}.</p>' if without else ""
    rows = differences(runs)
    if len(runs) - len(without) < 2:
        return note + '<p class="note">Fewer than two runs have a configuration; there is nothing to compare.</p>'
    if not rows:
        return note + '<p class="note">The other keys than those of the place (run_dir, resume) are the same.</p>'
    return note + _beside([run.label for run in runs], colours, rows, "key")


def _beside(names: list[str], colours: Sequence[str], rows: list[tuple[str, list[str]]], css: str = "") -> str:
    """A table with a column a run, headed by its name and colour."""
    heads = "".join(f'<th><i style="background: {colour}"></i>{_(name)}</th>' for name, colour in zip(names, colours))
    body = "".join(
        f'<tr><td class="{css}">{_(name)}</td>' + "".join(f"<td>{_(value)}</td>" for value in values) + "</tr>"
        for name, values in rows
    )
    return f'<div class="box"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _document(title: str, css: str, sections: list[str]) -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_(title)} · Cria</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{css}</style></head>'
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _sources(history: History) -> str:
    heads = [
        "Source",
        "Tokens prepared",
        "Share",
        "Validation loss before",
        "after",
        "Bits a byte",
        "Unigram entropy",
        "",
    ]
    rows: list[list[Cell]] = []
    for line in history.source_lines():
        below: Cell = ("", "")
        if line.below_entropy is not None:
            below = ("below it", "good") if line.below_entropy else ("not below it", "bad")
        losses = [line.loss_before, line.loss_after, line.bits_per_byte, line.unigram_entropy]
        rows.append(
            [
                (line.name, ""),
                ("—" if line.train_tokens is None else f"{line.train_tokens:,}", "number"),
                ("—" if line.share is None else f"{100 * line.share:.1f}%", "number"),
                *(("—" if loss is None else f"{loss:.4f}", "number") for loss in losses),
                below,
            ]
        )
    return _table(heads, rows)


def _processes(starts: list[Record]) -> str:
    heads = ["Started (UTC)", "From step", "Ranks", "Device", "Versions"]
    rows: list[list[Cell]] = []
    for number, start in enumerate(starts):
        versions = ", ".join(f"{name} {version}" for name, version in start.get("versions", {}).items())
        time = start.get("time")
        rows.append(
            [
                ("—" if time is None else datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S"), ""),
                (f"{start['step']:,}" + (" (resumed)" if number else ""), ""),
                (str(start.get("world_size", "—")), ""),
                (str(start.get("device", "—")), ""),
                (versions or "—", ""),
            ]
        )
    return _table(heads, rows)


def _table(heads: list[str], rows: list[list[Cell]]) -> str:
    classes = [css for _text, css in rows[0]]
    head = "".join(f'<th class="{css}">{_(text)}</th>' for text, css in zip(heads, classes))
    body = "".join("<tr>" + "".join(f'<td class="{css}">{_(text)}</td>' for text, css in row) + "</tr>" for row in rows)
    return f'<div class="box"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _inline(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode("ascii")


def _(text: str) -> str:
    return html.escape(text, quote=True)
