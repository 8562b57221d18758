"""Run by test_parallel.py: worlds of several ranks one after the other, each rank a process that trains many runs.

The ranks are forked from one process, so that torch is imported once; torchrun's own start is tested where runs are started as
a user starts them.
"""

import dataclasses
import functools
import gc
import json
import multiprocessing
import os
import pickle
import sys
import time
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import checkpoint, parallel, preparation, trainer
from pretrain import model as model_module
from pretrain.optim import clip_gradients, make_optimizer
from pretrain.ranks import all_reduce_sum, rank
from pretrain.sections import Config, ModelConfig, OptimConfig, ParallelConfig
from pretrain.sharding import before_micro_step

ON_THE_CPU: dict[str, Any] = {"accelerator": "cpu", "precision": "fp32", "compile": False}
FORK = multiprocessing.get_context("fork")


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors on the CPU that operators made and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and type(tensor) is torch.Tensor and tensor.device.type == "cpu":
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def built(out: Path, shape: dict, settings: dict) -> None:
    """Build; save the whole initial weights and the norm of one gradient, made of different data on every rank."""
    model_config, parallel_config = ModelConfig(**shape), ParallelConfig(**ON_THE_CPU, **settings)
    fabric, sharding = parallel.launch(parallel_config, model_config, [])
    with LiveMemory() as memory:
        model = parallel.unwrap(parallel.build(fabric, model_config, parallel_config, seed=7))
    sharded = [isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in model.parameters()]
    facts = {
        "sharded": sum(sharded),
        "parameters": len(sharded),
        "held_bytes": sum(local(p).nbytes for p in model.parameters()),
        "peak_bytes": memory.peak,
        "sharding": dataclasses.asdict(sharding),
        "line": str(sharding),
    }
    meshes = {p.device_mesh for p in model.parameters() if isinstance(p, DTensor)}
    groups = [dist.group.WORLD, *(g for mesh in meshes for g in mesh.get_all_groups())] if dist.is_initialized() else []
    facts["timeouts"] = sorted({str(g._get_backend(torch.device("cpu")).options._timeout) for g in groups})
    weights = whole(model)
    tokens = torch.randint(0, model_config.vocab_size, (12, 17), generator=torch.Generator().manual_seed(3))
    mine = tokens.chunk(fabric.world_size)[fabric.global_rank]
    fabric.backward(model(mine[:, :-1], mine[:, 1:]))
    facts["grad_norm"] = clip_gradients(model, 1.0).item()
    write(out, facts, weights)


def unlike(shape: dict, settings: dict) -> None:
    """Build where every rank draws other numbers, as GPUs of different kinds do; replicas must all the same begin alike."""
    model_config, parallel_config = ModelConfig(**shape), ParallelConfig(**ON_THE_CPU, **settings)
    fabric, _ = parallel.launch(parallel_config, model_config, [])
    with mock.patch.object(
        model_module, "_fill_normal", lambda p, std, seed, *rest: FILL_NORMAL(p, std, seed + rank(), *rest)
    ):
        built = parallel.unwrap(parallel.build(fabric, model_config, parallel_config, seed=7))
    replicas = next(built.parameters()).device_mesh.get_group("replicate")

    def assert_equal(name: str, mine: torch.Tensor) -> None:
        all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size(replicas))]
        dist.all_gather(all_of_them, mine.contiguous(), group=replicas)
        assert len(all_of_them) == 2
        assert torch.equal(*all_of_them), name

    for name, parameter in built.named_parameters():
        assert_equal(name, parameter.to_local())
    # Nor do they part where one adds up the gradient's norm in another order.
    tokens = torch.arange(17)[None]
    built(tokens[:, :-1], tokens[:, 1:]).backward()
    total = torch.nn.utils.get_total_norm
    off = 1 + 1e-3 * dist.get_rank(replicas)
    with mock.patch.object(torch.nn.utils, "get_total_norm", lambda *args, **kwargs: total(*args, **kwargs) * off):
        assert_equal("norm", clip_gradients(built, 1e-3))
    for name, parameter in built.named_parameters():
        assert_equal(f"gradient of {name}", parameter.grad.to_local())


FILL_NORMAL = model_module._fill_normal


