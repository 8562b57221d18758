"""Pictures of a run: loss, validation loss, learning rate, gradient norm, tokens/s.

    History ── draw ──> loss.png, validation.png, learning_rate.png, grad_norm.png, tokens_per_sec.png

Each has the optimizer step below and the tokens seen above; a dotted line where the run was resumed. What a run does not
have (no validation yet) is not drawn. `pretrain.overlay` draws several runs into one picture.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # a cluster has no display; before pyplot is imported

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from pretrain.history import History, short

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, which the colour-blind can tell apart too. The first is the training's."""

DPI = 160
"""Pixels an inch; a picture is 8 inches wide."""

_INK, _FAINT = "#22282f", "#6b747d"
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7ea",
    "grid.linewidth": 0.8,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "lines.markersize": 4.5,
    "agg.path.chunksize": 20000,
}


def draw(history: History, folder: Path, max_grad_norm: float | None) -> dict[str, Path]:
    """Draw all pictures that the run has figures for, as PNG in `folder`; return their files by title.

    max_grad_norm: where gradients were clipped (L2 norm), to be marked; None: not known.
    """
    pictures: dict[str, tuple[str, Callable[[Axes, History], None], bool]] = {
        "Training loss": ("loss", _loss, bool(history.steps)),
        "Validation loss": ("validation", _validation, bool(history.validation)),
        "Learning rate": ("learning_rate", _learning_rate, bool(history.train)),
        "Gradient norm": ("grad_norm", lambda ax, h: _grad_norm(ax, h, max_grad_norm), bool(history.steps)),
        "Throughput": ("tokens_per_sec", _tokens_per_sec, bool(history.train)),
    }
    files = {}
    for title, (name, fill, has_figures) in pictures.items():
        if not has_figures:
            continue
        files[title] = folder / f"{name}.png"
        with picture(files[title]) as ax:
            fill(ax, history)
            _frame(ax, history, title)
            names = len(ax.get_legend_handles_labels()[1])
            legend(ax, min(names, 3) if names != 4 else 2)  # filled downwards: a source above its entropy
    return files


@contextmanager
def picture(file: Path, height: float = 4.8) -> Iterator[Axes]:
    """Give axes to draw into; then write them as PNG, which does not name matplotlib's version. height: in inches."""
    with plt.rc_context(_STYLE):
        figure, ax = plt.subplots(figsize=(8, height), layout="constrained")
        yield ax
        figure.savefig(file, dpi=DPI, metadata={"Software": None})
        plt.close(figure)


def legend(ax: Axes, columns: int) -> None:
    """What the curves are, if they have names; below the axes, where it never lies on a curve."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        ax.figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=10)


def _loss(ax: Axes, history: History) -> None:
    steps, loss = history.series("loss")
    smooth, width = smoothed(loss)
    each = "step" if len(history.steps) > len(history.train) else "logged step"
    last = f"last {loss[-1]:.3f}"
    if width == 1:
        ax.plot(steps, loss, color=PALETTE[0], linewidth=1.8, marker=marker(steps), label=f"each {each}, {last}")
    else:
        ax.plot(steps, loss, color=PALETTE[0], alpha=0.35, linewidth=0.8, label=f"each {each}, {last}")
        ax.plot(steps, smooth, color=PALETTE[0], linewidth=1.8, label=f"mean of {width} {each}s")
        inset = enlargement(ax, np.nanmax(loss[steps > 0.35 * steps[-1]], initial=-np.inf))
        if inset is not None:
            half = len(steps) // 2
            inset.plot(steps[half:], loss[half:], color=PALETTE[0], alpha=0.35, linewidth=0.7)
            inset.plot(steps[half:], smooth[half:], color=PALETTE[0], linewidth=1.6)
    ax.set_ylabel("loss (nats a token)")


def enlargement(ax: Axes, highest: float) -> Axes | None:
    """Axes within the others, for the second half of what stands there; None where they would cover a part of it.

    The first steps' fall hides what the rest of a long run does. highest: what the curves reach in the last 65% of the steps.
    """
    low, high = ax.get_ylim()
    if not highest < low + 0.33 * (high - low):
        return None  # the loss did not fall that far, or rose again
    inset = ax.inset_axes((0.42, 0.4, 0.56, 0.55))
    white = {"facecolor": "white", "edgecolor": "none", "pad": 2}
    inset.set_title("second half", fontsize=9, fontweight="normal", pad=4, bbox=white)
    inset.tick_params(labelsize=8.5, length=2)
    inset.margins(x=0)
    step_axis(inset, bins=4)
    return inset


def _validation(ax: Axes, history: History) -> None:
    for number, (name, about) in enumerate(history.sources.items()):
        colour = PALETTE[number % len(PALETTE)]
        steps, losses = history.validation_series(name)
        if len(steps):
            label = f"{name}, last {losses[-1]:.3f}"
            ax.plot(steps, losses, color=colour, linewidth=1.8, marker=marker(steps), label=label)
        entropy = about.get("unigram_entropy")
        if entropy is not None:
            label = f"{name}, unigram entropy {entropy:.3f}"
            ax.axhline(entropy, color=colour, linestyle=(0, (5, 4)), linewidth=1.3, label=label)
    ax.set_ylabel("validation loss (nats a token)")


def _learning_rate(ax: Axes, history: History) -> None:
    steps, lr = history.series("lr")
    ax.plot(steps, lr, color=PALETTE[0], linewidth=1.8, marker=marker(steps))
    rate_axis(ax, float(np.nanmax(lr, initial=0.0)))


def rate_axis(ax: Axes, highest: float) -> None:
    """Learning rates on the left, from 0 on, all with the exponent of the highest."""
    ax.set_ylim(bottom=0)
    exponent = math.floor(math.log10(highest)) if highest > 0 else 0
    ax.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 10.0**exponent:g}e{exponent}" if value else "0")
    )
    ax.set_ylabel("learning rate (per step)")


def _grad_norm(ax: Axes, history: History, max_grad_norm: float | None) -> None:
    steps, norm = history.series("grad_norm")
    norm = usable(norm)
    ax.plot(steps, norm, color=PALETTE[0], linewidth=1, marker=marker(steps), label="before clipping")
    if max_grad_norm is not None:
        ax.axhline(
            max_grad_norm, color=_INK, linestyle=(0, (5, 4)), linewidth=1.2, label=f"clipped to {max_grad_norm:g}"
        )
    norm_axis(ax)


def usable(norm: np.ndarray) -> np.ndarray:
    """Gradient norms with NaN for infinity, which would leave nothing to see, and for 0, which has no logarithm."""
    return np.where(np.isfinite(norm) & (norm > 0), norm, np.nan)


def norm_axis(ax: Axes) -> None:
    """Gradient norms on the left, by their logarithm."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel("global gradient norm (L2)")


