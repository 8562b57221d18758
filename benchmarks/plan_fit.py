"""Fit the rates of the model of time to the published runs, and what the fit is worth.

    python benchmarks/plan_fit.py

For each generation: the numbers with the least sum of errors over its runs in `pretrain.published` (absolute logarithms: a run
that is far from all others counts no more for it), which stand in `pretrain.speed`; and the errors on runs that were left out of
the fit, with all others of their size.
"""

import math
from dataclasses import replace
from itertools import product
from statistics import median
from typing import NamedTuple

from pretrain.chips import CHIPS
from pretrain.published import Published, counted, nine_of_ten
from pretrain.speed import Rates, rates_of, step_seconds, tokens_per_sec_per_gpu


class Numbers(NamedTuple):
    """What is fitted of `Rates`."""

    products: float
    attention: float
    traffic: float


START, GRID = Numbers(0.7, 0.25, 2.0), Numbers(0.01, 0.01, 0.1)
"""Where the search begins, and its steps."""


def error(run: Published, rates: Rates) -> float:
    """The logarithm of predicted over published tokens/s."""
    step = step_seconds(run.model, run.seq_len, run.layout, CHIPS[run.chip], rates)
    return math.log(tokens_per_sec_per_gpu(run.seq_len, run.layout, step) / run.tokens_per_sec_per_gpu)


def fit(runs: list[Published], start: Numbers = START) -> Numbers:
    """From `start`, in steps of the grid, to where no neighbour is better."""
    base, known = rates_of(CHIPS[runs[0].chip]), {}

    def cost(numbers: Numbers) -> float:
        if numbers not in known:
            rates = replace(base, **numbers._asdict())
            known[numbers] = sum(abs(error(run, rates)) for run in runs)
        return known[numbers]

    best = start
    while True:
        steps = product((-1, 0, 1), repeat=len(GRID))
        around = [Numbers(*(round(x + n * d, 2) for x, n, d in zip(best, step, GRID))) for step in steps]
        nearest = min(around, key=cost)
        if cost(nearest) >= cost(best):
            return best
        best = nearest


def errors_when_left_out(runs: list[Published], fitted: Numbers) -> list[float]:
    """Of each run, by a fit without those of its size; predicted over published, less 1."""
    found = []
    for size in sorted({run.size for run in runs}):
        numbers = fit([run for run in runs if run.size != size], fitted)
        rates = replace(rates_of(CHIPS[runs[0].chip]), **numbers._asdict())
        found += [math.expm1(error(run, rates)) for run in runs if run.size == size]
    return found


if __name__ == "__main__":
    for generation in ("A100-40G", "H100"):
        runs = counted(CHIPS[generation])
        fitted = fit(runs)
        errors = errors_when_left_out(runs, fitted)
        print(
            f"{generation}: {fitted}, {len(runs)} runs; errors on runs left out: half within {median(map(abs, errors)):.1%}, "
            f"nine of ten within {nine_of_ten(errors):.1%}, the largest {max(map(abs, errors)):.1%}"
        )
