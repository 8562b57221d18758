"""Which rank was first, and the page that says so: crash-report.txt.

    what each rank's watcher saw (`Rank`) ─> first_cause ─> Cause ─> page ─> RUN_DIR/crash-report.txt

Most of what is printed when a run ends badly are consequences: one rank raises ValueError, and all the others find their
connections closed. The cause is the earliest failure that is no consequence. Nothing here touches a process or a socket.
"""

import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain import stuck
from pretrain.slots import slots_of_rank

REPORT = "crash-report.txt"
STACKS = "crash-stacks.txt"
UNKNOWN_HOST = "?"
"""Of a rank that never said where it is."""

_CONSEQUENCE = re.compile(
    r"DistBackendError|DistNetworkError|DistStoreError|Connection (reset|closed|refused)|connection (was )?closed by peer|"
    r"Broken pipe|gloo|NCCL|ProcessGroup|[Tt]imed out waiting"
)
"""What a collective says when another rank is gone (class name and message of the exception)."""
_OUT_OF_MEMORY = re.compile(r"[Oo]ut ?[Oo]f ?[Mm]emory")
_FAILING = re.compile(r"unhandled cuda error|UnhandledCudaError|Cuda failure|CUDA error")
"""What CUDA and NCCL say when a GPU fails."""
_OF_THE_PROGRAM = re.compile(rf"{_OUT_OF_MEMORY.pattern}|device-side assert")
"""What CUDA says, too, when it is not the GPU's doing."""
_OWN = re.compile(rf"{_FAILING.pattern}|ncclInvalid|{_OUT_OF_MEMORY.pattern}")
"""What a collective says when it is this rank's GPU that failed, or its own arguments."""


@dataclass
class Rank:
    """What is known of a rank. Seconds are of one clock: that of the process which collects."""

    number: int
    host: str = UNKNOWN_HOST
    pid: int = 0
    place: str = "starting"
    """Where in the loop it is."""
    step: int | None = None
    """The optimizer step that it works on, counted from 1."""
    beats: int = 0
    """Places that it has come to; all ranks come to the same ones, so who has the fewest is behind."""
    age_s: float = 0.0
    """How long it has been at this place, by its own host's clock (seconds)."""
    limit_s: float = 0.0
    """How long it may be (seconds); 0: as long as it likes."""
    state: str = ""
    """Of the process, by the kernel: R runs, S sleeps, D waits for a disk or file system, T is stopped."""
    error: str | None = None
    """The exception that ended it: class and message."""
    trace: str = ""
    """The exception's traceback."""
    refused: bool = False
    """The exception is something that the user can mend, found before the first step."""
    ended_at_s: float | None = None
    """When it failed or was gone."""
    gone: str | None = None
    """How it ended without an exception."""
    left: bool = False
    """It ended well."""
    unwatched: bool = False
    """Nothing is known of it: its watcher did not come, or is gone while the rank goes on."""
    stacks: str = ""
    """Stacks of its threads."""
    collectives: dict[str, dict[str, Any]] | None = None
    """Its groups and their collectives (`collectives.recorded`); None where it did not say."""

    @property
    def name(self) -> str:
        """For a sentence."""
        return f"rank {self.number} on {self.host}"


@dataclass(frozen=True)
class Cause:
    """What came first."""

    kind: str
    """"failed" (an exception), "died" (without one), "hangs" """
    ranks: list[Rank]
    """Whose doing it is; empty: all ranks wait at one place, and none stands out."""
    line: str
    """All of it in a sentence."""
    advice: str
    machine: bool = False
    """Whether it may be the machine's doing: a rank died or hangs, or its GPU failed; not for what the program raised."""


def overdue(ranks: list[Rank]) -> bool:
    """Whether all that are furthest behind have been where they are for longer than they may.

    A rank that waits for one that still makes progress does not hang, however long it waits; nor is there an alarm when a rank
    that is behind has only just come to its place.
    """
    behind = _behind([rank for rank in ranks if not (rank.left or rank.unwatched)])
    return bool(behind) and all(0 < rank.limit_s < rank.age_s for rank in behind)


