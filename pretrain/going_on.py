"""What a run goes on from: its newest whole checkpoint, or --resume; or only weights, by --init_from.

Config, sources, mixture ─> facts ──────────┐ the same run?
run folder ─> newest whole checkpoint ─> choose ─> folder, the same on all ranks, or None
back.json ─> --resume of an earlier start that has saved nothing yet
"""

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

from pretrain import back, checkpoint, config, data, ranks, retention, scheduler
from pretrain.back import Back
from pretrain.versions import run_versions


def facts(settings: config.Config, sources: list[data.Source], mixture: data.Mixture) -> dict[str, dict[str, Any]]:
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
        },
        "validation": {s.name: s.validation.manifest.fingerprint for s in sources if s.validation is not None},
    }


def tokenizer_of(sources: list[data.Source]) -> str:
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
}


def choose(
    run_dir: Path, settings: config.Config, now: dict[str, dict[str, Any]], sources: list[data.Source], say: Any
) -> Path | None:
    """The checkpoint to go on from, the same on all ranks: --resume, or the newest whole one of `run_dir`, or None.

    now: see `facts`.

    Raises:
        ValueError: --resume is not whole, the checkpoint lies behind the run's end, or is of another run than `now`.
        OSError: --resume is not there, or the run has had checkpoints and has none any more.
    """
    begun = ranks.on_rank_0(lambda: _begun_to_go_back(run_dir, say))
    asked_for = ranks.on_rank_0(lambda: settings.resume is not None and os.path.exists(settings.resume))
    newest = checkpoint.find(run_dir, warn=say, needed=settings.resume is None and begun is None)
    if asked_for and not ranks.on_rank_0(lambda: os.path.exists(str(settings.resume))):
        raise ValueError(
            f"--resume {settings.resume} is corrupt, as said above, and has been set aside: name another one"
        )
    sent_back = _going_back(run_dir, settings.resume, begun, newest, say)
    found = sent_back or newest
    if found is None:
        if ranks.on_rank_0(lambda: scheduler.has_saved(run_dir)):
            raise FileNotFoundError(
                f"{run_dir} has had checkpoints and there is none now: bring {run_dir / 'checkpoints'} back, name one with "
                f"--resume, or begin anew in another run_dir (or in this one, without its {scheduler.RECORD})"
            )
        say(f"a new run begins in {run_dir.resolve()}")
        return None
    before = checkpoint.read_state(found)
    _say_differences(found, before, now, say)
    if before["step"] > settings.train.max_steps:
        raise ValueError(
            f"{found} lies behind the end: train.max_steps is {settings.train.max_steps}. Give it at least {before['step']}, or "
            "take an earlier checkpoint with --resume, or begin a new run in another run_dir"
        )
    _check_same_run(found, before, now, settings, sources, say)
    if sent_back is not None:
        ranks.on_rank_0(lambda: _note(run_dir, sent_back, before["step"], newest))
    return found


def _begun_to_go_back(run_dir: Path, say: Any) -> Back | None:
    """Where an earlier start was sent back to; None where the run was not, or has saved since."""
    sent = back.read(run_dir)
    if sent is None or not retention.leave_behind(run_dir, sent, say):
        return sent
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


def _going_back(run_dir: Path, resume: str | None, begun: Back | None, newest: Path | None, say: Any) -> Path | None:
    """The checkpoint that the run is sent back to, whole, or None: it goes on from the newest.

    What lies after it is no part of the run any more, but stays the newest until the run has saved: `begun`, of an earlier
    start, is in back.json until then. A scheduler that repeats a command with --resume goes on from what the job has saved since.
    """
    last = None if newest is None else checkpoint.read_state(newest)
    if last is not None and resume is not None and begun is None:
        its_own = (last["config"]["resume"], last["job"]) == (resume, scheduler.job())
        if its_own and scheduler.repeated():
            say(f"this job has gone back to {resume} before and has saved since: it goes on from there")
            return None
    before = None if begun is None else str(run_dir / begun.resume)
    if resume is None and before is not None:
        instead = f" To go on from {newest} instead, name it with --resume" if newest is not None else ""
        say(f"an earlier start was sent back to {before} and has saved nothing since: this one begins there.{instead}")
    to = resume or before
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


def _say_differences(found: Path, before: dict[str, Any], now: dict[str, dict[str, Any]], say: Any) -> None:
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
    found: Path,
    before: dict[str, Any],
    now: dict[str, dict[str, Any]],
    settings: config.Config,
    sources: list[data.Source],
    say: Any,
) -> None:
    step = before["step"]
    before, now = ({"model": facts["model"], "data": _begun(facts["data"], step)} for facts in (before, now))
    for part, facts_now in now.items():
        for key, value in facts_now.items():
            was = before[part].get(key)
            if was == value:
                continue
            change = f"{found} was trained {_difference(part, key, was, value, sources)}"
            if part == "model":
                raise ValueError(f"{change}; the weights do not fit: give a new run another run_dir")
            if not settings.data.allow_change:
                raise ValueError(
                    f"{change}; {CONSEQUENCES[key]}. Go back to that, or go on all the same with --data.allow_change true, or "
                    "begin a new run with --init_from and another run_dir"
                )
            say(f"allowed: {change}; {CONSEQUENCES[key]}")


def _begun(facts: dict[str, Any], step: int) -> dict[str, Any]:
    """What the first `step` steps hang on: later stages may change, and sources be added at the end that come in with them."""
    stages = [stage for stage in facts["mixture"] if stage[0] <= step]
    sources = len(facts["manifests"])
    while all(Fraction(stage[sources]) == 0 for stage in stages):  # stage[0] is its first step
        sources -= 1
    return {**facts, "manifests": facts["manifests"][:sources], "mixture": [stage[: sources + 1] for stage in stages]}


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
    return f"with {part} {key} = {was} and the configuration says {now}"


def _stages_in_words(stages: list[list[Any]], sources: list[data.Source]) -> str:
    return (
        ", ".join(
            f"{':'.join(str(round(100 * float(Fraction(share)), 2)) for share in shares)} from step {first}"
            for first, *shares in stages
        )
        + f" ({':'.join(source.name for source in sources)}, percent)"
    )
