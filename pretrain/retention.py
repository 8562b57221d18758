"""Which checkpoints stay on the disk, and whether another one fits; nothing here is a collective: rank 0 does it.

killed saves ─> clear       the newest and the milestones stay ─> prune       a run that went back ─> set_aside_what_was_left
"""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain import checkpoint
from pretrain.back import Back
from pretrain.sections import CheckpointConfig


def clear(folder: Path, say: Callable[[str], None]) -> None:
    """Remove what a killed run left half written or half deleted among the checkpoints."""
    for left_over in [*folder.glob(".staging-*"), *folder.glob(".deleting-*")]:
        try:
            shutil.rmtree(left_over)
        except OSError as error:  # it only takes room, and hinders no save but one of the same step
            say(f"{left_over} is left over from a killed run and could not be deleted: {error}")


def check_room(folder: Path, needed: int) -> None:
    """Raises OSError where `folder`, or the one that it will be in, has no room for a checkpoint of so many bytes.

    A file system that is full by somebody's quota says so only when it is written to.
    """
    there = folder if folder.exists() else folder.parent
    free, needed = shutil.disk_usage(there).free, int(needed * 1.02) + 2**20
    if free < needed:
        raise OSError(
            f"{folder} has {free / 2**20:,.1f} MiB free and a checkpoint needs {needed / 2**20:,.1f} MiB; "
            f"delete what is not needed{_beside(folder)}, or start again with a lower checkpoint.keep_last"
        )


def count_set_aside(folder: Path) -> tuple[int, int]:
    """How many of its checkpoints were set aside, corrupt or because the run went back, and their bytes: nothing deletes them."""
    paths = [path for why in ("replaced", "corrupt") for path in folder.glob(f"{why}-*") if path.is_dir()]
    size = 0
    for file in (file for path in paths for file in path.rglob("*")):
        with suppress(OSError):  # somebody deletes it
            size += file.stat().st_size if file.is_file() else 0
    return len(paths), size


def _beside(folder: Path) -> str:
    number, size = count_set_aside(folder)
    return f", such as the {number} that were set aside, {size / 2**20:,.1f} MiB" if number else ""


def prune(run_dir: Path, config: CheckpointConfig, branch_point: int = 0) -> list[str]:
    """Delete the committed checkpoints that nothing keeps; returns their names.

    These stay: the newest `keep_last` of those at a multiple of `every_steps`; the two newest of any step (with keep_last 1: the
    newest), so that one made by a signal or by the clock is there until the next; those of a `keep_every`-th step and that of
    `Config.branch_point`; those that were marked `keep` when they were saved. With `keep_last` 0 nothing is deleted.
    """
    if config.keep_last == 0:
        return []
    there = checkpoint.committed(run_dir)
    regular = [folder for step, folder in there if config.every_steps == 0 or step % config.every_steps == 0]
    kept = {*regular[: config.keep_last], *(folder for _, folder in there[: min(2, config.keep_last)])}
    gone = []
    for step, folder in there:
        # What was to be kept for good under another configuration than today's stays.
        if folder in kept or is_milestone(step, config, branch_point) or _said_by(folder, "keep"):
            continue
        doomed = folder.with_name(f".deleting-{folder.name}")
        os.rename(folder, doomed)  # half a folder must never look like a checkpoint
        shutil.rmtree(doomed)
        gone.append(folder.name)
    return gone


def is_milestone(step: int, config: CheckpointConfig, branch_point: int) -> bool:
    """Whether a checkpoint of this step is to stay for good."""
    return step == branch_point or (config.keep_every > 0 and step % config.keep_every == 0)


def saved_since(run_dir: Path, sent: Back) -> bool:
    """Whether a run that was sent back has saved since."""
    return any(_said_by(folder, "back") == sent.start for folder in _later(run_dir, sent))


def set_aside_what_was_left(run_dir: Path, sent: Back, say: Callable[[str], None]) -> None:
    """A run that was sent back has saved since: what it had from there on before goes aside."""
    left = [folder for folder in _later(run_dir, sent) if _said_by(folder, "back") != sent.start]
    aside = [checkpoint.set_aside(folder, "replaced").name for folder in left]
    if aside:
        say(
            f"the run went back to step {sent.step}; what it left was set aside, and nothing deletes it: {', '.join(aside)}"
        )


def _later(run_dir: Path, sent: Back) -> list[Path]:
    return [folder for step, folder in checkpoint.committed(run_dir) if step > sent.step]


def _said_by(folder: Path, key: str) -> Any:
    """Of a checkpoint's state, unverified; None where it has no such key or cannot be read at all."""
    with suppress(ValueError, FileNotFoundError):  # nobody can take it
        return checkpoint.read_state(folder).get(key)
    return None