def _behind(ranks: list[Rank]) -> list[Rank]:
    fewest = min((rank.beats for rank in ranks), default=0)
    return [rank for rank in ranks if rank.beats == fewest]


def is_consequence(rank: Rank) -> bool:
    """Whether its exception is that of a collective that lost another rank."""
    return rank.error is not None and bool(_CONSEQUENCE.search(rank.error)) and not _OWN.search(rank.error)


def was_aborted(rank: Rank) -> bool:
    """Whether C code ended it: so NCCL does where a connection breaks, which under gloo is an exception, and so does CUDA."""
    return rank.error is None and rank.gone is not None and "Fatal Python error: Aborted" in rank.stacks


def first_cause(ranks: list[Rank]) -> Cause:
    """Name what was first: an exception of one's own or a death, by time; else who hangs."""
    ended = sorted((rank for rank in ranks if rank.ended_at_s is not None), key=lambda rank: rank.ended_at_s or 0.0)
    own = [rank for rank in ended if not is_consequence(rank)]
    if len(ended) == len(ranks) > 1 and all(was_aborted(rank) for rank in own):
        # Every rank lost another one: a link broke, and the first to see it is next to it.
        rank = ended[0]
        how = rank.error or "it was aborted, and its log says by what"
        return Cause("failed", [rank], f"{rank.name} lost another rank first: {how}", _ADVICE["link"])
    if own:
        rank = own[0]
        if rank.error is not None:
            advice = _ADVICE["memory" if _OUT_OF_MEMORY.search(rank.error) else "failed"]
            machine = bool(_FAILING.search(rank.error)) and not _OF_THE_PROGRAM.search(rank.error)
            return Cause("failed", [rank], f"{rank.name} failed first: {rank.error}", advice, machine)
        advice = _ADVICE["aborted" if was_aborted(rank) else "died"]
        return Cause("died", [rank], f"{rank.name} is gone: {rank.gone}", advice, machine=True)
    going_on = [rank for rank in ranks if rank.ended_at_s is None and not (rank.left or rank.unwatched)]
    if ended and all(not 0 < rank.limit_s < rank.age_s for rank in _behind(going_on)):
        return Cause("failed", ended[:1], f"{ended[0].name} lost another rank first: {ended[0].error}", _ADVICE["link"])
    return _name_hanging(going_on)


def _name_hanging(ranks: list[Rank]) -> Cause:
    """Who keeps the others waiting: who is behind; of these who is stopped; of these who does not wait for another rank."""
    hanging = _behind(ranks)
    stopped = [rank for rank in hanging if rank.state[:1] in ("T", "t", "D")]
    working = [rank for rank in hanging if not waits_for_others(rank.stacks)]
    hanging = stopped or working or hanging
    first = hanging[0]
    if len(hanging) == len(ranks) > 1:
        return _name_in_a_collective(ranks)
    places = "; ".join(f"{rank.name} hangs at {rank.place!r}{_how(rank)}" for rank in hanging[:4])
    more = f" and {len(hanging) - 4} more" if len(hanging) > 4 else ""
    line = f"{places}{more} for {first.age_s:.1f} s (limit {first.limit_s:g} s)"
    advice = "stopped" if stopped else "data" if first.place == "waiting for data" else "hangs"
    return Cause("hangs", hanging, line, _ADVICE[advice], machine=True)


def _name_in_a_collective(ranks: list[Rank]) -> Cause:
    """All wait in one place, for each other or for the devices: what PyTorch recorded may say for whom."""
    first = ranks[0]
    where = f"all {len(ranks)} ranks have been at {first.place!r} for {first.age_s:.1f} s (limit {first.limit_s:g} s)"
    records = {rank.number: rank.collectives for rank in ranks if rank.collectives is not None}
    numbers, what = stuck.compare(records)
    named, advice = [rank for rank in ranks if rank.number in numbers], _ADVICE["collective" if what else "all"]
    what = what or "none stands out: a collective or the devices do not come back"
    return Cause("hangs", named, f"{where}; {what}", advice, machine=bool(named))


