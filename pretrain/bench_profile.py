"""A few steps under torch's profiler: where their time goes.

    step, step ─> profiler ─> share of the time in communication, ten most expensive operations, trace (Chrome's JSON)

Communication on a GPU is the time in which a NCCL kernel runs, and `exposed` the part of it in which no other kernel does;
on a CPU it is the time in which a gloo collective is under way. The profiler slows steps down, so shares are taken of the
profiled window, and never a speed.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

COLLECTIVES = ("nccl", "gloo:")
"""How the names of the communication's events begin."""

Interval = tuple[float, float]


def profile_steps(device: torch.device, step: Callable[[], object], steps: int, trace: Path | None) -> dict[str, Any]:
    """Run `step` so many times under the profiler.

    Returns `communication_pct` and `exposed_communication_pct` of the window, and `operations`: the ten most expensive, each
    with its name, `ms` a step, `pct` of all operations' time, and `calls` a step. On a GPU also `groups`, ms a step of all
    kernels by their kind, and `idle_pct` of the window, in which none runs. `trace`: a file to write the trace to.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    events = [e for e in profiler.events() if e.time_range.end > e.time_range.start]
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation] if on_gpu else events
    if not kernels:  # a container may not be allowed to look into the GPU
        return {"communication_pct": None, "exposed_communication_pct": None, "operations": []}
    talk = merged((e.time_range.start, e.time_range.end) for e in kernels if _is_collective(e.name))
    work = merged((e.time_range.start, e.time_range.end) for e in kernels if not _is_collective(e.name))
    window = max(e.time_range.end for e in kernels) - min(e.time_range.start for e in kernels)
    return {
        "communication_pct": 100 * _length(talk) / window,
        "exposed_communication_pct": 100 * (_length(talk) - _overlap(talk, work)) / window if on_gpu else None,
        "operations": _most_expensive(profiler, on_gpu, steps),
        **(_groups(kernels, window, steps) if on_gpu else {}),
    }


_KINDS = {
    "communication": re.compile(r"^nccl", re.IGNORECASE),
    "Triton": re.compile(r"^triton_|^_|^liger_"),
    "attention": re.compile(r"sdpa|flash|fmha|attention|flex", re.IGNORECASE),
    "products": re.compile(r"gemm|nvjet|cutlass|xmma|splitk|cublas", re.IGNORECASE),
    "optimizer and clipping": re.compile(r"multi_tensor|adam|foreach", re.IGNORECASE),
    "copies": re.compile(r"^mem(cpy|set)", re.IGNORECASE),
}
"""Kinds of kernels, by their names; the first that fits."""


def kind(name: str) -> str:
    """What a kernel does, as far as its name tells."""
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(name)), "other")


def _groups(kernels: list[Any], window_us: float, steps: int) -> dict[str, Any]:
    us: Counter[str] = Counter()
    for event in kernels:
        us[kind(event.name)] += event.time_range.end - event.time_range.start
    busy = _length(merged((event.time_range.start, event.time_range.end) for event in kernels))
    groups = {name: spent / 1000 / steps for name, spent in us.most_common()}
    return {"groups": groups, "idle_pct": 100 * (1 - busy / window_us)}


def _is_collective(name: str) -> bool:
    return name.lower().startswith(COLLECTIVES)


def _most_expensive(profiler: profile, on_gpu: bool, steps: int) -> list[dict[str, Any]]:
    side = DeviceType.CUDA if on_gpu else DeviceType.CPU  # on a GPU its kernels, not the operations that start them
    averages = [e for e in profiler.key_averages() if e.device_type == side and not e.is_user_annotation]
    averages = [e for e in averages if on_gpu or not _is_collective(e.key)]  # gloo's threads run beside the operations
    self_us = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in averages}
    total = sum(self_us.values())
    first = sorted(averages, key=lambda e: self_us[e.key], reverse=True)[:10]
    return [
        {
            "name": e.key,
            "ms": self_us[e.key] / 1000 / steps,
            "pct": 100 * self_us[e.key] / total,
            "calls": e.count / steps,
        }
        for e in first
    ]


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of the intervals, in order, without overlaps."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def _length(union: list[Interval]) -> float:
    return sum(end - start for start, end in union)


def _overlap(a: list[Interval], b: list[Interval]) -> float:
    """Length of what lies in both; length(a) + length(b) - length(a or b)."""
    return _length(a) + _length(b) - _length(merged([*a, *b]))
