"""How a step is timed, the same for ours and for every peer: torch and the standard library, nothing else.

    Timer.steps(n) ─> (wait for one's turn) ─> mark ─> step ─> mark ... ─> Timer.seconds(): one figure a step

A peer runs in an environment of its own, so nothing here may need more than torch.
"""

import gc
import re
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")

MICRO_STEPS = 3
"""Three micro-steps stand for a step of any number: the first, one of those in the middle, which are all alike, and the last."""

DOES_NOT_FIT = "does not fit"
"""How the problem of a row begins whose memory did not suffice."""
SPENT = ("out of memory", "can't allocate memory", "Unable to allocate")
"""What the allocators of CUDA, of torch on a CPU and of numpy say when there is no memory left."""


def on_gpu(accelerator: str) -> bool:
    """Whether a run with this `parallel.accelerator` computes on a GPU here."""
    return accelerator != "cpu" and torch.cuda.is_available()


class Timer:
    """Times steps: by CUDA events on a GPU, which are read only at the end, by the wall clock on a CPU.

    `in_turns`: before each step, say "ready" on standard output and wait for a line on standard input. So that several
    processes on a machine whose speed drifts can take turns, a step each.
    """

    def __init__(self, device: torch.device, in_turns: bool = False):
        self._device, self._in_turns = device, in_turns
        gc.freeze()  # collecting all that was imported would be counted as a step's
        self._marks: list[tuple[Any, Any]] = []
        self._asked: list[Any] = []
        self._micro_marks: list[list[Any]] = []

    def steps(self, number: int, timed: bool) -> Iterator[int]:
        """Count from 0 to `number` - 1; what happens between two counts is a step, and is kept if `timed`."""
        for step in range(number):
            if self._in_turns:
                print("ready", flush=True)
                if not sys.stdin.readline():
                    raise SystemExit("whoever gave the turns is gone")
            self._asked = []
            started = self._mark()
            yield step
            if timed:
                self._marks.append((started, self._mark()))
                self._micro_marks.append(self._asked)
            elif self._in_turns:
                self._mark()  # a turn ends when its work does

    def marked(self, micro_batches: Iterator[T]) -> Iterator[T]:
        """The same micro-batches, for `micro_step_seconds`: each is asked for when its micro-step begins."""
        while True:
            self._asked.append(self._mark())
            try:
                micro_batch = next(micro_batches)
            except StopIteration:
                return
            yield micro_batch

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if self._in_turns:
            event.synchronize()
        return event

    def seconds(self) -> list[float]:
        """The timed steps' durations; waits for the device."""
        return self._between(self._marks)

    def micro_step_seconds(self, micro_step: int) -> list[float]:
        """The durations of the timed steps' `micro_step`, counted from 0; not the last, which the update follows."""
        return self._between([(asked[micro_step], asked[micro_step + 1]) for asked in self._micro_marks])

    def _between(self, marks: list[tuple[Any, Any]]) -> list[float]:
        if self._device.type != "cuda":
            return [end - start for start, end in marks]
        torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) / 1000 for start, end in marks]


def limit_memory(device: torch.device, limit_gib: float | None) -> None:
    """Let this process have at most so much of the GPU's memory, as a smaller GPU would; on a CPU see `over_limit`.

    Raises:
        ValueError: the GPU has less than that.
    """
    if limit_gib is None or device.type != "cuda":
        return
    total_gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    if limit_gib > total_gib:
        raise ValueError(f"--memory_limit_gib is {limit_gib:g} and the GPU has {total_gib:.1f} GiB")
    torch.cuda.set_per_process_memory_fraction(limit_gib / total_gib, device)


def memory(device: torch.device) -> dict[str, float]:
    """Peak memory so far: GiB of tensors and GiB taken from the GPU; on a CPU both are the process's largest resident size."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    else:
        allocated = reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_mem_gib": allocated / 2**30, "reserved_mem_gib": reserved / 2**30}


def over_limit(device: torch.device, peak: float, limit_gib: float | None) -> str | None:
    """On a CPU nothing holds a process to a limit while it runs: say afterwards that its peak (GiB) went over it."""
    if limit_gib is None or device.type == "cuda" or peak <= limit_gib:
        return None
    return f"{DOES_NOT_FIT}: {peak:.2f} GiB resident at the peak, the limit is {limit_gib:g} GiB"


def out_of_memory(error: BaseException) -> str | None:
    """One line where `error` says that memory ran out, else None."""
    text = str(error)
    if not any(words in text for words in SPENT):
        return None
    asked = re.search(r"(?:ried to|Unable to) allocate ([\d.]+ \w+)", text)
    return f"{DOES_NOT_FIT}: out of memory" + (f", {asked[1]} more were asked for" if asked else "")