class Exchanges(TorchDispatchMode):
    """Notes, of each kind of collective, the type of every tensor that was given to one."""

    def __init__(self) -> None:
        super().__init__()
        self.types: dict[str, list[str]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        library, kind = str(function).split(".")[:2]
        if library == "c10d":
            # (output, input, ...) of gathers and scatters, ([tensor], ...) of a sum in place
            given = args[0][0] if isinstance(args[0], list) else args[1]
            self.types.setdefault(kind, []).append(str(given.dtype))
        return function(*args, **(kwargs or {}))


def counted(out: Path, shape: dict, settings: dict) -> None:
    """Collectives of each of three micro-steps, the last of them the step's, by kind: how many, and of what types."""
    model_config, parallel_config = ModelConfig(**shape), ParallelConfig(**{**ON_THE_CPU, **settings})
    fabric, sharding = parallel.launch(parallel_config, model_config, [])
    model = parallel.unwrap(parallel.build(fabric, model_config, parallel_config, seed=7))
    tokens = torch.arange(17)[None]
    exchanges = []
    types: dict[str, set[str]] = {}
    for micro_step in range(3):
        before_micro_step(model, sharding, last=micro_step == 2)
        with Exchanges() as seen:
            model(tokens[:, :-1], tokens[:, 1:]).backward()
        exchanges.append({kind: len(of_kind) for kind, of_kind in seen.types.items()})
        for kind, of_kind in seen.types.items():
            types.setdefault(kind, set()).update(of_kind)
    write(out, {"exchanges": exchanges, "types": {kind: sorted(found) for kind, found in types.items()}})


def trained(settings: Config) -> None:
    """A whole run, as `pretrain train` makes it."""
    assert trainer.train(preparation.prepare(settings)) == 0


def stepped(out: Path, settings: Config) -> None:
    """The steps of a run, and nothing besides."""
    run = preparation.prepare(settings)
    micro_batches = trainer.make_loader(run)
    results = [trainer.optimizer_step(run, micro_batches) for _ in range(run.config.train.max_steps)]
    losses = all_reduce_sum(torch.stack([r.loss for r in results])) / run.fabric.world_size
    norms = [r.grad_norm.item() for r in results]
    write(out, {"losses": losses.tolist(), "grad_norms": norms}, whole(parallel.unwrap(run.model)))
    run.at_end.close()


def resharded(shape: dict, settings: dict, folders: list[Path]) -> None:
    """Load checkpoints into a model and an optimizer that lie otherwise; every rank must then hold its part of them."""
    model_config, parallel_config = ModelConfig(**shape), ParallelConfig(**ON_THE_CPU, **settings)
    fabric, _ = parallel.launch(parallel_config, model_config, [])
    model = parallel.unwrap(parallel.build(fabric, model_config, parallel_config, seed=8))
    optimizer = make_optimizer(model, OptimConfig())
    for folder in folders:
        tensors = checkpoint.tensors_of(model, optimizer)
        for tensor in tensors.values():
            tensor.fill_(-1.0)
        checkpoint.load(folder, model, optimizer)
        saved = load_tensors(folder)
        assert saved.keys() == tensors.keys()
        for name, tensor in tensors.items():
            expected = saved[name]
            if isinstance(tensor, DTensor):
                expected = distribute_tensor(expected, tensor.device_mesh, tensor.placements, src_data_rank=None)
            assert torch.equal(local(tensor), local(expected)), f"{name} of {folder}"


load_tensors = functools.cache(checkpoint.load_tensors)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters, gathered."""
    return {n: p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for n, p in model.named_parameters()}


def write(out: Path, facts: dict, weights: dict[str, torch.Tensor] | None = None) -> None:
    """By rank 0, for the test to read."""
    if rank() == 0:
        out.mkdir()
        torch.save(weights, out / "weights.pt")
        (out / "facts.json").write_text(json.dumps(facts))


JOBS = {
    "built": built,
    "counted": counted,
    "trained": trained,
    "stepped": stepped,
    "resharded": resharded,
    "unlike": unlike,
}


def be_rank(number: int, world_size: int, node_size: int, jobs: list[list], start: Connection) -> None:
    """What torchrun would set, then the jobs."""
    os.environ.update(RANK=str(number), WORLD_SIZE=str(world_size), LOCAL_RANK=str(number % node_size))
    os.environ.update(LOCAL_WORLD_SIZE=str(node_size), GROUP_RANK=str(number // node_size), MASTER_ADDR="127.0.0.1")
    os.environ.update(TORCHELASTIC_RUN_ID="test", TORCHELASTIC_USE_AGENT_STORE="True", MASTER_PORT=str(start.recv()))
    for name, *arguments in jobs:
        JOBS[name](*arguments)
    parallel.leave()


def main(worlds: list[tuple[int, int, list]]) -> None:
    """One world after the other, each (ranks, ranks a node, jobs); a rank that fails ends everything."""
    for size, node_size, jobs in worlds:
        pipes = [FORK.Pipe() for _ in range(size)]
        ranks = [
            FORK.Process(target=be_rank, args=(number, size, node_size, jobs, pipes[number][1]))
            for number in range(size)
        ]
        for process in ranks:
            process.start()
        # After the forks: it has a thread.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for pipe, _ in pipes:
            pipe.send(store.port)
        while any(process.is_alive() for process in ranks):
            if any(process.exitcode for process in ranks):
                codes = [process.exitcode for process in ranks]
                for process in ranks:
                    process.kill()  # it would wait for the one that failed
                sys.exit(f"world of {size}: exit codes {codes}")
            time.sleep(0.01)
        if any(process.exitcode for process in ranks):
            sys.exit(f"world of {size}: exit codes {[process.exitcode for process in ranks]}")
        del store  # before the next forks


if __name__ == "__main__":
    gc.freeze()  # what the ranks share is not looked at again, in none of them
    torch.set_num_threads(1)
    main(pickle.loads(Path(sys.argv[1]).read_bytes()))
