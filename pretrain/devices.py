"""What `pretrain doctor` finds of a rank's device: its speeds, what its driver complains about, whether anything compiles for it.

a GPU that fails is a finding ─> so that all ranks' are judged; one that does not come back ends the process, by its host's name
"""

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pretrain import config, ranks
from pretrain.hosts import is_first_here, this_host

_SILENT_S = 180.0
"""A device that has not come back after so long, and ten times what a measurement may take, does not (seconds)."""


def look(settings: config.Config, device: torch.device, seconds: float) -> dict[str, Any]:
    """Its speeds, what the driver complains about, and whether anything can be compiled for it; or why it cannot be measured."""
    found: dict[str, Any] = {}
    silent = threading.Timer(_SILENT_S + 10 * seconds, _end_silent)
    silent.daemon = True
    silent.start()
    try:
        if device.type == "cuda":
            found["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
            found["memory_bytes_per_s"] = _copy_speed(device, seconds)
        found["product_flops"] = _product_speed(device, seconds)
    except RuntimeError as error:
        found["device_problem"] = str(error).strip().splitlines()[0]
    finally:
        silent.cancel()
    found["health"] = _health(device) if device.type == "cuda" else {}  # after the work: a hot chip slows down now
    if settings.parallel.compile and is_first_here() and "device_problem" not in found:
        found["compile_problem"] = _compile_problem(device)
    return found


def _end_silent() -> None:
    who = f"{this_host()}: the device of rank {ranks.rank()}"
    os.write(2, f"pretrain doctor: bad: {who} does not come back from its first work\n".encode())
    os._exit(1)


def _times(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds that `work` takes: the median over about `seconds`, after a first time that is not counted."""
    taken: list[float] = []
    work()
    until = time.perf_counter() + seconds
    while not taken or time.perf_counter() < until:
        finish(device)
        began = time.perf_counter()
        work()
        finish(device)
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def finish(device: torch.device) -> None:
    """Wait until it has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _product_speed(device: torch.device, seconds: float) -> float:
    """FLOP/s of a square matrix product: 8192, bf16, on a GPU; 512, fp32, on a CPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))  # zeros would run faster
    return 2 * n**3 / _times(lambda: a @ b, device, seconds)


def _copy_speed(device: torch.device, seconds: float) -> float:
    """Bytes/s of copying 1 GiB within the device's memory, read and written."""
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _times(lambda: target.copy_(source), device, seconds)


_COMPLAINTS = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected ECC errors",
    "clocks_throttle_reasons.hw_slowdown": "throttled by hardware",
    "clocks_throttle_reasons.hw_thermal_slowdown": "throttled: too hot",
    "clocks_throttle_reasons.hw_power_brake_slowdown": "throttled: power brake",
    "clocks_throttle_reasons.sw_thermal_slowdown": "throttled: warm",
}


_ROWS = {
    "remapped_rows.pending": "memory rows to be remapped at the next reset",
    "remapped_rows.failure": "memory rows that could not be remapped",
}


def _health(device: torch.device) -> dict[str, str]:
    """What nvidia-smi has to complain about this rank's GPU, or that it was asked and did not answer."""
    chip = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    found: dict[str, str] = {}
    for query, names in (("--query-gpu", _COMPLAINTS), ("--query-remapped-rows", _ROWS)):
        answer = output("nvidia-smi", f"--id={chip}", f"{query}={','.join(names)}", "--format=csv,noheader,nounits")
        if answer:
            found |= complaints(dict(zip(names.values(), answer.split(","))))
        else:
            found["nvidia-smi"] = "did not answer"
    return found


def complaints(answers: dict[str, str]) -> dict[str, str]:
    """Those of nvidia-smi's answers that are neither zero, nor "no", nor not known to this chip."""
    fine = ("0", "no", "not active", "n/a", "not supported", "")
    return {name: value.strip() for name, value in answers.items() if value.strip().strip("[]").lower() not in fine}


def output(*command: str) -> str:
    """What a program says; nothing where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _compile_problem(device: torch.device) -> str | None:
    """Compile a sum, as if for the first time: without a C compiler, Python's headers or an executable /tmp it cannot be done."""
    from torch._inductor.utils import fresh_cache  # takes its time

    try:
        with fresh_cache():
            torch.compile(lambda x: x.sin() + x, dynamic=False)(torch.ones(64, device=device))
    except Exception as error:  # whatever the compiler and those below it raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
        why = next(
            (line for line in lines if re.search(r"compiler|Python\.h|[Pp]ermission|No such file", line)), lines[0]
        )
        return f"{why}; install a C compiler and Python's headers, or set parallel.compile false"
    return None
