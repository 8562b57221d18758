"""Devices, precision, sharding and compilation, through Lightning Fabric.

    launch() ─> Fabric: one process a device, started by torchrun; or one process alone ─> Sharding
    build()  ─> Llama on the meta device ─> what is recomputed, compiled ─> sharded ─> memory ─> TinyLlama's initialisation

Weights, optimizer state and reductions are fp32. With bf16 the residual stream and all products are bf16. On one device each
linear layer casts its weight; under FSDP2 the weights are gathered as bf16 already. (Fabric's own "bf16-mixed" is autocast:
an fp32 residual stream, and fp32 gathers.)
"""

import logging
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.loggers import Logger
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies import ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from pretrain import backends, float8, joining, ops, ranks, sharding
from pretrain.hosts import suspect, this_host
from pretrain.model import Layer, Llama, count
from pretrain.ops import Operations
from pretrain.sections import ModelConfig, ParallelConfig
from pretrain.sharding import Sharding, agree_on_weights


def launch(
    parallel: ParallelConfig, shape: ModelConfig, loggers: list[Logger], deterministic: bool = False
) -> tuple[Fabric, Sharding]:
    """Join the processes that torchrun started, or run alone; returns the Fabric, and what of the model lies where.

    shape: the model's size decides the sharding. deterministic: the same bits every time, on a GPU too.

    Raises:
        ValueError: the accelerator is not there, or this PyTorch is not made for it; the strategy does not fit the number of
            ranks; or SLURM's tasks were started without their numbers.
        OSError: SLURM's job has GPUs and none is to be seen, or none can be used; or the ranks did not meet (TimeoutError).
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True)
        if parallel.compile:
            _compile_deterministically()
    _refuse_tasks_without_numbers()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    accelerator = _choose_accelerator(parallel, local_world_size)
    parameters = count(shape).total
    # Only whether anything is sharded, before the ranks have joined and know their GPUs' memory.
    chosen = sharding.choose(parallel, parameters, world_size, local_world_size, memory=None)

    def shard(model: Llama, mesh: DeviceMesh) -> Llama:  # called by `build`: `chosen` is final by then
        return sharding.shard(model, mesh["data_parallel"], chosen, _compute_dtype(parallel), parallel.cpu_offload)

    alone = chosen.strategy == "single"
    warnings.filterwarnings("ignore", "The `srun` command is available")  # a start without it is meant
    for name in ("lightning.fabric", "lightning.pytorch"):  # advice on TF32, which is none for bf16; banners
        logging.getLogger(name).setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator=accelerator,
        strategy=_on_one_device(accelerator) if alone else _sharded(accelerator, world_size, shard),
        devices=local_world_size,
        num_nodes=world_size // local_world_size,
        precision="32-true",  # the model's own business
        loggers=loggers,
        plugins=[LightningEnvironment()] if alone else None,  # not SLURM's, of all its tasks
    )
    joining.join(fabric, world_size)
    if fabric.device.type == "cuda":  # the ranks must choose alike, so by the smallest device
        memory = min(ranks.gather(torch.cuda.get_device_properties(fabric.device).total_memory))
        chosen = sharding.choose(parallel, parameters, world_size, local_world_size, memory)
    return fabric, chosen


def _refuse_tasks_without_numbers() -> None:
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if tasks != "1" and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"SLURM has {tasks} tasks and WORLD_SIZE is not set, so that each would run alone; start it through "
            "launch/slurm.sbatch (COMMAND=doctor or bench for these), or set WORLD_SIZE=1 for one process alone"
        )


def _on_one_device(accelerator: str) -> Strategy:
    return SingleDeviceStrategy(torch.device("cuda", 0) if accelerator == "cuda" else torch.device("cpu"))


def _sharded(accelerator: str, world_size: int, shard: Callable[[Llama, DeviceMesh], Llama]) -> Strategy:
    """By default Fabric would shard within tensors over the node's devices; all of ours are data parallel."""
    joining.alone_is_a_world_of_one()
    return ModelParallelStrategy(
        parallelize_fn=shard,
        data_parallel_size=world_size,
        tensor_parallel_size=1,
        # gloo for CPU tensors beside nccl: ranks agree on stopping without touching the GPU's queue.
        process_group_backend="gloo" if accelerator == "cpu" else "cpu:gloo,cuda:nccl",
        timeout=ranks.JOIN_TIMEOUT,
    )


