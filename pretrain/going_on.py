"""What a run goes on from: its newest whole checkpoint, or --resume; or only weights, by --init_from.

Config, sources, mixture ─> facts ──────────┐ the same run?
run folder ─> newest whole checkpoint ─> choose ─> folder, the same on all ranks, or None
--init_from ─> the same shape, the same tokens? ─> weights into the model, sharded as it is
"""

from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import nn

from data_prep.shard import TOKENIZER_DIR
from pretrain import checkpoint, config, data, hf, scheduler
from pretrain.model import fill
from pretrain.reading import read_tokenizer
from pretrain.versions import RUN_PACKAGES, versions


def facts(settings: config.Config, sources: list[data.Source], mixture: data.Mixture) -> dict[str, dict[str, Any]]:
    """What must be the same when a run goes on: the model's shape, and what the order of the data depends on.

    Kept in each checkpoint's state.json.
    """
    return {
        "model": settings.model.shape(),
        "data": {
            "tokenizer": _tokenizer(sources),
            "seed": settings.seed,
            "seq_len": settings.data.seq_len,
            "global_batch_size": settings.train.global_batch_size,
            "manifests": [source.train.manifest.fingerprint for source in sources],
            "mixture": [[stage.first_step, *map(str, stage.shares)] for stage in mixture.stages],
        },
    }


def _tokenizer(sources: list[data.Source]) -> str:
    return sources[0].train.manifest.tokenizer.fingerprint  # all have the same one, see data.open_sources


_SINCE = ("tokenizer",)
"""Facts that checkpoints of earlier versions do not hold."""

_CONSEQUENCES = {
    "tokenizer": "the ids would mean other words than those that the weights know",
    "seed": "every later step would hold other sequences, and some would be seen twice and others not at all",
    "seq_len": "the sequences would be cut in other places",
    "global_batch_size": "step k would mean another place in the data, and the schedule would not fit",
    "manifests": "the shards are not those that were trained on: sequences would be seen twice or not at all",
    "mixture": "the shares of the sources would change, also for steps that lie behind",
}


def choose(
    run_dir: Path, settings: config.Config, now: dict[str, dict[str, Any]], sources: list[data.Source], say: Any
) -> Path | None:
    """The checkpoint to go on from, the same on all ranks: --resume, or the newest whole one of `run_dir`, or None.

    now: see `facts`.

    Raises:
        ValueError: --resume is not whole, the checkpoint lies behind the run's end, or is of another run than `now`.
    """
    found = checkpoint.find(run_dir, warn=say, needed=settings.resume is None)
    if settings.resume is not None and not _went_back(found, settings.resume):
        found = Path(settings.resume)
        problem = checkpoint.verify_together(found)
        if problem is not None:
            raise ValueError(f"--resume {found} is not a whole checkpoint: {problem}")
    if found is None:
        return None
    before = checkpoint.read_state(found)
    others = _other_versions(before.get("versions", {}))
    if others:
        say(f"{found.name} was written with other versions: {others}; figures may differ in their last digits")
    if before["step"] > settings.train.max_steps:
        raise ValueError(
            f"{found} lies behind the end: train.max_steps is {settings.train.max_steps}. Give it at least {before['step']}, or "
            "take an earlier checkpoint with --resume, or begin a new run in another run_dir"
        )
    _check_same_run(found, before, now, settings, sources, say)
    return found


def _went_back(found: Path | None, resume: str) -> bool:
    """Whether the scheduler repeats a command with --resume that has saved since: the run goes on from there, not back again."""
    return found is not None and scheduler.repeated() and checkpoint.read_state(found).get("resume") == resume


def _other_versions(then: dict[str, str]) -> str:
    now = versions(*RUN_PACKAGES)
    return "; ".join(f"{name} {was}, now {now[name]}" for name, was in then.items() if now.get(name, was) != was)


def _check_same_run(
    found: Path,
    before: dict[str, Any],
    now: dict[str, dict[str, Any]],
    settings: config.Config,
    sources: list[data.Source],
    say: Any,
) -> None:
    for part, facts_now in now.items():
        for key, value in facts_now.items():
            was = before[part].get(key, value if key in _SINCE else None)
            if key == "mixture":  # stages that have not begun may change
                was, value = ([stage for stage in stages if stage[0] <= before["step"]] for stages in (was, value))
            if was == value:
                continue
            change = f"{found} was trained {_difference(part, key, was, value, sources)}"
            if part == "model":
                raise ValueError(f"{change}; the weights do not fit: give a new run another run_dir")
            if not settings.data.allow_change:
                raise ValueError(
                    f"{change}; {_CONSEQUENCES[key]}. Go back to that, or go on all the same with --data.allow_change true, or "
                    "begin a new run with --init_from and another run_dir"
                )
            say(f"allowed: {change}; {_CONSEQUENCES[key]}")


def _difference(part: str, key: str, was: Any, now: Any, sources: list[data.Source]) -> str:
    """What was, and what the configuration says: "with data seed = 1 and the configuration says 2"."""
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


def init_from(settings: config.Config, sources: list[data.Source], model: nn.Module, say: Any) -> None:
    """Take the weights of a Cria checkpoint or of a Hugging Face folder, --init_from, into the model, sharded as it is.

    Raises:
        FileNotFoundError, ValueError: there are none, or of another shape, or of other tokens without data.allow_change.
    """
    source = Path(str(settings.init_from))
    if (source / "manifest.json").is_file():
        problem = checkpoint.verify_together(source)
        if problem is not None:
            raise ValueError(f"--init_from {source} is not a whole checkpoint: {problem}")
        state = checkpoint.read_state(source)
        _check_shape(source, state["model"], settings.model)
        ours = _tokenizer(sources)
        _check_tokens(source, state["data"].get("tokenizer", ours) == ours, settings.data.allow_change, say)
        checkpoint.load_into(source, model)
        return
    weights = hf.Weights(source)
    _check_shape(source, weights.model.shape(), settings.model)
    if not (source / "tokenizer.json").is_file():
        say(f"{source} has no tokenizer.json: whether its ids mean what the shards' do could not be checked")
    else:
        same = _vocabulary(source) == _vocabulary(sources[0].train.directory / TOKENIZER_DIR)
        _check_tokens(source, same, settings.data.allow_change, say)
    for name, parameter in model.named_parameters():
        fill(parameter, weights[name].float())


def _check_shape(source: Path, found: dict[str, Any], expected: config.ModelConfig) -> None:
    free = {"max_position_embeddings"}  # no weight depends on it
    for key, value in expected.shape().items():
        if found.get(key) != value and key not in free:
            raise ValueError(
                f"--init_from {source} has {key} = {found.get(key)} and the configuration says model.{key} = {value}"
            )


def _check_tokens(source: Path, same: bool, allowed: bool, say: Any) -> None:
    if same:
        return
    change = (
        f"--init_from {source} was trained with another tokenizer than the shards are of; {_CONSEQUENCES['tokenizer']}"
    )
    if not allowed:
        raise ValueError(f"{change}. Prepare the data with its tokenizer, or go on with --data.allow_change true")
    say(f"allowed: {change}")


def _vocabulary(folder: Path) -> dict[str, int]:
    """Token -> id by a folder's tokenizer.json."""
    return read_tokenizer(folder / "tokenizer.json").get_vocab(with_added_tokens=True)
