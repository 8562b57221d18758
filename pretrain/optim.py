"""AdamW and its schedule.

parameters -> two groups (decayed, not decayed) -> fused AdamW;   step -> learning_rate -> both groups
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pretrain.sections import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) in one fused kernel. Norms and the embedding are not decayed, unless the config says so."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and "embed_tokens" not in name
        (decayed if matrix or config.decay_norms_and_embeddings else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}]
    if plain:
        groups.append({"params": plain, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=config.max_lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


_WAY_DOWN: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),  # arXiv 1608.03983, eq. 5
    "linear": lambda progress: 1 - progress,
    "sqrt": lambda progress: 1 - math.sqrt(progress),  # arXiv 2405.18392, section 3
}
"""What is left of max_lr - min_lr (1 to 0), by how much of the decay is over (0 to 1)."""


def learning_rate(step: int, config: OptimConfig, max_steps: int) -> float:
    """The learning rate of step `step`, counted from 1: linear warm-up, max_lr, and a decay to min_lr.

    The decay takes the last `lr_decay_steps` (0: all steps after the warm-up). It is max_lr at step warmup_steps and min_lr at
    step max_steps, unless the warm-up takes that long.
    """
    if step <= config.warmup_steps:
        return config.max_lr * step / config.warmup_steps
    decay_steps = config.lr_decay_steps or max_steps - config.warmup_steps
    decay_from = max_steps - decay_steps  # the last step at max_lr
    if step <= decay_from:
        return config.max_lr
    progress = min(1.0, (step - decay_from) / max(1, decay_steps))
    return config.min_lr + (config.max_lr - config.min_lr) * _WAY_DOWN[config.lr_decay](progress)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the coming update."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their global L2 norm is at most `max_norm`; returns the norm before, a scalar on the device.

    Sharded gradients give the norm over all ranks. A norm that is not finite leaves gradients that must not be used.
    """
    parameters = list(model.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if isinstance(norm, DTensor):
        mesh, norm = norm.device_mesh, norm.full_tensor()
        # Replicas (hybrid) get equal gradients from each other, but each adds up the norm itself: in another order its last bit
        # differs, and the replicas would drift apart.
        if mesh.ndim == 2:
            dist.broadcast(norm, group=mesh.get_group("replicate"), group_src=0)
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm


def updates(optimizer: torch.optim.AdamW) -> int:
    """How often the weights were updated, by the optimizer's own count; waits for the device."""
    return int(next(iter(optimizer.state.values()))["step"].item()) if optimizer.state else 0


def step_unless(optimizer: torch.optim.AdamW, skipped: Tensor) -> None:
    """Update the weights, unless `skipped`, () on the device of the weights, is 1.0, not 0.0.

    By the switch that fused AdamW has for gradient scalers: no synchronisation.
    """
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
