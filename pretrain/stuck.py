"""In which collective the ranks are stuck, and for whom: what `pretrain.collectives` recorded, compared. Standard library only.

    each rank: the first collective it called that has not come back ─> by group: who has come to it? ─> who is waited for

On a GPU a rank calls far ahead of what its GPU does, so only the first one tells where it is: those that it called after that
wait in its GPU's queue.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Group:
    """What one rank has of a group of ranks. Its collectives are numbered from 1, on each of its ranks alike."""

    ranks: list[int]
    """All that are in it."""
    description: str
    """What it was made for."""
    enqueued: int = 0
    """The last one that the rank called: on a GPU, put into its queue."""
    completed: int = 0
    """The last one that came back; it may be -1 before the first."""
    open: str = ""
    """The first that has not come back: what it does, and the shapes."""
    since_ns: int = 0
    """When that was called, by the rank's clock."""


@dataclass(frozen=True)
class _Wait:
    """A collective that ranks are in."""

    group: str
    number: int
    what: dict[int, str]
    """Rank that waits in it -> what it does there."""
    late: list[int]
    """Those that it waits for: they have not called it, or are in another one."""
    done: list[int]
    """Those on which it has come back."""

    @property
    def name(self) -> str:
        return f"{next(iter(self.what.values()))}, number {self.number} of {self.group}"


def compare(records: dict[int, dict[str, dict[str, Any]]]) -> tuple[list[int], str]:
    """The ranks that the others wait for, as far as it can be told, and a sentence; ([], "") where no collective is open.

    Args:
        records: rank -> name of a group -> the fields of its `Group`.
    """
    groups = {rank: {name: Group(**fields) for name, fields in record.items()} for rank, record in records.items()}
    at: dict[int, str] = {}
    for rank, mine in groups.items():
        if open_ones := [name for name, group in mine.items() if group.open]:
            at[rank] = min(open_ones, key=lambda name: mine[name].since_ns)
    waits = [_wait(name, groups, at) for name in sorted(set(at.values()))]

    for wait in waits:
        if missing := [rank for rank in wait.late if rank not in at]:
            others = _ranks(list(wait.what))
            return missing, f"{_ranks(missing)} did not come to {wait.name}, in which {others} wait{_s(wait.what)}"
    complete = [wait for wait in waits if not wait.late]
    if not complete:
        circle = "; ".join(f"{_ranks(list(w.what))} in {w.name}, for {_ranks(w.late)}" for w in waits[:4])
        return [], f"they wait for each other in different collectives: {circle}" if waits else ""
    for wait in complete:
        if len({what.partition("(")[0] for what in wait.what.values()}) > 1:
            calls = "; ".join(f"rank {rank}: {what}" for rank, what in list(wait.what.items())[:4])
            return [], f"they called different collectives as number {wait.number} of {wait.group}: {calls}"
        if wait.done:
            behind = list(wait.what)
            return behind, f"{wait.name} has come back on {_ranks(wait.done)} and not on {_ranks(behind)}"
    return [], "; ".join(f"{_ranks(list(wait.what))} wait{_s(wait.what)} in {wait.name}" for wait in complete[:4])


def _wait(name: str, groups: dict[int, dict[str, Group]], at: dict[int, str]) -> _Wait:
    """The group's first collective that a rank waits in. Of a rank that has said nothing, nothing is known."""
    waiting = {rank: groups[rank][name] for rank in at if at[rank] == name}
    number = max(0, min(group.completed for group in waiting.values())) + 1
    what = {rank: group.open for rank, group in waiting.items() if group.completed < number}
    any_of_them = next(iter(waiting.values()))
    others = [rank for rank in any_of_them.ranks if rank in groups and rank not in what]
    done = [rank for rank in others if name in groups[rank] and groups[rank][name].completed >= number]
    late = [rank for rank in others if rank not in done]
    return _Wait(f"{name} ({any_of_them.description})", number, what, late, done)


def _ranks(numbers: list[int], most: int = 8) -> str:
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, sorted(numbers)[:most]))}{more}"


def _s(numbers: dict[int, str]) -> str:
    return "s" if len(numbers) == 1 else ""