def _how(rank: Rank) -> str:
    words = {
        "T": ", stopped by a signal,",
        "t": ", held by a debugger,",
        "D": ", waiting inside the kernel for a file system,",
    }
    return words.get(rank.state[:1], "")


def waits_for_others(stacks: str) -> bool:
    """Whether a thread of the rank, by its stack, is inside a collective; False where there is no stack.

    Any thread: the main one may wait for the thread that saves, and that one for other ranks.
    """
    threads = re.split(r"^(?:Current thread|Thread) .*$", stacks, flags=re.MULTILINE)[1:]
    return any(_COLLECTIVE.search(line) for thread in threads for line in thread.strip().splitlines()[:4])


_COLLECTIVE = re.compile(
    r"torch/distributed/(distributed_c10d|_functional_collectives|fsdp/_fully_shard/_fsdp_\w+)\.py"
)

_AGAIN = "The same command, without --resume, goes on from the newest checkpoint."
_ADVICE = {
    "failed": "Mend what the exception names.",
    "memory": (
        "A smaller train.micro_batch_size takes less, and so do parallel.recompute mlp and parallel.activation_checkpointing; "
        "pretrain plan says what fits."
    ),
    "died": (
        "A process that goes without a word was killed: look on its host for the out-of-memory killer (dmesg), for what the "
        "scheduler did (sacct, scancel), and for a crash in C code below."
    ),
    "aborted": (
        "C code ended it: the rank's log says which error of CUDA's or NCCL's it met. pretrain doctor measures the devices and "
        "the links."
    ),
    "link": (
        "No rank failed by itself: a connection between hosts broke; NCCL's own words are in the ranks' logs. pretrain doctor "
        "measures the links; sbatch --exclude=HOST leaves a host out."
    ),
    "data": (
        "The stacks of the loader's threads, below, say what they wait for: most often the file system of the shards on that "
        "host. pretrain doctor reads from every host."
    ),
    "stopped": (
        "Something stopped that process or its file system does not answer: look at the host. sbatch --exclude=HOST leaves it "
        "out."
    ),
    "hangs": (
        "The stack below is where it was. If that place can rightly take longer, raise watchdog.limit_s (or "
        "watchdog.first_step_limit_s before the first step is done)."
    ),
    "collective": (
        "Whoever is waited for has a GPU, or a link to the others, that stands still: pretrain doctor measures both. Ranks that "
        "called different collectives do not run the same code. If it can rightly take longer, raise watchdog.limit_s."
    ),
    "all": (
        "All ranks wait in the same place, so it is the network or a device: pretrain doctor measures both. If that place can "
        "rightly take longer, raise watchdog.limit_s."
    ),
}


@dataclass(frozen=True)
class Facts:
    """What the page says of the run besides."""

    run_dir: str
    micro_batch_size: int
    """Sequences a rank takes in one forward."""
    global_batch_size: int
    """Sequences an optimizer step takes."""
    versions: dict[str, str] = field(default_factory=dict)


