"""What a run goes on from: its newest whole checkpoint, or --resume; or only weights, by --init_from.

Config, sources, mixture ─> facts ──────────┐ the same run?
run folder ─> newest whole checkpoint ─> choose ─> folder, the same on all ranks, or None
back.json ─> --resume of an earlier start that has saved nothing yet
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from pretrain import back, checkpoint, config, data, history, left_out, ranks, retention, scheduler
from pretrain.back import Back
from pretrain.mixture import Mixture
from pretrain.sections import StepRange, unlike
from pretrain.versions import run_versions

Say = Callable[[str], None]


def facts(
    settings: config.Config, sources: list[data.Source], sets: data.Sets, mixture: Mixture
) -> dict[str, dict[str, Any]]:
    """What must be the same when a run goes on: the model's shape, and what the order of the data depends on.

    Kept in each checkpoint's state.json, with what is validated on, which may be another.
    """
    return {
        "model": settings.model.shape(),
        "data": {
            "tokenizer": tokenizer_of(sources),
            "seed": settings.seed,
            "seq_len": settings.data.seq_len,
            "global_batch_size": settings.train.global_batch_size,
            "manifests": [source.train.manifest.fingerprint for source in sources],
            "mixture": [[stage.first_step, *map(str, stage.shares)] for stage in mixture.stages],
            "leave_out": left_out.merged(settings.train.leave_out),
        },
        "validation": {name: d.manifest.fingerprint for name, d in data.validated(sources, sets).items()},
    }


def tokenizer_of(sources: list[data.Source]) -> str:
    """The fingerprint of the tokenizer that the shards are of."""
    return sources[0].train.manifest.tokenizer.fingerprint  # all have the same one, see data.open_sources


CONSEQUENCES = {
    "tokenizer": "the ids would mean other words than those that the weights know",
    "seed": "every later step would hold other sequences, and some would be seen twice and others not at all",
    "seq_len": "the sequences would be cut in other places",
    "global_batch_size": (
        "step k would mean another place in the data, so that sequences would be seen twice or not at all, and the schedule "
        "would not fit"
    ),
    "manifests": "the shards are not those that were trained on: sequences would be seen twice or not at all",
    "mixture": (
        "the shares of the sources would change, also for steps that lie behind, so that sequences would be seen twice or not at "
        "all; data.stages changes them from a later step on, and nothing else"
    ),
    "leave_out": (
        "steps that lie behind were trained or left out already; for another choice --resume a checkpoint before them"
    ),
}


@dataclass(frozen=True)
class Found:
    """The checkpoint that a run goes on from."""

    folder: Path
    state: dict[str, Any]
    """Its state.json."""
    branches: bool
    """Whether the run begins here as a branch of another one, whose checkpoint this is."""

    @property
    def branched_from(self) -> str | None:
        """The checkpoint of another run that this one began at (path); None: it is no branch."""
        return str(self.folder.resolve()) if self.branches else self.state.get("branched_from")

    @property
    def branched_from_manifest(self) -> str | None:
        """The sha256 of that checkpoint's manifest, by which it is known wherever it is moved."""
        return _manifest(self.folder) if self.branches else self.state.get("branched_from_manifest")


def choose(
    run_dir: Path, settings: config.Config, now: dict[str, dict[str, Any]], sources: list[data.Source], say: Say
) -> Found | None:
    """The checkpoint to go on from, the same on all ranks: --resume, or the newest whole one of `run_dir`, or None.

    now: see `facts`.

    Raises:
        ValueError: --resume is not whole, the checkpoint lies behind the run's end, or is of another run than `now`; or it would
            begin a branch, and `run_dir` has checkpoints of its own, or the branch no step to train.
        OSError: --resume is not there, or the run has had checkpoints and has none any more.
    """
    unfinished = ranks.on_rank_0(lambda: _unfinished_return(run_dir, say))
    asked_for = ranks.on_rank_0(lambda: settings.resume is not None and os.path.exists(settings.resume))
    newest = checkpoint.find(run_dir, warn=say, or_none=settings.resume is not None or unfinished is not None)
    if asked_for and not ranks.on_rank_0(lambda: os.path.exists(str(settings.resume))):
        raise ValueError(
            f"--resume {settings.resume} is corrupt, as said above, and has been set aside: name another one"
        )
    sent_to = _where_sent_back(run_dir, settings.resume, unfinished, newest, say)
    folder = sent_to or newest
    branches = sent_to is not None and not ranks.on_rank_0(lambda: _is_of(sent_to, run_dir))
    if newest is None and unfinished is None and (folder is None or branches):
        ranks.on_rank_0(lambda: _check_never_saved(run_dir, sent_to))
    if newest is not None and unfinished is None and branches:
        raise ValueError(
            f"--resume {sent_to} is another run's and {run_dir} has checkpoints of its own, the newest {newest.name}: a branch "
            f"begins in another run_dir. If it is this run's after all, copy it into {run_dir / 'checkpoints'} first"
        )
    if folder is None:
        say(f"a new run begins in {run_dir.resolve()}")
        return None
    state = checkpoint.read_state(folder)
    _say_differences(folder, state, now, say)
    if state["step"] > settings.train.max_steps:
        raise ValueError(
            f"{folder} lies behind the end: train.max_steps is {settings.train.max_steps}. Give it at least {state['step']}, or "
            "take an earlier checkpoint with --resume, or begin a new run in another run_dir"
        )
    if branches and state["step"] >= settings.train.last_step:
        raise ValueError(
            f"--resume {folder} is after step {state['step']} and training ends after step {settings.train.last_step}: there is "
            "nothing for a branch to do; raise train.max_steps, or train.stop_after_step"
        )
    _check_same_run(folder, state, now, settings, sources, say)
    if sent_to is not None:
        ranks.on_rank_0(lambda: _note(run_dir, sent_to, state["step"], newest))
    return Found(folder, state, branches)


