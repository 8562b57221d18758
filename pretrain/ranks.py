"""How the ranks agree. Each function is called by all ranks and works alike where there is one process and no group."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

T = TypeVar("T")

JOIN_TIMEOUT = timedelta(minutes=10)
"""After so long a start is given up because not all ranks have come."""
TIMEOUT = timedelta(hours=1)
"""After so long a collective gives up on a rank that does not answer. The watchdog is sooner, and knows which rank it is; what
is rightly long on one rank, such as compiling, must not end the others."""


def be_patient(*groups: dist.ProcessGroup | None) -> None:
    """Let groups (None: that of all ranks) wait for TIMEOUT, which were made with JOIN_TIMEOUT or the library's limit."""
    for group in groups:
        _set_pg_timeout(TIMEOUT, group)


def rank() -> int:
    """The number of the process, 0 to world_size - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks; on the CPU, whatever becomes of the devices."""
    all_reduce_max(torch.zeros(()))


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Maximum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def means(values: list[float]) -> list[float]:
    """Each value's mean over the ranks, which have equally many. Added up in the ranks' order: what stands beside a value
    changes no bit of its mean.
    """
    if not dist.is_initialized():
        return values
    mine = torch.tensor(values, dtype=torch.float64)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return [sum(of_ranks) / len(parts) for of_ranks in zip(*(part.tolist() for part in parts))]


def broadcast(value: T) -> T:
    """Rank 0's value, which must be picklable."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_rank_0(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, which alone does it; must be picklable.

    Raises:
        OSError: on all ranks, where `work` raises one.
    """
    found, problem = None, None
    if rank() == 0:
        try:
            found = work()
        except OSError as error:
            problem = str(error)
    found, problem = broadcast((found, problem))
    if problem is not None:
        raise OSError(problem)
    return cast(T, found)


def everywhere(work: Callable[[], T]) -> T:
    """What `work`, which all ranks do, returns on this one.

    Raises:
        OSError: on all ranks, where `work` raises one on any.
    """
    found, problem = None, None
    try:
        found = work()
    except OSError as error:
        problem = str(error)
    problem = first_problem(problem)
    if problem is not None:
        raise OSError(problem)
    return cast(T, found)


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, in the order of the ranks; values must be picklable."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def first_problem(problem: str | None) -> str | None:
    """The first rank's problem that has one, the same for all ranks; None where none has."""
    for number, found in enumerate(gather(problem)):
        if found is not None:
            return found if world_size() == 1 else f"rank {number}: {found}"
    return None