def page(cause: Cause, ranks: list[Rank], facts: Facts) -> str:
    """The report: what, where, on which data, with which versions, what to do."""
    rows: list[tuple[str, str]] = [("what", cause.line), ("what to do", f"{cause.advice} {_AGAIN}")]
    rows += [("run", f"{facts.run_dir}, {len(ranks)} ranks"), ("data", _data(cause, ranks, facts))]
    rows += [("versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items()))]
    text = [f"Cria's crash report of {time.strftime('%Y-%m-%d %H:%M:%S %z')}", ""]
    text += [f"{name:<12}{words}" for name, words in rows]
    text += ["", "ranks", *_rank_lines(cause, ranks)]
    if cause.ranks:
        rank = cause.ranks[0]
        text += ["", f"where {rank.name} was (more in {STACKS})", *_shortened(rank.trace or rank.stacks, 60)]
    text += ["", "the last metrics", *(line[:300] for line in last_lines(Path(facts.run_dir) / "metrics.jsonl", 3))]
    return "\n".join(text) + "\n"


def all_stacks(ranks: list[Rank]) -> str:
    """Every rank's traceback or stacks, whole."""
    return "\n".join(f"=== {rank.name}, {rank.place}\n{rank.trace}{rank.stacks}" for rank in ranks)


def _data(cause: Cause, ranks: list[Rank], facts: Facts) -> str:
    """The command that shows the documents, and which slots of the step were this rank's."""
    steps = [rank.step for rank in cause.ranks or ranks if rank.step]
    if not steps:
        return "none yet: it was before this start's first step"
    words = f"step {steps[0]}; its documents: pretrain order --config {facts.run_dir}/config.yaml --step {steps[0]}"
    B = facts.micro_batch_size
    if cause.ranks:
        rank = cause.ranks[0]
        mine = slots_of_rank(rank.number, len(ranks), steps[0], B, facts.global_batch_size)
        shown = ", ".join(f"{part[0]}-{part[-1]}" if B > 1 else f"{part[0]}" for part in mine[:8])
        words += f"   (rank {rank.number}: slots {shown}{', ...' if len(mine) > 8 else ''})"
    return words


def _rank_lines(cause: Cause, ranks: list[Rank], most: int = 24) -> list[str]:
    """A line a rank: the named ones first, then those that ended, then the rest."""
    order = sorted(ranks, key=lambda r: (r not in cause.ranks, r.ended_at_s is None, r.ended_at_s or 0.0, r.number))
    lines = []
    for rank in order[:most]:
        how = "ended well" if rank.left else "not watched" if rank.unwatched else f"for {rank.age_s:.1f} s{_how(rank)}"
        how = rank.error or rank.gone or how
        after = " (a consequence)" if is_consequence(rank) and rank not in cause.ranks else ""
        lines.append(f"  rank {rank.number:<5}{rank.host:<20} process {rank.pid:<9}{rank.place}; {how[:200]}{after}")
    return lines + ([f"  ... and {len(order) - most} more"] if len(order) > most else [])


def _shortened(text: str, most: int) -> list[str]:
    lines = text.strip().splitlines() or ["no stack: the process did not answer"]
    return [
        "  " + line
        for line in (lines if len(lines) <= most else [*lines[:most], f"... {len(lines) - most} lines more"])
    ]


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a text file; nothing where it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 2**16))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []


def publish(folder: Path, name: str, text: str) -> None:
    """Write a file that is there whole or not at all; one of an earlier crash is replaced."""
    staged = folder / f".{name}.{os.getpid()}.tmp"
    staged.write_text(text)
    os.replace(staged, folder / name)


def from_message(rank: Rank, message: dict[str, Any], now_s: float) -> None:
    """Take what a rank's watcher sent into `rank`; `ago_s` in a message tells when it was, without a common clock.

    Once its stacks are there, only an end is news: a stopped process was let go on for them.
    """
    if rank.stacks and not rank.ended_at_s and not {"ago_s", "left", "collectives"} & set(message):
        return
    for name in ("host", "pid", "place", "step", "beats", "age_s", "limit_s", "state", "error", "trace", "refused"):
        if name in message:
            setattr(rank, name, message[name])
    rank.gone = message.get("gone", rank.gone)
    rank.left = message.get("left", rank.left)
    rank.stacks = message.get("stacks", rank.stacks)
    rank.collectives = message.get("collectives", rank.collectives)
    if "ago_s" in message and rank.ended_at_s is None:
        rank.ended_at_s = now_s - message["ago_s"]