def _is_of(folder: Path, run_dir: Path) -> bool:
    """Whether a checkpoint is one of the run's own."""
    return os.path.realpath(folder.parent) == os.path.realpath(run_dir / "checkpoints")


def _check_never_saved(run_dir: Path, sent_to: Path | None) -> None:
    """Where a run has no checkpoint: FileNotFoundError if it has had some, and is not sent elsewhere than to where it began."""
    if not scheduler.has_saved(run_dir):
        return
    if sent_to is not None and _branched_from(run_dir) != str(sent_to.resolve()):
        return
    other = "" if sent_to else " name one of them with --resume,"
    raise FileNotFoundError(
        f"{run_dir} has had checkpoints and there is none now that can be taken: bring {run_dir / 'checkpoints'} back,{other} or "
        f"begin anew in another run_dir (or in this one, without its {scheduler.RECORD})"
    )


def _branched_from(run_dir: Path) -> str | None:
    """Where the run began as a branch, by its log alone."""
    with suppress(OSError, ValueError):
        return history.read(run_dir).about.get("branched_from")
    return None


def _unfinished_return(run_dir: Path, say: Say) -> Back | None:
    """Where an earlier start was sent back to; None where the run was not, or has saved since."""
    sent = back.read(run_dir)
    if sent is None or not retention.saved_since(run_dir, sent):
        return sent
    retention.set_aside_what_was_left(run_dir, sent, say)
    try:  # it was killed before it did, or could not
        back.forget(run_dir)
    except OSError as error:
        say(f"{back.NAME} cannot be deleted, which does no harm: {error}")
    return None


def _note(run_dir: Path, to: Path, step: int, newest: Path | None) -> None:
    """Remember where the run is sent back to; with nothing that it leaves there is nothing to remember."""
    if newest is not None and os.path.samefile(to, newest):
        back.forget(run_dir)
        return
    place, base = Path(os.path.abspath(to)), os.path.abspath(run_dir)
    back.write(run_dir, Back(str(place.relative_to(base) if place.is_relative_to(base) else place), step))


def _where_sent_back(
    run_dir: Path, resume: str | None, unfinished: Back | None, newest: Path | None, say: Say
) -> Path | None:
    """The checkpoint that the run is sent back to, whole, or None: it goes on from the newest.

    What lies after it is no part of the run any more, but stays the newest until the run has saved: `unfinished`, of an earlier
    start, is in back.json until then.
    """
    if resume is not None and unfinished is None and newest is not None:
        last = checkpoint.read_state(newest)
        repeats_itself = (last["config"].get("resume"), last["job"]) == (resume, scheduler.job())
        if ranks.on_rank_0(lambda: _has_been_there(run_dir, resume, last, repeats_itself)):
            say(f"this run has begun at {resume}, or gone back to it, and has saved since: it goes on from there")
            return None
    earlier = None if unfinished is None else str(run_dir / unfinished.resume)
    if resume is None and earlier is not None:
        instead = f" To go on from {newest} instead, name it with --resume" if newest is not None else ""
        say(f"an earlier start was sent back to {earlier} and has saved nothing since: this one begins there.{instead}")
    to = resume or earlier
    if to is None:
        return None
    by = f"--resume {to}" if resume else f"{to}, to which the run was sent back (delete {back.NAME} to go on without),"
    if Path(os.path.abspath(to)).name.startswith("."):
        raise ValueError(f"{by} was never finished, or is being deleted: name another checkpoint")
    if not ranks.on_rank_0(lambda: os.path.exists(to)):  # its file system is away, and may come back
        raise FileNotFoundError(f"{by} is not there: name the folder of a checkpoint")
    problem = checkpoint.verify_together(Path(to))
    if problem is not None:
        raise ValueError(f"{by} is not a whole checkpoint: {problem}{checkpoint.hint(Path(to))}")
    return Path(to)


