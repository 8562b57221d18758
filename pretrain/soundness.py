"""Whether what the ranks hold can be trained on, and saved: every number finite, and replicas alike.

    checkpoint.tensors_of ─> problem: each tensor's largest magnitude; of replicas (hybrid), each shard's sum of bits ─> a line

A weight that is broken, by a GPU that computes wrongly or by a step that should not have been taken, spoils every later step and
shows in no loss at once. What is saved is looked at first: it would push out the checkpoints from before.
"""

from collections import Counter
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from pretrain import ranks
from pretrain.hosts import this_host


def problem(tensors: dict[str, Tensor]) -> str | None:
    """What is wrong with `tensors` (any shapes, fp32; sharded ones as DTensors), by name and rank, the same on all ranks.

    None where nothing is. Called by all ranks; waits for the device. So do both of its parts.
    """
    return not_finite(tensors) or unlike_replicas(tensors)


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The first tensor that holds a number that is not finite, and whose it is."""
    # A rank may hold no row.
    held = {name: part for name, tensor in tensors.items() if (part := _local(tensor)).numel()}
    broken = []
    if held:
        largest = torch.stack(torch._foreach_norm(list(held.values()), torch.inf))
        broken = [name for name, finite in zip(held, largest.isfinite().tolist()) if not finite]
    found = ranks.gather((this_host(), broken[:1], len(broken)))
    for number, (host, first, count) in enumerate(found):
        if first:
            more = f" and {count - 1} more" if count > 1 else ""
            return f"{first[0]}{more} of rank {number} on {host} {'are' if more else 'is'} not finite"
    return None


def unlike_replicas(tensors: dict[str, Tensor]) -> str | None:
    """Replicas exchange gradients alone: once they differ, they stay different, and a checkpoint would be made of both."""
    meshes = [tensor.device_mesh for tensor in tensors.values() if isinstance(tensor, DTensor)]
    if not meshes or meshes[0].ndim < 2:
        return None
    names = list(tensors)
    sums = torch.stack([_local(tensor).view(torch.int32).sum(dtype=torch.int32) for tensor in tensors.values()])
    sums = sums.to(torch.int64)  # of 32 bits they wrap; summed as 64, each tensor would be copied at twice its size
    unlike = [name for name, differs in zip(names, _differ(sums.to(meshes[0].device_type), meshes[0])) if differs]
    shard = meshes[0].get_local_rank("shard")
    found = ranks.gather((this_host(), shard, unlike[:1], int(sums[names.index(unlike[0])]) if unlike else 0))
    for _, shard, first, _ in found:
        if first:
            return _who_differs(first[0], {n: (h, bits) for n, (h, s, f, bits) in enumerate(found) if s == shard and f})
    return None


def _differ(sums: Tensor, mesh: DeviceMesh) -> list[bool]:
    """Of which of this shard's sums, (n,) int64, the replicas have different ones."""
    largest = torch.cat((sums, -sums))
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=mesh.get_group("replicate"))
    most, least = largest.chunk(2)
    return (most != -least).tolist()


def _who_differs(name: str, replicas: dict[int, tuple[str, int]]) -> str:
    """replicas: rank -> host and the sum of the tensor's bits, of all that hold the same shard."""
    ((usual, number), *_) = Counter(bits for _, bits in replicas.values()).most_common()
    others = {rank: host for rank, (host, bits) in replicas.items() if bits != usual}
    if 2 * number > len(replicas):
        return f"{name} of {_in_words(others.items())} differs from that of the {number} other replicas: it computes wrongly"
    hosts = ((rank, host) for rank, (host, _) in replicas.items())
    return f"{name} differs between the replicas {_in_words(hosts)}: one of them computes wrongly"


def _in_words(hosts: Iterable[tuple[int, str]]) -> str:
    return ", ".join(f"rank {rank} on {host}" for rank, host in hosts)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
