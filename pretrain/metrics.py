"""A run's figures: tokens/s, MFU, memory; and the files and loggers that they are written to.

    trainer ─> Clock (seconds of training, of waiting for data) ─> train_metrics ─> MetricsLog ─> metrics.jsonl, TensorBoard, W&B

metrics.jsonl is one JSON object a line with a `kind`: start, train, steps, validation, straggler, save, stop. `step` counts
finished optimizer steps. It is only ever appended to: after a crash and a resume a step may stand there twice, and the last line
counts.

Nothing here ends a run that trains: lines that the disk does not take wait in memory, and a logger that fails is switched off.
"""

import json
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import Logger

from pretrain import pace, ranks
from pretrain.chips import DATASHEETS
from pretrain.loggers import finish_wandb, say, start_wandb
from pretrain.sections import ModelConfig

_KEPT_LINES = 10_000
"""So many lines wait in memory while metrics.jsonl cannot be written."""


def peak_flops(device_name: str) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where it is not known: then there is no MFU."""
    chip = DATASHEETS.get(device_name)
    return None if chip is None else chip.flops


def flops_per_token(model: ModelConfig, seq_len: int, parameters: int, in_products: int) -> dict[str, float]:
    """Floating-point operations of forward and backward for one token, by two conventions.

    m1: 6 N + 12 L D T, all `parameters`, attention without the causal half (PaLM, arXiv 2204.02311, appendix B; TinyLlama's
    code). m3: 6 N_matmul + 6 L D T, the parameters that stand `in_products` only, causal attention. The numbers are
    names. Both count the attention of a whole sequence; with data.intra_document less is computed, of TinyLlama-1.1B's 2,048
    tokens at most 14% (m1), 8% (m3).
    """
    attention = model.num_hidden_layers * model.hidden_size * seq_len
    return {"m1": 6 * parameters + 12 * attention, "m3": 6 * in_products + 6 * attention}


class Clock:
    """Seconds of training since the last line of metrics, without validation and saving."""

    def __init__(self, device: torch.device):
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Start anew, after a line of metrics."""
        self.steps, self.train_s, self.data_wait_s = 0, 0.0, 0.0
        self.work_s = 0.0
        """The part of train_s in which this rank's training thread computed (see `pace`)."""
        self.go_on()

    def pause(self, finished: bool = False) -> None:
        """Before something that is not training: let the device finish, unless it is known to have, and stop counting."""
        if self._device.type == "cuda" and not finished:
            torch.cuda.synchronize(self._device)
        self.train_s += time.perf_counter() - self._started
        self.work_s += pace.work_s() - self._worked

    def go_on(self) -> None:
        """After `pause`."""
        self._started, self._worked = time.perf_counter(), pace.work_s()


def throughput(
    tokens_per_step: int, step_time_s: float, world_size: int, flops: dict[str, float], device: torch.device
) -> dict[str, float | None]:
    """Tokens/s and MFU of steps that take `step_time_s`; the run's metrics and `pretrain bench` both take it from here.

    MFU is the share of the chip's dense bf16 peak, once for each convention in `flops` (FLOPs a token); None where the chip's
    peak is not known.
    """
    per_gpu = tokens_per_step / step_time_s / world_size
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    mfu = {f"mfu_{name}_pct": None if peak is None else 100 * per_gpu * f / peak for name, f in flops.items()}
    return {"tokens_per_sec": per_gpu * world_size, "tokens_per_sec_per_gpu": per_gpu, **mfu}


def train_metrics(
    clock: Clock, tokens_per_step: int, world_size: int, flops: dict[str, float], device: torch.device
) -> dict[str, Any]:
    """Speed over the whole steps since the last line, and peak memory; `clock` is paused, the device has finished. Called by all
    ranks: memory is the fullest one's.

    peak_mem_gib: the most that tensors took at a time since the process began; on a CPU its largest resident size. On a GPU also
    reserved_mem_gib, the most that the allocator held for them, and alloc_retries: how often it found no room, gave all that was
    free back and asked the device again, which stops the step. Where they rise, memory is short or in pieces.
    """
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        mine = [stats[name] for name in ("allocated_bytes.all.peak", "reserved_bytes.all.peak", "num_alloc_retries")]
    else:
        mine = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]
    peak, *allocator = ranks.all_reduce_max(torch.tensor(mine)).numpy().tolist()  # on the CPU
    more = {"reserved_mem_gib": allocator[0] / 2**30, "alloc_retries": allocator[1]} if allocator else {}
    return {
        **throughput(tokens_per_step, clock.train_s / clock.steps, world_size, flops, device),
        "step_time_s": clock.train_s / clock.steps,
        "data_wait_s": clock.data_wait_s / clock.steps,
        "peak_mem_gib": peak / 2**30,
        **more,
    }