def _has_been_there(run_dir: Path, resume: str, last: dict[str, Any], repeats_itself: bool) -> bool:
    """Whether --resume only repeats what has been done: by a scheduler that repeats the job's command; or a branch, which begins
    once, while with one of the run's own checkpoints a person goes back each time. last: the newest checkpoint's state.
    """
    if scheduler.repeated() and repeats_itself:
        return True
    if _is_of(Path(resume), run_dir):
        return False
    origin = _manifest(Path(resume)) if os.path.exists(resume) else None
    moved = origin is not None and last.get("branched_from_manifest") == origin
    return moved or last.get("branched_from") == str(Path(resume).resolve())


def _manifest(folder: Path) -> str | None:
    with suppress(OSError):  # it is no checkpoint, or cannot be read now: it is verified later
        return str(checkpoint.describe(folder / "manifest.json")["sha256"])
    return None


def _say_differences(found: Path, before: dict[str, Any], now: dict[str, dict[str, Any]], say: Say) -> None:
    """What may change figures and is no reason not to go on."""
    versions = {name: (was, run_versions().get(name, was)) for name, was in before["versions"].items()}
    if others := "; ".join(f"{name} {was}, now {now}" for name, (was, now) in versions.items() if was != now):
        say(f"{found.name} was written with other versions: {others}; figures may differ in their last digits")
    if before["world_size"] != ranks.world_size():
        say(
            f"{found.name} was trained on {before['world_size']} ranks, now {ranks.world_size()}: sums are rounded in another "
            "order, and figures may differ in their last digits"
        )
    for name, was in before["validation"].items():
        if now["validation"].get(name, was) != was:
            say(f"the validation data of {name} is another than at {found.name}: its losses begin anew")


def _check_same_run(
    folder: Path,
    state: dict[str, Any],
    now: dict[str, dict[str, Any]],
    settings: config.Config,
    sources: list[data.Source],
    say: Say,
) -> None:
    """state: of the checkpoint in `folder`."""
    step = state["step"]
    for key, (was, value) in unlike(state["model"], now["model"]).items():
        change = f"{folder} was trained {_difference('model', key, was, value, sources)}"
        raise ValueError(f"{change}; the weights do not fit: give a new run another run_dir")
    was, is_now = facts_of_steps(state["data"], step), facts_of_steps(now["data"], step)
    for key, value in is_now.items():
        if was.get(key) == value:
            continue
        change = f"{folder} was trained {_difference('data', key, was.get(key), value, sources)}"
        if not settings.data.allow_change:
            raise ValueError(
                f"{change}; {CONSEQUENCES[key]}. Go back to that, or go on all the same with --data.allow_change true, or "
                "begin a new run with --init_from and another run_dir"
            )
        say(f"allowed: {change}; {CONSEQUENCES[key]}")


def facts_of_steps(facts: dict[str, Any], step: int) -> dict[str, Any]:
    """What the first `step` steps hang on: later stages and what is left out later may change, and sources be added at the end
    that come in with a stage.
    """
    stages = [stage for stage in facts["mixture"] if stage[0] <= step]
    sources = len(facts["manifests"])
    while all(Fraction(stage[sources]) == 0 for stage in stages):  # stage[0] is its first step
        sources -= 1
    return {
        **facts,
        "manifests": facts["manifests"][:sources],
        "mixture": [stage[: sources + 1] for stage in stages],
        "leave_out": [[first, min(last, step)] for first, last in facts.get("leave_out", []) if first <= step],
    }


def _difference(part: str, key: str, was: Any, now: Any, sources: list[data.Source]) -> str:
    """What was, and what the configuration says: "with data seed = 1 and the configuration says 2"."""
    if key == "manifests" and sorted(was) == sorted(now):
        return "with its sources in another order"
    if key == "manifests" and len(was) == len(now):
        changed = [f"{s.name} ({s.train.directory})" for s, a, b in zip(sources, was, now) if a != b]
        return f"on other shards of {' and '.join(changed)} than are there now"
    if key == "manifests":
        was, now = (f"{len(prints)} sources" for prints in (was, now))
    if key == "tokenizer":
        return f"with tokenizer {was} and the shards are of {now}"
    if key == "mixture":
        was, now = (_stages_in_words(stages, sources) for stages in (was, now))
    if key == "leave_out":
        was, now = (left_out.in_words([StepRange(*one) for one in ranges]) for ranges in (was, now))
        return f"with {was} left out and the configuration leaves out {now} of the steps until then"
    return f"with {part} {key} = {was} and the configuration says {now}"


def _stages_in_words(stages: list[list[Any]], sources: list[data.Source]) -> str:
    return (
        ", ".join(
            f"{':'.join(str(round(100 * float(Fraction(share)), 2)) for share in shares)} from step {first}"
            for first, *shares in stages
        )
        + f" ({':'.join(source.name for source in sources)}, percent)"
    )
