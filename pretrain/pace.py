"""Who is slow: what each rank's own work takes, compared now and then.

    Clock of each rank (own seconds) ─> Comparison.add, every line of metrics ─> every so many lines: gathered ─> slow_ranks

In synchronous training every rank's steps take the same time: all wait for the slowest. So what is compared leaves out the
waiting for other ranks:

- on a CPU the seconds a step that the training thread computes, or would if it were let (its CPU time and its time in the
  queue for a core, by the kernel's count), plus its waiting for the loader. A rank that is slow in other ways, by swapping
  say, is not seen;
- on a GPU the waiting for the loader, and a small fixed matrix product, timed by the device's own events when its queue is
  empty: 5 ms, outside of any step. It shows a throttled or sick chip, and not a slow link: the time of a collective is that
  of its slowest member, whoever asks. `pretrain doctor` measures links.
"""

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

import torch

from pretrain import ranks
from pretrain.hosts import this_host

SLOWER = 0.10
"""By so much of the median, or of the step for a wait, a rank is slow."""


@dataclass(frozen=True)
class Pace:
    """A rank's figures over the steps since the last comparison (seconds)."""

    host: str
    step_time_s: float
    data_wait_s: float
    """Waiting for the loader, a step."""
    work_s: float
    """Computing in the training thread, a step."""
    product_s: float | None
    """The fixed product on its device; none on a CPU."""


def slow_ranks(paces: list[Pace]) -> list[dict[str, Any]]:
    """The ranks that are more than 10% slower than the median, the slowest first: rank, host, what, seconds, median_s.

    The median is the lower of the two in the middle, so that of two ranks the slower one can be named.
    """
    found = []
    for what, seconds, base_s in _figures(paces):
        typical = median_low(seconds)
        base = typical if base_s is None else base_s
        for rank, (pace, own) in enumerate(zip(paces, seconds)):
            if own > typical + SLOWER * base:
                figures = {"seconds": own, "median_s": typical, "excess_pct": 100 * (own - typical) / base}
                found.append({"rank": rank, "host": pace.host, "what": what, **figures})
    return sorted(found, key=lambda line: -line["excess_pct"])


def _figures(paces: list[Pace]) -> list[tuple[str, list[float], float | None]]:
    """What is compared: its name, each rank's seconds, and what 10% are of if not of the median."""
    products = [pace.product_s for pace in paces if pace.product_s is not None]
    if len(products) < len(paces):
        return [("own work", [pace.data_wait_s + pace.work_s for pace in paces], None)]
    waits = [pace.data_wait_s for pace in paces]
    return [
        ("waiting for data", waits, median_low(pace.step_time_s for pace in paces)),
        ("matrix product", products, None),
    ]


def words(line: dict[str, Any]) -> str:
    """A line of `slow_ranks` as a sentence."""
    figures = f"{line['seconds']:.4g} s, the median {line['median_s']:.4g} s (+{line['excess_pct']:.0f}%)"
    return f"slow: rank {line['rank']} on {line['host']}: {line['what']} {figures}"


class Comparison:
    """Adds up this rank's figures and compares them with the others'. Every method is called by all ranks alike."""

    def __init__(self, every_lines: int, device: torch.device):
        """`every_lines`: lines of metrics between two comparisons; 0: none."""
        self._every = every_lines if ranks.world_size() > 1 else 0
        self._device = device
        self._factor = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16) if device.type == "cuda" else None
        self._start()

    def _start(self) -> None:
        self._lines, self._steps = 0, 0
        self._train_s = self._data_wait_s = self._work_s = 0.0

    def add(self, steps: int, train_s: float, data_wait_s: float, work_s: float) -> list[dict[str, Any]]:
        """After a line of metrics, with the device idle: its steps and their seconds. Returns who is slow, when it is time."""
        self._lines += 1
        self._steps += steps
        self._train_s += train_s
        self._data_wait_s += data_wait_s
        self._work_s += work_s
        if not self._every or self._lines < self._every:
            return []
        n = self._steps
        figures = (self._train_s / n, self._data_wait_s / n, self._work_s / n)
        paces = ranks.gather(Pace(this_host(), *figures, self._time_product()))
        self._start()
        return slow_ranks(paces)

    def _time_product(self, times: int = 50) -> float | None:
        """Seconds of one product of 2048 x 2048 bf16 matrices on the device, the best of three rounds; None on a CPU."""
        if self._factor is None:
            return None
        rounds = []
        for _ in range(3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(times):
                torch.mm(self._factor, self._factor)
            end.record()
            end.synchronize()
            rounds.append(begin.elapsed_time(end) / 1000 / times)
        return min(rounds)


def work_s() -> float:
    """CPU seconds of this thread so far, and those that it stood in the queue for a core (Linux's schedstat)."""
    queued = 0.0
    with suppress(OSError, IndexError):  # another kernel: the CPU time alone
        queued = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9  # CPU ns, ns in the queue, turns
    return time.thread_time() + queued
