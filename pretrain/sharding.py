"""Where parameters, gradients and optimizer state lie, and when the ranks exchange them: FSDP2.

    choose()            configuration, ranks, size of the model ─> Sharding, and why
    shard()             a model on the meta device ─> layers and head each a group of FSDP2's, embedding and last norm the root's
    before_micro_step() which of the exchanges the coming micro-step makes

A rank of R keeps 1/R of every weight and of AdamW's state (fp32, 12 bytes a parameter in all), R being all ranks, or with
`hybrid` those of a node, every node then holding the same. What it holds besides, and what is sent for it:

    gather   layer: a layer's parameters, twice a micro-step; micro_step: all, once; step: all, once a step
    reduce   micro_step: its shard of the gradient, every micro-step; step: all of the gradient, once a step
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pretrain import ranks
from pretrain.model import Llama
from pretrain.sections import ParallelConfig

SPARE = 1 / 6
"""What a rank may hold beyond its shard to save communication (share of the device's memory)."""
STATE_SHARE = 1 / 2
"""What weights, gradients and AdamW's state may take (share of the device's memory); the rest is the activations'."""
GRADIENT_SUM_BYTES = 4
"""The whole sum of gradients, in fp32 (bytes a parameter)."""
STATE_BYTES = 16
"""Weight, gradient and AdamW's two moments, fp32 each (bytes a parameter)."""


@dataclass(frozen=True)
class Sharding:
    """What was chosen, the same on all ranks."""

    strategy: Literal["single", "full_shard", "shard_grad_op", "hybrid"]
    shard_size: int
    """Ranks among which the parameters are divided."""
    replicas: int
    """Groups of so many ranks; each holds the whole model."""
    gather: Literal["layer", "micro_step", "step"]
    reduce: Literal["micro_step", "step"]
    why: str
    """What led to the strategy, in a few words."""

    def __str__(self) -> str:
        """One line for the log."""
        if self.strategy == "single":
            return f"strategy single ({self.why})"
        places = f"{self.replicas} replicas of " * (self.replicas > 1) + f"{self.shard_size} shards"
        across = ", across replicas once a step" if self.replicas > 1 and self.reduce == "micro_step" else ""
        return (
            f"strategy {self.strategy} ({self.why}): {places}; parameters are gathered for a {_spell(self.gather)}, "
            f"gradients reduced once a {_spell(self.reduce)}{across}"
        )


def gathered_bytes(config: ParallelConfig) -> int:
    """Of whole parameters, in the type that is computed in (bytes a parameter)."""
    return 4 if config.precision == "fp32" else 2


def _spell(period: str) -> str:
    return period.replace("_", "-")


def choose(config: ParallelConfig, parameters: int, world_size: int, node_size: int, memory: int | None) -> Sharding:
    """What `config` means for a model of so many parameters.

    node_size: ranks a node; memory: of a rank's device, the smallest there is, in bytes; None: not known, as on a CPU.

    Raises:
        ValueError: a strategy that does not fit the ranks.
    """
    strategy, why = config.strategy, "as configured"
    shard_size = config.shard_size or node_size
    if strategy == "auto":
        strategy, why = _choose_strategy(config, parameters, world_size, shard_size, memory)
    if strategy == "single":
        if world_size > 1:
            raise ValueError(
                f"parallel.strategy is single and there are {world_size} ranks; set it to auto, or start one rank"
            )
        return Sharding("single", 1, 1, "step", "step", why)
    if strategy != "hybrid":
        shard_size = world_size
    if world_size % shard_size:
        raise ValueError(
            f"parallel.strategy hybrid cannot divide {world_size} ranks into groups of {shard_size} "
            f"({'parallel.shard_size' if config.shard_size else 'the ranks of this node'}); set parallel.shard_size to a "
            "divisor of the number of ranks, or parallel.strategy to full_shard"
        )
    replicas = world_size // shard_size
    spare = None if memory is None or config.cpu_offload else SPARE * memory
    gather, reduce, gathered = config.gather, config.reduce, gathered_bytes(config) * parameters
    if gather == "auto":
        kept = strategy == "hybrid" and spare is not None and gathered <= spare
        gather = "step" if kept or strategy == "shard_grad_op" else "layer"
    if reduce == "auto":
        held = GRADIENT_SUM_BYTES * parameters
        if strategy == "hybrid":
            held += gathered if gather == "step" else 0
            reduce = "step" if spare is not None and held <= spare else "micro_step"
        else:
            reduce = "step" if memory is None or held <= SPARE * memory else "micro_step"
    return Sharding(strategy, shard_size, replicas, gather, reduce, why)


def _choose_strategy(
    config: ParallelConfig, parameters: int, world_size: int, shard_size: int, memory: int | None
) -> tuple[Literal["single", "full_shard", "shard_grad_op", "hybrid"], str]:
    """What `auto` takes, and why."""
    if world_size == 1:
        return ("full_shard", "auto: one rank, cpu_offload") if config.cpu_offload else ("single", "auto: one rank")
    if world_size > shard_size:
        state = STATE_BYTES * parameters // shard_size
        if memory is not None and not config.cpu_offload and state > STATE_SHARE * memory:
            return "full_shard", (
                f"auto: weights and optimizer of a model shared by {shard_size} ranks would take {_gib(state)} of "
                f"{_gib(memory)} a rank"
            )
        return "hybrid", f"auto: {world_size} ranks in groups of {shard_size}; only gradients leave a group"
    kept = (gathered_bytes(config) + GRADIENT_SUM_BYTES) * parameters
    if memory is None or config.cpu_offload:
        return "full_shard", f"auto: {world_size} ranks on one node"
    if kept <= SPARE * memory:
        return "shard_grad_op", f"auto: parameters and gradients kept whole take {_gib(kept)} of {_gib(memory)} a rank"
    return "full_shard", f"auto: parameters and gradients kept whole would take {_gib(kept)} of {_gib(memory)} a rank"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def shard(model: Llama, mesh: DeviceMesh, sharding: Sharding, compute: torch.dtype, cpu_offload: bool) -> Llama:
    """Divide a model on the meta device among the ranks and give each its part, with garbage in it.

    mesh: all ranks, in one dimension. compute: the type that parameters are gathered in. Names stay as they are.
    """
    device_type = mesh.device_type
    if sharding.replicas > 1:  # rows are replicas: neighbours in rank, which sit in one node, share the parameters
        mesh = init_device_mesh(
            device_type, (sharding.replicas, sharding.shard_size), mesh_dim_names=("replicate", "shard")
        )
        ranks.be_patient(*mesh.get_all_groups())
    # Inputs are of that type already, but for the rotary table, which stays fp32 as on one device.
    policy = MixedPrecisionPolicy(compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=device_type == "cuda") if cpu_offload else OffloadPolicy()
    for layer in model.model.layers:
        free = sharding.gather == "layer"
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=free)
    # The forward of head and root ends where their backward begins: they are not freed in between.
    for rest in (model.lm_head, model):  # apart: the head's gradient is the first there is, the embedding's the last
        if rest is not None:
            fully_shard(rest, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
    device = torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
    model.materialize(torch.device("cpu") if cpu_offload else device)
    model.model.rope = model.model.rope.to(device)
    return model


def agree_on_weights(model: nn.Module, device: torch.device) -> None:
    """Give all replicas of hybrid sharding the first one's weights; called by all ranks.

    One seed gives other numbers on a GPU of another kind, and replicas that begin apart stay apart: they exchange gradients
    alone.
    """
    for parameter in model.parameters():
        if isinstance(parameter, DTensor) and parameter.device_mesh.ndim == 2:
            mine = parameter.to_local().detach()
            sent = mine.to(device)  # with cpu_offload it lies on the host
            dist.broadcast(sent, group=parameter.device_mesh.get_group("replicate"), group_src=0)
            mine.copy_(sent)


def before_micro_step(model: nn.Module, sharding: Sharding, last: bool) -> None:
    """Set what the coming forward and backward exchange; `last`: of the step. Call it with the model inside Fabric's wrapper.

    FSDP2's own switches: Fabric's `no_backward_sync` leaves the reduction off for good once it has been enabled.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_gradient_sync(last or sharding.reduce == "micro_step")
    model.set_requires_all_reduce(last)  # over the replicas; until then each keeps its own sum, as shards
    model.set_reshard_after_backward(last or sharding.gather != "step")
    model.set_is_last_backward(last)
