"""What is in some datasets: a table, a picture, and how often a mixture reads each. The command `data-prep stats`.

manifests ------------> tokens by source and subset --.
documents/*.npy ------> lengths of the documents -----+--> table, stats.png
weights and tokens ---> epochs of each ---------------'
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import ceil, floor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from data_prep.documents import listed
from data_prep.shard import Manifest

_BINS = np.unique(np.logspace(0, 8, 81).astype(np.int64))  # document lengths in tokens, ten bins a decade
_PERCENTILES = (1, 50, 99)
_SHORT = 1 << 20
"""Documents of fewer tokens are counted in an array, the few longer ones by their length."""


@dataclass(frozen=True, kw_only=True)
class StatsOptions:
    """Show tokens by source and subset, document lengths, and the epochs that a mixture means."""

    directory: list[str] = field(metadata={"positional": True, "nargs": "+", "help": "Folders of datasets"})
    weight: list[float] = field(
        default_factory=list,
        metadata={
            "nargs": "+",
            "type": float,
            "help": "Share of each dataset in the mixture, in the order of the folders",
        },
    )
    train_tokens: float = 0.0
    """Tokens of the training run, such as 3e12, for which to give the epochs."""
    picture: str | None = None
    """File for the picture, such as stats.png."""


@dataclass(frozen=True)
class Lengths:
    """How long the documents of a dataset are, in tokens with BOS and EOS."""

    histogram: np.ndarray
    """(bins,) documents by length, over _BINS."""
    percentiles: dict[int, float]
    longest: int


def run(options: StatsOptions) -> None:
    """Print the tables and draw the picture. Raises ValueError for weights that don't fit the folders, or their tokens."""
    if options.weight and len(options.weight) != len(options.directory):
        raise ValueError(f"{len(options.weight)} weights for {len(options.directory)} datasets: give one for each")
    if any(weight < 0 for weight in options.weight) or (options.weight and not sum(options.weight)):
        raise ValueError(f"weights {options.weight} must not be negative, nor all 0")
    if bool(options.weight) != bool(options.train_tokens):
        given, other = ("--weight", "--train_tokens") if options.weight else ("--train_tokens", "--weight")
        raise ValueError(
            f"{given} without {other} gives no epochs: give both, such as --weight 7 3 --train_tokens 3e12"
        )
    if options.train_tokens < 0:
        raise ValueError(f"train_tokens {options.train_tokens:g} must not be below 0")
    twice = [folder for folder in options.directory if options.directory.count(folder) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice")
    manifests = {folder: Manifest.load(folder) for folder in options.directory}
    empty = [folder for folder, manifest in manifests.items() if not manifest.tokens]
    if options.weight and empty:
        raise ValueError(f"{empty[0]} has no tokens: a mixture takes none from it, leave it out")
    lengths = {folder: document_lengths(Path(folder), manifest) for folder, manifest in manifests.items()}
    console = Console()
    console.print(_subsets(manifests))
    console.print(_documents(manifests, lengths))
    if options.weight:
        console.print(_mixture(manifests, options.weight, options.train_tokens))
    if options.picture:
        draw(manifests, lengths, Path(options.picture))
        console.print(f"picture: {options.picture}")


def document_lengths(root: Path, manifest: Manifest) -> Lengths | None:
    """The lengths of all documents, None where nobody wrote them down (imported data).

    They are counted file by file. Memory: that of the largest file's list, and 8 MB.
    """
    counts, long = np.zeros(_SHORT, np.int64), Counter[int]()
    for shard in manifest.shards:
        found = listed(root, shard)
        if found is None:
            return None
        lengths, documents = np.unique(found[1], return_counts=True)
        short = int(np.searchsorted(lengths, _SHORT))
        counts[lengths[:short]] += documents[:short]
        long.update(dict(zip(lengths[short:].tolist(), documents[short:].tolist(), strict=True)))
    values = np.append(np.flatnonzero(counts), np.array(sorted(long), np.int64))
    documents = np.append(counts[counts > 0], np.array([long[length] for length in sorted(long)], np.int64))
    if not len(values):
        return None
    percentiles = {p: _percentile(values, documents, p) for p in _PERCENTILES}
    return Lengths(np.histogram(values, _BINS, weights=documents)[0], percentiles, int(values[-1]))


def _percentile(values: np.ndarray, counts: np.ndarray, p: float) -> float:
    """What np.percentile gives for `values` (n,), ascending, each of them `counts` (n,) times: linear between neighbours."""
    ends = np.cumsum(counts)
    place = p / 100 * (int(ends[-1]) - 1)
    low, high = (int(values[np.searchsorted(ends, n, side="right")]) for n in (floor(place), ceil(place)))
    return low + (high - low) * (place - floor(place))


def _subsets(manifests: dict[str, Manifest]) -> Table:
    table = Table(title="tokens", title_justify="left")
    for column in ("dataset", "subset", "documents", "dropped", "tokens", "share"):
        table.add_column(column, justify="left" if column in ("dataset", "subset") else "right")
    for folder, manifest in manifests.items():
        for name, subset in sorted(manifest.subsets.items(), key=lambda item: -item[1].tokens):
            share = f"{subset.tokens / max(1, manifest.tokens):.2%}"
            table.add_row(
                folder, name, f"{subset.documents:,}", f"{sum(subset.dropped.values()):,}", f"{subset.tokens:,}", share
            )
        dropped = sum(manifest.dropped.values())
        table.add_row(folder, "all", f"{manifest.documents:,}", f"{dropped:,}", f"{manifest.tokens:,}", "")
        table.add_section()
    return table


def _documents(manifests: dict[str, Manifest], lengths: dict[str, Lengths | None]) -> Table:
    table = Table(title="tokens a document", title_justify="left")
    for column in ("dataset", "mean", *(f"{p}% are shorter than" for p in _PERCENTILES), "longest"):
        table.add_column(column, justify="left" if column == "dataset" else "right")
    for folder, manifest in manifests.items():
        found = lengths[folder]
        mean = f"{manifest.tokens / max(1, manifest.documents):,.0f}"
        if found is None:
            table.add_row(folder, mean, *["not known"] * (len(_PERCENTILES) + 1))
        else:
            percentiles = (f"{found.percentiles[p]:,.0f}" for p in _PERCENTILES)
            table.add_row(folder, mean, *percentiles, f"{found.longest:,}")
    return table


def epochs(tokens: list[int], weights: list[float], train_tokens: float) -> list[float]:
    """How often each dataset is read when `train_tokens` are taken from them in the proportion of `weights`."""
    return [train_tokens * weight / sum(weights) / count for count, weight in zip(tokens, weights, strict=True)]


def _mixture(manifests: dict[str, Manifest], weights: list[float], train_tokens: float) -> Table:
    table = Table(title=f"a mixture of {train_tokens:,.0f} tokens", title_justify="left")
    for column in ("dataset", "share", "tokens taken", "tokens there", "epochs"):
        table.add_column(column, justify="left" if column == "dataset" else "right")
    there = [manifest.tokens for manifest in manifests.values()]
    for folder, weight, count, often in zip(
        manifests, weights, there, epochs(there, weights, train_tokens), strict=True
    ):
        share = weight / sum(weights)
        table.add_row(folder, f"{share:.2%}", f"{train_tokens * share:,.0f}", f"{count:,}", f"{often:.2f}")
    return table


def draw(manifests: dict[str, Manifest], lengths: dict[str, Lengths | None], path: Path) -> None:
    """Write the picture: tokens by subset as bars, document lengths as curves."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    labels, values, colours = [], [], []
    for n, (folder, manifest) in enumerate(manifests.items()):
        subsets = sorted(manifest.subsets.items(), key=lambda item: -item[1].tokens)
        for name, tokens in [(name, subset.tokens) for name, subset in subsets[:20]] or [("all", manifest.tokens)]:
            labels.append(f"{name}  ({Path(folder).parent.name}/{Path(folder).name})")
            values.append(tokens)
            colours.append(f"C{n}")
        found = lengths[folder]
        if found is not None:
            share = found.histogram / found.histogram.sum()
            curves.stairs(share, _BINS, color=f"C{n}", label=folder)
    bars.barh(labels[::-1], values[::-1], color=colours[::-1])
    bars.set_xlabel("tokens")
    bars.set_title("tokens by source and subset")
    curves.set_xscale("log")
    curves.set_xlabel("tokens a document")
    curves.set_ylabel("share of the documents")
    curves.set_title("document lengths")
    if curves.get_legend_handles_labels()[0]:
        curves.legend()
    figure.savefig(path, dpi=120)
