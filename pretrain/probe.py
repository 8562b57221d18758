"""A short calibration on this machine: real training steps of the configuration's own layers, at small depths.

    depths 2, 6 and 2 again ─> seconds and bytes = rest + depth x layer ─> measured / predicted ─> the plan's correction
    depth 4, not used for it ─> predicted from the line, against measured ┐
    depth 2 against itself, each step against the others of its depth ────┴─> the largest is the probe's own error

Random token ids, the configuration's width, micro-batch, precision and compile; one device, so that communication stays
what the model says. On a GPU time and peak memory are measured; on a CPU time only.
"""

import gc
import math
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from lightning.fabric import Fabric

from pretrain import config, metrics, parallel, sharding
from pretrain.chips import CHIPS, Chip
from pretrain.memory import Layout, layer_keeps
from pretrain.mixture import Mixture, Stage
from pretrain.model import count
from pretrain.optim import make_optimizer
from pretrain.run import Run
from pretrain.skips import Skips
from pretrain.speed import Rates, rates_of, step_seconds
from pretrain.trainer import optimizer_step

FITTED, HELD_OUT = (2, 6), 4
"""Depths (layers): two that the line goes through, one to test it on."""
DEPTHS = (*FITTED, HELD_OUT, FITTED[0])
"""In the order in which they are measured."""
WARM_UP, MEASURED = 3, 5
"""Optimizer steps at each depth."""

ALONE: dict[str, Any] = {
    "strategy": "single",
    "shard_size": 0,
    "gather": "auto",
    "cpu_offload": False,
    "activation_checkpointing": 0,
    "recompute": "none",
}
"""One device, nothing computed twice."""


@dataclass(frozen=True)
class Probe:
    """What was measured, as the plan needs it."""

    chip: Chip
    gpus: int
    """Of this machine; 1 for a CPU."""
    rates: Rates
    """With the corrections of time in them."""
    activations_factor: float | None
    """Measured over predicted bytes that a layer keeps; None on a CPU."""
    held_out_error: float
    """Of a step's seconds at the depth that was held out (share of 1)."""
    drift: float
    """Of those at the first depth, from the beginning to the end (share of 1)."""
    spread: float
    """Half of what lies between the fastest and the slowest step of a depth, of the depth that has most (share of 1)."""
    memory_error: float | None
    """Of its peak memory (share of 1); None on a CPU."""

    @property
    def time_error(self) -> float:
        """The largest of the three (share of 1)."""
        return max(self.held_out_error, self.drift, self.spread)


def probe(settings: config.Config) -> Probe:
    """Measure on the device that the configuration would train on.

    Raises:
        ValueError: the accelerator is not there.
        OSError: more layers took no longer, so that the machine was busy with something else.
    """
    alone = replace(settings.parallel, **ALONE)
    fabric, _ = parallel.launch(alone, settings.model, [])
    on_cpu = fabric.device.type == "cpu"
    chip = _chip(fabric.device)
    base = rates_of(chip)
    seconds, peaks = [], {}
    for depth in DEPTHS:
        of_depth, peaks[depth] = _measure(fabric, settings, alone, depth)
        seconds.append(of_depth)
    first, *others, again = map(median, seconds)
    steps = dict(zip(DEPTHS, ((first + again) / 2, *others)))
    spread = max((max(s) - min(s)) / 2 / median(s) for s in seconds)
    layer_s, rest_s, held_out_error = _line(steps)
    errors = (held_out_error, abs(again / first - 1), spread)
    if layer_s <= 0:
        raise OSError(
            f"the probe's steps of {FITTED[0]} layers took {steps[FITTED[0]]:.3f} s and those of {FITTED[1]} took "
            f"{steps[FITTED[1]]:.3f} s: something else is running on this machine; probe again when it is idle"
        )
    T, layout = settings.data.seq_len, _layout(settings)
    shallow, deep = (
        step_seconds(replace(settings.model, num_hidden_layers=depth), T, layout, chip, base).seconds
        for depth in FITTED
    )
    layer_expected = (deep - shallow) / (FITTED[1] - FITTED[0])
    rest_expected = shallow - FITTED[0] * layer_expected
    rates = replace(base, layers=layer_s / layer_expected, rest=max(0.0, rest_s / rest_expected))
    gpus = 1 if on_cpu else torch.cuda.device_count()
    if on_cpu:
        return Probe(chip, gpus, rates, None, *errors, None)
    layer_bytes, _, memory_error = _line(peaks)
    # A layer alone on a device stands for its weight, gradient and two moments in fp32, and in bf16 for a copy.
    fixed = count(settings.model).layer * (16 + (2 if layout.precision == "bf16" else 0))
    tokens = layout.micro_batch_size * T
    kept = (layer_bytes - fixed) / tokens / sum(layer_keeps(settings.model, layout).values())
    return Probe(chip, gpus, rates, kept, *errors, memory_error)


