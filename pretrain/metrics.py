"""What a run says of itself: tokens/s, MFU, memory, and where it is written.

    trainer ─> Clock (seconds of training, of waiting for data) ─> train_metrics ─> MetricsLog ─> metrics.jsonl, TensorBoard, W&B

metrics.jsonl is one JSON object a line with a `kind`: start, train, validation, straggler, stop. `step` counts finished optimizer
steps. It is only ever appended to: after a crash and a resume a step may stand there twice, and the last line counts.
"""

import json
import math
import resource
import secrets
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import Logger, TensorBoardLogger

from pretrain import pace, ranks
from pretrain.chips import DATASHEETS
from pretrain.sections import Config, ModelConfig

WANDB_ID = "wandb-id.txt"
"""In the run's folder: the id of its W&B run."""


def peak_flops(device_name: str) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where it is not known: then there is no MFU."""
    chip = DATASHEETS.get(device_name)
    return None if chip is None else chip.flops


def flops_per_token(model: ModelConfig, seq_len: int, parameters: int, in_products: int) -> dict[str, float]:
    """Floating-point operations of forward and backward for one token, by two conventions.

    m1: 6 N + 12 L D T, all `parameters`, attention without the causal half (PaLM, arXiv 2204.02311, appendix B; TinyLlama's
    code). m3: 6 N_matmul + 6 L D T, the parameters that stand `in_products` only, causal attention.
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
        """Of them, those in which this rank's training thread computed."""
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
    """Speed and memory over the whole steps since the last line; `clock` is paused, the device has finished."""
    cuda = device.type == "cuda"
    memory = (
        torch.cuda.max_memory_allocated(device) if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {
        **throughput(tokens_per_step, clock.train_s / clock.steps, world_size, flops, device),
        "step_time_s": clock.train_s / clock.steps,
        "data_wait_s": clock.data_wait_s / clock.steps,
        "peak_mem_gib": memory / 2**30,
    }


def _finite(value: Any) -> Any:
    """The same with None for every float that is not finite, at any depth of dictionaries."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsLog:
    """Writes records on rank 0: to metrics.jsonl always, and their numbers to Fabric's loggers."""

    def __init__(self, run_dir: Path, fabric: Fabric):
        """Called by all ranks. Raises ValueError, on all of them, where W&B does not start."""
        self._fabric = fabric
        self._file = _open_for_lines(run_dir / "metrics.jsonl") if fabric.is_global_zero else None
        problem = _start_wandb(run_dir, fabric.loggers) if fabric.is_global_zero else None
        if problem := ranks.broadcast(problem):
            raise ValueError(problem)

    def write(self, kind: str, step: int, record: dict[str, Any]) -> None:
        """Append one line; floats and nested floats also go to the loggers, under `kind/name`."""
        if self._file is None:
            return
        line = {"kind": kind, "step": step, "time": time.time(), **record}
        self._file.write(json.dumps(_finite(line), allow_nan=False) + "\n")  # JSON knows no NaN
        if kind in ("train", "validation"):
            self._fabric.log_dict(dict(_numbers(kind, record)), step=step)

    def close(self) -> None:
        """Let the loggers write what they hold, and W&B upload it: at its own end a launcher may not wait for that.

        After an exception W&B does so by itself, and knows that the run failed.
        """
        if self._file is not None:
            self._file.close()
            for logger in self._fabric.loggers:
                logger.finalize("success")
                if type(logger).__name__ == "WandbLogger" and sys.exc_info()[0] is None:
                    logger.experiment.finish()  # type: ignore[attr-defined]


def _open_for_lines(path: Path) -> TextIO:
    """Open for appending lines; a line that a killed run left unfinished must not swallow the next one."""
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    file = open(path, "a", buffering=1)  # noqa: SIM115
    file.write("\n" if torn else "")
    return file


def _numbers(prefix: str, record: dict[str, Any]) -> list[tuple[str, float]]:
    flat: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, dict):
            flat += _numbers(f"{prefix}/{name}", value)
        elif isinstance(value, (int, float)):
            flat.append((f"{prefix}/{name}", float(value)))
    return flat


def make_loggers(config: Config) -> list[Logger]:
    """What `logger` in the configuration asks for, writing into the run's folder."""
    run_dir = Path(config.run_dir)
    if config.logger == "tensorboard":
        return [TensorBoardLogger(root_dir=run_dir, name="tensorboard", version="")]
    if config.logger == "wandb":
        from lightning.pytorch.loggers import WandbLogger  # Fabric takes it as it is; the import is slow

        kept = run_dir / WANDB_ID
        number = kept.read_text().strip() if kept.exists() else secrets.token_hex(4)
        return [WandbLogger(project="cria", name=run_dir.name, save_dir=str(run_dir), log_model=False, id=number)]
    return []


def _start_wandb(run_dir: Path, loggers: list[Logger]) -> str | None:
    """Join or begin the W&B run, and keep its id: started again, the run is the same one there too. Returns a problem."""
    wandb_logger: Any
    for wandb_logger in (logger for logger in loggers if type(logger).__name__ == "WandbLogger"):
        from wandb.errors import Error

        try:
            wandb_logger.experiment  # noqa: B018  starts it; WandbLogger resumes a run whose id is known
        except Error as error:
            return (
                f"logger is wandb, and W&B did not start: {error} Set WANDB_API_KEY, or WANDB_MODE=offline and `wandb sync` it "
                "later, or take --logger tensorboard"
            )
        (run_dir / WANDB_ID).write_text(f"{wandb_logger.version}\n")
    return None