def _tokens_per_sec(ax: Axes, history: History) -> None:
    steps, speed = history.series("tokens_per_sec")
    ax.plot(steps, speed, color=PALETTE[0], linewidth=1, marker=marker(steps), label="all ranks together")
    typical = history.typical("tokens_per_sec")
    if typical is not None:
        label = f"median {typical:,.0f}"
        ax.axhline(typical, color=_INK, linestyle=(0, (5, 4)), linewidth=1.2, label=label)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_ylabel("tokens per second")


def smoothed(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Running mean over a fiftieth of the values, without the NaNs, and its width; the values themselves if that is < 2.

    Centred; at the left end it is narrower on both sides, so that the steep fall of the first steps stays where it is.
    """
    half = len(values) // 100
    if half < 1:
        return values, 1
    finite = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(finite)))
    middle = np.arange(len(values))
    low = np.maximum(middle - half, 0)
    high = np.minimum(middle + np.minimum(half, middle) + 1, len(values))
    with np.errstate(invalid="ignore"):  # a stretch without a finite value is a gap
        return (sums[high] - sums[low]) / (counts[high] - counts[low]), 2 * half + 1


def marker(steps: np.ndarray) -> str:
    """Points of which there are few are shown; a single one would be invisible as a line."""
    return "o" if len(steps) <= 30 else ""


def _frame(ax: Axes, history: History, title: str) -> None:
    """What all pictures share: title, steps below, tokens above, resumes."""
    ax.set_title(title, pad=12)
    ax.set_xlabel("optimizer step")
    ax.set_xlim(0, max(history.last_step, 1) * 1.02)
    step_axis(ax, bins=8)
    if resumes := history.resumes:
        label = f"resumed, {len(resumes)} times" if len(resumes) > 1 else "resumed"
        height = 1.0 if len(resumes) < 30 else 0.04  # hundreds would cover the curves
        across = ax.get_xaxis_transform()
        ax.vlines(resumes, 0, height, _FAINT, ":", linewidth=1.2, label=label, transform=across)
    if tokens := history.about.get("tokens_per_step"):
        token_axis(ax, tokens)


def token_axis(ax: Axes, tokens: int, title: str = "") -> None:
    """The tokens seen, above; tokens: of a step. title: for axes that do not begin at 0, which is named."""
    above = ax.secondary_xaxis(
        "top", functions=(lambda step: np.multiply(step, tokens), lambda seen: np.divide(seen, tokens))
    )
    above.spines["top"].set_visible(False)
    above.tick_params(length=0, labelsize=9, labelcolor=_FAINT)
    above.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    above.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value) if value else "tokens"))
    if title:
        above.set_xlabel(title, fontsize=9)


def step_axis(ax: Axes, bins: int) -> None:
    """Steps below, as whole numbers; bins: at most so many."""
    ax.xaxis.set_major_locator(MaxNLocator(nbins=bins, integer=True, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