def _layout(settings: config.Config) -> Layout:
    return Layout(
        micro_batch_size=settings.train.micro_batch_size,
        precision=settings.parallel.precision,
        compile=settings.parallel.compile,
        fused_norm=torch.cuda.is_available(),
    )


def _chip(device: torch.device) -> Chip:
    """The chip by its name. An unknown one gets nominal figures, which the measurement corrects, all but its link: PCIe's is
    assumed.
    """
    if device.type == "cpu":
        peaks = {"flops": 1e11, "fp32_flops": 1e11, "bytes_per_s": 2e10, "link": 1e9}
        return Chip(device="cpu", **peaks, capability=(0, 0), memory_gib=math.inf, network_gbits=10)
    properties = torch.cuda.get_device_properties(device)
    for chip in CHIPS.values():
        if chip.device == properties.name:
            return chip
    peak = metrics.peak_flops(properties.name) or 100e12
    peaks = {"flops": peak, "fp32_flops": peak / 16, "bytes_per_s": 1e12, "link": 25e9}
    capability, memory_gib = (properties.major, properties.minor), properties.total_memory / 2**30
    return Chip(device=properties.name, **peaks, capability=capability, memory_gib=memory_gib, network_gbits=100)


def _line(measured: dict[int, float]) -> tuple[float, float, float]:
    """The line through the fitted depths: slope, intercept, and its error at the depth held out (share of 1)."""
    a, b = FITTED
    slope = (measured[b] - measured[a]) / (b - a)
    rest = measured[a] - a * slope
    return slope, rest, abs((rest + HELD_OUT * slope) / measured[HELD_OUT] - 1)


def _measure(
    fabric: Fabric, settings: config.Config, alone: config.ParallelConfig, depth: int
) -> tuple[list[float], float]:
    """Seconds of each optimizer step of one micro-batch, and their peak memory (bytes; 0 on a CPU)."""
    torch._dynamo.reset()
    run = _run(fabric, settings, alone, depth)
    B, T, V = settings.train.micro_batch_size, settings.data.seq_len, settings.model.vocab_size
    generator = torch.Generator().manual_seed(settings.seed)
    batch = torch.randint(V, (B, T + 1), generator=generator)  # random: zeros would run faster
    cuda = fabric.device.type == "cuda"
    seconds = []
    for step in range(WARM_UP + MEASURED):
        if cuda and step == WARM_UP:
            torch.cuda.reset_peak_memory_stats(fabric.device)
        started = time.perf_counter()
        optimizer_step(run, iter([(batch, 0)]))
        if cuda:
            torch.cuda.synchronize(fabric.device)
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(fabric.device) if cuda else 0
    del run
    gc.collect()  # a compiled model refers to itself
    if cuda:
        torch.cuda.empty_cache()
    return seconds[WARM_UP:], float(peak)


def _run(fabric: Fabric, settings: config.Config, alone: config.ParallelConfig, depth: int) -> Run:
    """All that a step needs, and no data, no folder and no log."""
    shape = replace(settings.model, num_hidden_layers=depth)
    eos_id = shape.vocab_size - 1 if settings.data.intra_document else None  # one of the random ids, as in `bench`
    model = parallel.build(fabric, shape, alone, settings.seed, settings.train.z_loss, eos_id)
    return Run(
        config=replace(settings, train=replace(settings.train, global_batch_size=settings.train.micro_batch_size)),
        run_dir=Path(),
        fabric=fabric,
        sharding=sharding.choose(alone, 0, 1, 1, None),
        model=model,
        optimizer=make_optimizer(parallel.unwrap(model), settings.optim),
        sources=[],
        mixture=Mixture([1], [Stage(1, (Fraction(1),))], [""], settings.train.micro_batch_size),
        grad_accum_steps=1,
        facts={},
        flops_per_token={},
        log=cast(Any, None),
        clock=metrics.Clock(fabric.device),
        skips=Skips(0.0, 1, fabric.device),
    )