def _finite(value: Any) -> Any:
    """The same with None for every float that is not finite, at any depth of dictionaries and lists."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsLog:
    """Writes records on rank 0: to metrics.jsonl always, and their numbers to Fabric's loggers."""

    def __init__(self, run_dir: Path, fabric: Fabric):
        """Called by all ranks. Raises, on all of them, ValueError where W&B does not start, OSError where the file does not."""
        self._lines: _Lines | None = None
        self._loggers = list(fabric.loggers)
        problem: Exception | None = None
        if fabric.is_global_zero:
            try:
                self._lines = _Lines(run_dir / "metrics.jsonl")
                start_wandb(run_dir, self._loggers)
            except ValueError as error:
                problem = error
            except OSError as error:
                problem = OSError(str(error))
        if problem := ranks.broadcast(problem):
            raise problem

    def write(self, kind: str, step: int, record: dict[str, Any]) -> None:
        """Append one line; of kinds train and validation all numbers, nested ones too, also go to the loggers as `kind/name`."""
        if self._lines is None:
            return
        line = {"kind": kind, "step": step, "time": time.time(), **record}
        self._lines.write(json.dumps(_finite(line), allow_nan=False))  # JSON knows no NaN
        if kind in ("train", "validation"):
            numbers = dict(_numbers(kind, record))
            for logger in tuple(self._loggers):
                self._attempt(logger, lambda its: its.log_metrics(metrics=numbers, step=step))

    def describe(self, facts: dict[str, Any]) -> None:
        """Tell W&B what the run is, to find it by and to compare it with others; TensorBoard has no place for it."""
        if self._lines is None:
            return
        for logger in tuple(self._loggers):
            self._attempt(logger, lambda its: its.log_hyperparams(facts))

    def close(self) -> None:
        """Let the loggers write what they hold, and W&B upload it now: a launcher may not wait for an upload at the exit.

        After an exception W&B does so by itself, and knows that the run failed.
        """
        if self._lines is None:
            return
        well = sys.exc_info()[0] is None
        self._lines.close()
        for logger in tuple(self._loggers):
            self._attempt(logger, lambda its: its.finalize("success"))
            if type(logger).__name__ == "WandbLogger" and well:
                self._attempt(logger, finish_wandb)

    def _attempt(self, logger: Logger, call: Callable[[Any], object]) -> None:
        """Have a logger do something; one that fails is named and does nothing more."""
        try:
            call(logger)
        except Exception as error:
            cause = error.__cause__ or error  # TensorBoardLogger says of any that the number's type was wrong
            words = " ".join(f"{type(cause).__name__}: {cause}".split())
            say(f"{type(logger).__name__} is switched off, metrics.jsonl goes on: {words}")
            self._loggers = [other for other in self._loggers if other is not logger]


class _Lines:
    """Appends lines to a file. Those that the disk does not take are kept, the last of them, and come before the next one."""

    def __init__(self, path: Path):
        """Raises OSError where the file cannot be opened."""
        self._path = path
        self._file: BinaryIO | None = _open_for_lines(path)
        self._pending: deque[bytes] = deque()
        self._lost = 0
        self._waiting = False

    def write(self, line: str) -> None:
        """Append a line, and what has waited before it."""
        self._pending.append(line.encode() + b"\n")
        if len(self._pending) > _KEPT_LINES:
            self._pending.popleft()
            self._lost += 1
        self._write_pending()

    def close(self) -> None:
        """Try a last time, and say what is lost."""
        if self._pending:
            self._write_pending()
        if self._pending:
            say(f"{self._path}: its last {len(self._pending) + self._lost:,} lines could not be written and are lost")
        if self._file is not None:
            with suppress(OSError):  # it holds nothing back
                self._file.close()

    def _write_pending(self) -> None:
        count = len(self._pending)
        try:
            self._file = self._file or _open_for_lines(self._path)
            while self._pending:
                _append(self._file, self._pending[0])
                self._pending.popleft()
        except OSError as error:
            if self._file is not None:
                with suppress(OSError):
                    self._file.close()
            self._file = None
            if not self._waiting:
                kept = f"the last {_KEPT_LINES:,} lines are kept until it can"
                say(f"{self._path} cannot be written, training goes on, and {kept}: {error}")
            self._waiting = True
            return
        if self._waiting:
            lost = f"; {self._lost:,} before them are lost" if self._lost else ""
            say(f"{self._path} is written again, with the {count:,} lines that were kept{lost}")
        self._waiting, self._lost = False, 0


def _open_for_lines(path: Path) -> BinaryIO:
    """Open for appending lines, unbuffered; a line that was left unfinished must not swallow the next one."""
    file = open(path, "a+b", buffering=0)  # noqa: SIM115
    try:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                _append(file, b"\n")
    except OSError:
        file.close()
        raise
    return file


def _append(file: BinaryIO, line: bytes) -> None:
    """Write all of it: a disk that fills up takes a part, and then fails."""
    while line:
        line = line[file.write(line) :]


def _numbers(prefix: str, record: dict[str, Any]) -> list[tuple[str, float]]:
    flat: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, dict):
            flat += _numbers(f"{prefix}/{name}", value)
        elif isinstance(value, (int, float)):
            flat.append((f"{prefix}/{name}", float(value)))
    return flat
