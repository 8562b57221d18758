"""Fit the rates of the model of time to the published runs, and what the fit is worth.

    python benchmarks/plan_fit.py

For each generation: the numbers in a grid with the least mean square error over its runs in `pretrain.published` (they stand
in `pretrain.speed`), the largest error, and the largest error on a run that was left out of its own fit.
"""

from dataclasses import replace
from itertools import product
from typing import NamedTuple

import numpy as np

from pretrain.chips import CHIPS
from pretrain.published import PUBLISHED, Published
from pretrain.speed import HOPPER, Rates, step_seconds, tokens_per_sec_per_gpu


class Numbers(NamedTuple):
    """What is fitted of `Rates`."""

    products: float
    half_width: float
    attention: float
    hidden: float


GRIDS = {
    "A100": ((0.70, 0.72, 0.74, 0.76, 0.78, 0.80), (0,), (0.2, 0.22, 0.24, 0.26, 0.28), (0.5,)),
    "H100": ((0.68, 0.70, 0.72, 0.74, 0.76), (400, 600, 800, 1000), (0.2, 0.24, 0.28, 0.32), (0.0, 0.25, 0.5)),
}


def error(run: Published, rates: Rates) -> float:
    """Predicted over published tokens/s, less 1."""
    step = step_seconds(run.model, run.seq_len, run.layout, CHIPS[run.chip], rates)
    return tokens_per_sec_per_gpu(run.seq_len, run.layout, step) / run.tokens_per_sec_per_gpu - 1


def fit(generation: str) -> tuple[Numbers, float, float]:
    """The numbers, the largest error with them, and the largest of a run that was left out (shares of 1)."""
    runs = [run for run in PUBLISHED if generation in run.chip and not run.assumed]
    grid = [Numbers(*numbers) for numbers in product(*GRIDS[generation])]
    rates = [replace(HOPPER, compiled=1.0, **numbers._asdict()) for numbers in grid]
    errors = np.array([[error(run, r) for run in runs] for r in rates])
    best = int(np.argmin((errors**2).sum(axis=1)))
    left_out = [errors[np.argmin((np.delete(errors, run, axis=1) ** 2).sum(axis=1)), run] for run in range(len(runs))]
    return grid[best], float(np.abs(errors[best]).max()), float(np.abs(left_out).max())


if __name__ == "__main__":
    for generation in GRIDS:
        numbers, largest, left_out = fit(generation)
        print(f"{generation}: {numbers}; largest error {largest:.1%}, of a run left out of the fit {left_out:.1%}")