def _compile_deterministically() -> None:
    """Have torch.compile choose kernels by rules and never by timing them."""
    from torch._inductor import config as inductor  # takes its time

    inductor.deterministic = True


def _choose_accelerator(parallel: ParallelConfig, local_world_size: int) -> str:
    gpus = torch.cuda.device_count()
    given = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if parallel.accelerator != "cpu" and gpus < min(int(given), local_world_size):
        if torch.version.cuda is None and torch.version.hip is None:
            raise ValueError(
                f"SLURM gave this job {given} GPUs on {this_host()}, and this PyTorch ({torch.__version__}) is one for CPUs: "
                "install one for CUDA (README, Two commands), or set --parallel.accelerator cpu"
            )
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        each = f"; where SLURM shows each task one GPU (CUDA_VISIBLE_DEVICES {shown}), give srun --gpu-bind=none"
        suspect(this_host())
        raise OSError(
            f"SLURM gave this job {given} GPUs on {this_host()}, and PyTorch finds {gpus or 'none'} there: see "
            f"nvidia-smi on that host, and leave it out with sbatch --exclude{each if gpus == 1 else ''}; or set "
            "--parallel.accelerator cpu"
        )
    accelerator = parallel.accelerator if parallel.accelerator != "auto" else ("cuda" if gpus else "cpu")
    if accelerator == "cuda" and gpus < local_world_size:
        start = f"start {gpus} ranks (torchrun --nproc_per_node={gpus}), or " if gpus else ""
        raise ValueError(
            f"parallel.accelerator is {parallel.accelerator}: this node has {gpus} GPUs for {local_world_size} ranks; "
            f"{start}set --parallel.accelerator cpu"
        )
    if accelerator == "cuda":
        _wake_driver()
    return accelerator


def _wake_driver() -> None:
    """The first call of CUDA: NVML, by which GPUs are counted, sees them whether they can be used or not."""
    try:
        torch.cuda.init()
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        why = str(error).splitlines()[0].partition(". ")[0]
        if re.search(r"driver .*too old|forward compatibility", str(error)):
            raise ValueError(
                f"{this_host()}: {why}: PyTorch {torch.__version__} is built for CUDA {torch.version.cuda}; install one for a "
                "CUDA that this driver knows (nvidia-smi names its newest), or update the driver"
            ) from None
        suspect(this_host())
        raise OSError(
            f"the GPUs of {this_host()} cannot be used ({why}): see nvidia-smi on that host, and leave it out with sbatch "
            "--exclude"
        ) from None


def build(
    fabric: Fabric,
    shape: ModelConfig,
    parallel: ParallelConfig,
    seed: int,
    z_loss: float = 0.0,
    eos_id: int | None = None,
) -> nn.Module:
    """A model with its first weights, sharded over the ranks or whole on the one device, as Fabric's wrapper.

    z_loss: `TrainConfig.z_loss`. eos_id: ends a document, where attention is to stay within documents.

    Raises:
        ValueError: an operation was asked for that cannot be had here.
    """
    sharded = isinstance(fabric.strategy, ModelParallelStrategy)
    operations = choose_operations(shape, parallel, fabric.device, eos_id is not None).with_z_loss(z_loss)
    if parallel.compile and sharded:
        operations = operations.compiled_outside_of_layers()
    with torch.device("meta"):
        model = Llama(shape, operations, _compute_dtype(parallel), eos_id)
    if parallel.precision == "fp8":
        float8.convert(model, fabric.device)
    recompute(model, parallel)
    if parallel.compile and sharded:  # before sharding: what FSDP2 hooks on is not compiled
        for layer in model.model.layers:
            layer.compile(dynamic=False, fullgraph=True)
    if not sharded:
        model.materialize(fabric.device)
    wrapped = fabric.setup_module(model)  # shards and materializes, see sharding.shard
    model.init_weights(seed, fabric.device)  # with cpu_offload too: another device draws other numbers
    if sharded:
        agree_on_weights(model, fabric.device)
    if parallel.compile and not sharded:
        model.compile(dynamic=False, fullgraph=True)
    return wrapped


