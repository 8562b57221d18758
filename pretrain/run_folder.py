"""A run's folder: one job at a time has it; what an export and a person need lies there beside the checkpoints.

RUN_DIR: config.yaml, the resolved configuration, and before-config.yaml.N, those before it; metrics.jsonl, the log;
operations.json, what each operation ran on; tokenizer/, that of the shards; checkpoints/ (see `checkpoint`); tensorboard/ and
wandb-id.txt (see `metrics`); verified.json, the shards that were found good (see `preparation`); restarts.json (see `scheduler`);
back.json (see `back`); crash-report.txt and crash-stacks.txt (see `crash`); .lock, who writes here.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data_prep.shard import write_atomically
from pretrain import checkpoint, config, ranks, scheduler
from pretrain.lock import Lock
from pretrain.optim import learning_rate
from pretrain.sections import OptimConfig

_SHARED_S = 60.0
"""How long a file of rank 0's may stay unseen by another rank, before run_dir is taken for two different folders (seconds)."""
_NO_CHANGE = ("run_dir", "resume", "init_from", "data.allow_change", "train.stop_after_step")
"""Keys that say where a run is and how it begins, and not what it is."""


@contextmanager
def enter(run_dir: Path) -> Iterator[None]:
    """Make the run's folder and lock it, so that no other job writes into it; where that fails, all ranks fail alike.

    Raises:
        OSError: another job has it, it cannot be made or locked, or the ranks see different ones.
    """
    with ExitStack() as until_the_end:

        def lock() -> str:
            run_dir.mkdir(parents=True, exist_ok=True)
            held = until_the_end.enter_context(closing(Lock(run_dir)))
            scheduler.note_start(run_dir, checkpoint.updates(run_dir))
            return held.mark

        try:
            mark = ranks.on_rank_0(lock)
            elsewhere = f"{run_dir} is not the same folder on this rank as on rank 0; it must be shared"
            if problem := ranks.first_problem(None if _sees(run_dir, mark) else elsewhere):
                raise OSError(problem)
        except OSError as error:
            raise OSError(f"run_dir: {error}") from None
        yield


def _sees(run_dir: Path, mark: str) -> bool:
    """Whether this rank reads rank 0's `mark` in the lock. An NFS client may for `_SHARED_S` remember that there was no file."""
    until = time.monotonic() + _SHARED_S
    while True:
        for folder in (run_dir.parent, run_dir):
            with suppress(OSError):  # one that may be entered and not listed
                os.listdir(folder)  # asks the server
        with suppress(OSError):
            if (run_dir / ".lock").read_text() == mark:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.5)


def fill(
    settings: config.Config,
    tokenizer: Path,
    operations: list[dict[str, Any]],
    before: dict[str, Any] | None,
    say: Callable[[str], None],
) -> None:
    """Put into the run's folder what an export and a person need besides the weights; called by rank 0.

    tokenizer: the folder of the one that the shards were made with. before: state.json of the checkpoint that the run goes on
    from. What has changed since is told to `say`.

    Raises:
        OSError: it could not.
    """
    run_dir = Path(settings.run_dir)
    for pattern in ("*.json", "*.yaml", "*.txt", "tokenizer/*"):
        for torn in run_dir.glob(f"{pattern}.*-????????.tmp"):  # of a killed start: see data_prep.staging.staged_path
            torn.unlink()
    _keep_config(settings, run_dir / "config.yaml", before, say)
    _keep_tokenizer(tokenizer, run_dir / "tokenizer")
    _keep_operations(operations, run_dir / "operations.json", before, say)


def _keep_tokenizer(source: Path, target: Path) -> None:
    """Copy what is not there yet. The data may be read-only, and the copy is not to be."""
    if not (source / "tokenizer.model").exists():
        (target / "tokenizer.model").unlink(missing_ok=True)  # of a tokenizer before: an export would take it first
    target.mkdir(exist_ok=True)
    for file in (entry for entry in source.iterdir() if entry.is_file()):
        content = file.read_bytes()
        copy = target / file.name
        if not copy.exists() or copy.read_bytes() != content:
            write_atomically(copy, content)


def _keep_operations(
    operations: list[dict[str, Any]], path: Path, before: dict[str, Any] | None, say: Callable[[str], None]
) -> None:
    if before is not None:
        was, now = ({one["operation"]: one["kernel"] for one in some} for some in (before["operations"], operations))
        changes = [f"{name}: {was.get(name)} -> {kernel}" for name, kernel in now.items() if was.get(name) != kernel]
        if changes:
            say(f"operations run on other kernels ({'; '.join(changes)}); figures may differ in their last digits")
    write_atomically(path, json.dumps(operations, indent=1).encode() + b"\n")


def _keep_config(
    settings: config.Config, path: Path, before: dict[str, Any] | None, say: Callable[[str], None]
) -> None:
    """Write config.yaml, and keep the one before where it is another.

    What has changed is told by what the checkpoint was trained with: another start, which trained nothing, may have come between.
    """
    # A run started from this file goes on: it neither goes back once more, nor passes over another change, nor ends early.
    settings = replace(
        settings,
        resume=None,
        data=replace(settings.data, allow_change=False),
        train=replace(settings.train, stop_after_step=0),
    )
    kept = ""
    if path.exists() and path.read_bytes() != config.as_yaml(settings):
        kept = f"; the one before is kept as {checkpoint.set_aside(path, 'before').name}"
    config.write(settings, path)
    if before is None:
        return
    now = config.flat(asdict(settings))
    was = {**config.defaults(now), **config.flat(before["config"])}  # an earlier version of Cria may not have had a key
    changed = [key for key in {**was, **now} if was.get(key) != now.get(key) and key not in _NO_CHANGE]
    if changed:
        changes = [f"{key}: {was.get(key)} -> {now.get(key)}" for key in changed]
        say(f"the configuration changed ({'; '.join(changes)}){kept}")
        _say_learning_rate(settings, before, say)


def _say_learning_rate(settings: config.Config, before: dict[str, Any], say: Callable[[str], None]) -> None:
    """Name a jump in the schedule that another max_steps, warm-up or rate makes at the next step."""
    step = before["step"] + 1
    now = learning_rate(step, settings.optim, settings.train.max_steps)
    try:
        was = learning_rate(step, OptimConfig(**before["config"]["optim"]), before["config"]["train"]["max_steps"])
    except (KeyError, TypeError):  # of another version of Cria, with other keys
        return
    if was != now:
        say(f"the learning rate of step {step:,} is {now:.3g} by the new schedule and was {was:.3g} by the old one")
