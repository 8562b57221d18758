"""Pictures of several runs, one colour a run, the same in each picture.

    Histories by name ── draw ──> loss.png, validation_1.png (one a source), learning_rate.png, grad_norm.png

A branch begins at the step of the checkpoint that it goes on from, where a dotted line stands.
"""

import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from pretrain import pictures
from pretrain.history import History
from pretrain.pictures import (
    PALETTE,
    enlargement,
    legend,
    marker,
    norm_axis,
    rate_axis,
    smoothed,
    step_axis,
    token_axis,
)

Histories = dict[str, History]
"""By the run's name; at most as many as PALETTE has colours."""


def draw(runs: Histories, folder: Path) -> dict[str, Path]:
    """Draw all pictures that a run has figures for, as PNG in `folder`; return their files by title."""
    files: dict[str, Path] = {}

    def add(title: str, name: str, fill: Callable[[Axes, Histories], None]) -> None:
        files[title] = folder / f"{name}.png"
        height = 4.6 + 0.2 * len(runs)  # a legend of many names takes its own room
        with pictures.picture(files[title], height) as ax:
            fill(ax, runs)
            _frame(ax, runs, title)

    if any(past.train for past in runs.values()):
        add("Training loss", "loss", _loss)
    sources = dict.fromkeys(name for past in runs.values() for record in past.validation for name in record["losses"])
    for number, source in enumerate(sources, start=1):
        add(f"Validation loss, {_plain(source)}", f"validation_{number}", partial(_validation, source=source))
    if any(past.train for past in runs.values()):
        add("Learning rate", "learning_rate", _learning_rate)
        add("Gradient norm", "grad_norm", _grad_norm)
    return files


class _Curve:
    """A figure of a run: what was logged, and its running mean."""

    def __init__(self, steps: np.ndarray, values: np.ndarray, colour: str, label: str):
        self.steps, self.values, self.colour = steps, values, colour
        self.smooth, self.width = smoothed(values)
        self.label = label

    def plot(self, ax: Axes, since: float = -np.inf) -> None:
        """Draw what lies at `since` or after; the logged values thinly behind their mean, if there is one."""
        shown = self.steps >= since
        if self.width > 1:
            ax.plot(self.steps[shown], self.values[shown], color=self.colour, alpha=0.2, linewidth=0.6, zorder=1.5)
        point = marker(self.steps) if self.width == 1 else ""
        ax.plot(self.steps[shown], self.smooth[shown], color=self.colour, linewidth=1.6, marker=point, label=self.label)


def _loss(ax: Axes, runs: Histories) -> None:
    _plot(
        ax, [_Curve(steps, values, colour, label) for steps, values, colour, label in _series(runs, "loss", last=True)]
    )
    ax.set_ylabel("loss (nats a token)")


def _validation(ax: Axes, runs: Histories, source: str) -> None:
    found = []
    for (name, past), colour in zip(runs.items(), PALETTE):
        steps, values = _since_branch(past, *past.validation_series(source), trained=False)
        if len(steps):
            found.append(_Curve(steps, values, colour, f"{_label(name, past)}, last {values[-1]:.3f}"))
    _plot(ax, found)
    ax.set_ylabel("validation loss (nats a token)")


def _learning_rate(ax: Axes, runs: Histories) -> None:
    """Where schedules are the same, an earlier run's line, which is wider, shows on both sides of a later one's."""
    series = list(_series(runs, "lr"))
    for number, (steps, lr, colour, label) in enumerate(series, start=1):
        width = 1.6 + 0.9 * (len(series) - number)
        ax.plot(steps, lr, color=colour, linewidth=width, marker=marker(steps), label=label)
    rate_axis(ax, max(float(np.nanmax(lr, initial=0.0)) for _, lr, _, _ in series))


def _grad_norm(ax: Axes, runs: Histories) -> None:
    series = _series(runs, "grad_norm")
    curves = [_Curve(steps, pictures.usable(norm), colour, label) for steps, norm, colour, label in series]
    for curve in curves:
        curve.plot(ax)
    _tell_means(ax, curves)
    norm_axis(ax)


def _tell_means(ax: Axes, curves: list[_Curve]) -> None:
    widths = sorted({curve.width for curve in curves} - {1})
    steps = " or ".join([", ".join(map(str, widths[:-1]))] * (len(widths) > 1) + [str(width) for width in widths[-1:]])
    ax.set_xlabel("optimizer step" + (f" (thick lines: mean of {steps} logged steps)" if widths else ""))


def _plot(ax: Axes, curves: list[_Curve]) -> None:
    """Draw them, and the second half once more where all have fallen far below their beginning."""
    for curve in curves:
        curve.plot(ax)
    _tell_means(ax, curves)
    first, last = min(curve.steps[0] for curve in curves), max(curve.steps[-1] for curve in curves)
    right = [curve.values[curve.steps > first + 0.35 * (last - first)] for curve in curves]
    middle = (first + last) / 2
    if max((curve.steps >= middle).sum() for curve in curves) < 2:
        return
    inset = enlargement(ax, np.nanmax(np.concatenate(right), initial=-np.inf))
    if inset is not None:
        for curve in curves:
            curve.plot(inset, since=middle)


def _series(runs: Histories, figure: str, last: bool = False) -> list[tuple[np.ndarray, np.ndarray, str, str]]:
    """Steps, values, colour and label of each run that has train records; last: with the last value."""
    found = []
    for (name, past), colour in zip(runs.items(), PALETTE):
        steps, values = _since_branch(past, *past.series(figure))
        if len(steps):
            found.append((steps, values, colour, _label(name, past) + (f", last {values[-1]:.3f}" if last else "")))
    return found


def _since_branch(
    past: History, steps: np.ndarray, values: np.ndarray, trained: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """What a folder tells of steps before its run became a branch of another one is not part of the run.

    trained: False for validation, which a branch has of the step that it begins at, too.
    """
    shown = steps > (-1 if past.branch_step is None else past.branch_step - (not trained))
    return steps[shown], values[shown]


def _label(name: str, past: History) -> str:
    return _plain(name) if past.branch_step is None else f"{_plain(name)}, from step {past.branch_step:,}"


def _plain(name: str) -> str:
    """A name that matplotlib takes as it stands: no formula between dollars, and no underscore before it, which would hide it."""
    return " " * name.startswith("_") + name.replace("$", r"\$")


def _frame(ax: Axes, runs: Histories, title: str) -> None:
    """What all pictures share: title, steps below, tokens above if a step has as many in all runs, branches, legend."""
    ax.set_title(title, pad=12)
    if not ax.get_xlabel():
        ax.set_xlabel("optimizer step")
    left = min(past.branch_step or 0 for past in runs.values())
    right = max(*(past.last_step for past in runs.values()), left + 1)
    ax.set_xlim(left, right + 0.02 * (right - left))
    step_axis(ax, bins=8)
    for past, colour in zip(runs.values(), PALETTE):
        if past.branch_step:
            ax.axvline(past.branch_step, color=colour, linestyle=":", linewidth=1.2)
    tokens = {past.about.get("tokens_per_step") for past in runs.values()}
    if len(tokens) == 1 and (of_a_step := tokens.pop()):
        token_axis(ax, of_a_step, title="tokens" if left else "")
    lines, labels = ax.get_legend_handles_labels()
    for line, label in zip(lines, labels):
        line.set_label(textwrap.fill(label, 90))  # a longer one would be cut off
    longest = max((len(label) for label in labels), default=1)
    legend(ax, max(1, min(len(labels), 3, 100 // (longest + 5))))