def choose_operations(
    shape: ModelConfig, parallel: ParallelConfig, device: torch.device, intra_document: bool
) -> Operations:
    """What a model of this shape computes with on `device`; its `choices` say why.

    Raises:
        ValueError: an operation was asked for that cannot be had here.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    deterministic = torch.are_deterministic_algorithms_enabled()
    return backends.choose(shape, situation(capability, shape, parallel, intra_document, deterministic))


def situation(
    capability: tuple[int, int] | None,
    shape: ModelConfig,
    parallel: ParallelConfig,
    intra_document: bool,
    deterministic: bool,
) -> backends.Situation:
    """What the choice of operations depends on, for a model of this shape on a device of this capability (None: CPU)."""
    return backends.Situation(
        capability=capability,
        dtype=_compute_dtype(parallel),
        head_dim=shape.head_dim,
        compiled=parallel.compile,
        documents=intra_document,
        float8=parallel.precision == "fp8",
        deterministic=deterministic,
    )


def _compute_dtype(parallel: ParallelConfig) -> torch.dtype:
    return torch.float32 if parallel.precision == "fp32" else torch.bfloat16


def recompute(model: Llama, parallel: ParallelConfig) -> None:
    """Have activations computed again in the backward instead of kept: of every n-th layer all, of the others a part."""
    every = parallel.activation_checkpointing
    for i, layer in enumerate(model.model.layers):
        assert isinstance(layer, Layer)
        if every and i % every == 0:
            _set_silu_mul(layer, ops.silu_mul)
            _replace(layer, "forward")
        elif parallel.recompute != "none":
            _recompute_part(layer, parallel)


def _recompute_part(layer: Layer, parallel: ParallelConfig) -> None:
    """Eager, what leaves a recomputed part is kept by who takes it. Compiled, nothing is kept: then the norms are parts, too."""
    if parallel.compile:
        _replace(layer.input_layernorm, "forward")
    if parallel.recompute == "mlp":
        _set_silu_mul(layer, ops.silu_mul)
        _replace(layer, "feed_forward")
        return
    if parallel.compile:
        _replace(layer.post_attention_layernorm, "forward")
    _set_silu_mul(layer, _again(ops.silu_mul))


def _set_silu_mul(layer: Layer, elementwise: Callable[..., torch.Tensor]) -> None:
    """Not PyTorch's with a backward of its own, whose result is kept although it is part of what is computed again; nor any other
    library's, which keeps what its own backward wants.
    """
    if layer.mlp.operations.swiglu is ops.swiglu:
        swiglu = partial(ops.swiglu, elementwise=elementwise)
        layer.mlp.operations = replace(layer.mlp.operations, swiglu=swiglu)


def _replace(module: nn.Module, method: str) -> None:
    """Methods are replaced and not modules wrapped, so that the parameters keep their names; inside a layer's hooks, so that
    FSDP2 gathers before anything is computed again.
    """
    setattr(module, method, _again(getattr(module, method)))


def _again(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same function; what it computes is not kept for the backward but computed again there."""

    def recomputed(*inputs: Any) -> torch.Tensor:  # a function of ours: torch.compile leaves out frames of torch's own
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)

    return recomputed


def unwrap(model: nn.Module) -> Llama:
    """The model inside Fabric's wrapper."""
    inside = getattr(model, "module", model)
    assert isinstance(inside, Llama)
    return inside


def leave() -> None:
    """End the process group; without it gloo's threads end the process with an error."""
    if dist.is_initialized():
        dist.destroy_process_group()


def device_name(device: torch.device) -> str:
    """What the chip calls itself, e.g. "NVIDIA A100-SXM4-40GB"; "cpu" for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
