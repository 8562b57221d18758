"""One HTML page of a run, which needs nothing but itself.

    History, pictures, config.yaml ── render ──> index.html: key figures, sources, pictures, processes, configuration

Pictures lie in the page as base64; there is no script and no address of anything elsewhere, so that the page can be
mailed, archived, and opened on a machine without a network. Every string from the run is escaped.
"""

import base64
import html
from datetime import UTC, datetime
from pathlib import Path

from pretrain.history import History, Record, short

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

Cell = tuple[str, str]
"""Text and CSS class of a table's cell."""


def key_figures(history: History) -> list[tuple[str, str]]:
    """Names and values of what one looks at first; only what the run has."""
    about = history.about
    figures: list[tuple[str, str]] = []
    if history.train:
        figures.append(("training loss, last step", f"{history.series('loss')[1][-1]:.4f}"))
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
    skipped = max((record.get("skipped_steps") or 0 for record in history.train), default=0)
    if skipped:
        figures.append(("steps skipped, gradient not finite or 0", f"{skipped:,}"))
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
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_(name)} · Cria</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style></head>'
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _sources(history: History) -> str:
    heads = ["Source", "Tokens prepared", "Share", "Validation loss before", "after", "Unigram entropy", ""]
    rows: list[list[Cell]] = []
    for line in history.source_lines():
        below: Cell = ("", "")
        if line.below_entropy is not None:
            below = ("below it", "good") if line.below_entropy else ("not below it", "bad")
        losses = [line.loss_before, line.loss_after, line.unigram_entropy]
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
