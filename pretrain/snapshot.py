"""The weights that an export is made of: those of a checkpoint, or the mean of several, each verified before it is read.

    RUN_DIR/checkpoints/step-00005000 ── verified ──> shape, tokenizer, weights ──┬─────────────────> Snapshot
                        step-00006000 ── verified ──> the same shape? ── added ───┴── divided by n ─> Snapshot of the mean

Nothing in the run's folder is changed, and the run may go on meanwhile: what it deletes while it is read is `Gone`.
"""

import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from pretrain import checkpoint, hf
from pretrain.sections import ModelConfig, unlike

LINEAGE = ("init_from", "branched_from")
"""Where a run came from, as its checkpoints' states say."""


class Gone(OSError):
    """The run has deleted a checkpoint, set it aside or replaced it, while it was read."""


@dataclass(frozen=True)
class Snapshot:
    """A model as it was after a step, or the mean of several."""

    model: ModelConfig
    tokenizer: str
    """Fingerprint of the tokenizer that it was trained with."""
    weights: dict[str, Tensor]
    """Whole, on the CPU, under the model's parameter names; as they were saved, a mean in fp64."""
    made_of: dict[str, Any]
    """For an export's mark (JSON): `step`, and `checkpoint`, its `seal`; of a mean `steps`, `checkpoints` and,
    where they are of several, `runs`; and LINEAGE."""


def kept(run_dir: Path) -> dict[int, Path]:
    """Step -> folder of all committed checkpoints, by step; of two of one step, as a kill can leave them, the newer.

    Raises:
        OSError: as `checkpoint.committed`.
    """
    return dict(reversed(checkpoint.committed(run_dir)))


def named(run_dir: Path, which: Sequence[int | Path]) -> list[Path]:
    """The run's checkpoints of these steps, and those that are named by their paths.

    Raises:
        FileNotFoundError: with those that are not kept, or not there.
    """
    there = kept(run_dir)
    if missing := ", ".join(str(step) for step in which if isinstance(step, int) and step not in there):
        raise FileNotFoundError(
            f"{run_dir} has no checkpoint of step {missing}; it keeps: {', '.join(map(str, there)) or 'none'}"
        )
    for path in which:
        if isinstance(path, Path) and not (path / "manifest.json").is_file():
            raise FileNotFoundError(f"{path} is no checkpoint; name one of those in a run's checkpoints/")
    return [one if isinstance(one, Path) else there[one] for one in which]


def seal(folder: Path) -> str | None:
    """The checksum of a checkpoint's manifest, which tells it from every other; "": it has none; None: it is not there.

    Raises:
        OSError: it cannot be listed or read now.
    """
    if folder.name not in os.listdir(folder.parent):
        return None
    try:
        return "sha256:" + checkpoint.describe(folder / "manifest.json")["sha256"]
    except (FileNotFoundError, NotADirectoryError):
        return ""


def take(folder: Path, verified: bool = False) -> Snapshot:
    """The model of a checkpoint, which is verified here where it was not before.

    Raises:
        Gone: see there.
        ValueError: it is corrupt, its state lacks something, or its weights are not those of its shape.
        OSError: it cannot be read now.
    """
    with _unchanged(folder) as its_seal:
        problem = None if verified else checkpoint.verify(folder)
        if problem is not None:
            raise ValueError(f"checkpoint {folder} is corrupt ({problem}); take another")
        state = checkpoint.read_state(folder)
        model, weights = ModelConfig.of_shape(state["model"]), checkpoint.load_weights(folder)
        hf.check_weights(model, weights)
        made_of = {"step": state["step"], "checkpoint": its_seal, **{key: state.get(key) for key in LINEAGE}}
        return Snapshot(model, str(state["data"].get("tokenizer")), weights, made_of)


def mean(folders: list[Path]) -> Snapshot:
    """The mean of the weights of checkpoints, each with the same share.

    Early weight averaging (arXiv 2306.03241) takes it along a run's trajectory, of checkpoints some way apart; model soups (arXiv
    2203.05482) take it over runs that have begun alike, such as branches. The sum is in fp64, where that of a few fp32 numbers of
    like size is exact: the order of the checkpoints does not matter, and the mean is rounded to fp64, then to the export's type.
    Memory: the sum, 8 bytes a parameter, and the weights of one checkpoint, whatever their number.

    Raises:
        ValueError: fewer than two, one twice, or of different shapes or tokenizers; and as `take`.
        OSError: as `take`.
    """
    if len({folder.resolve() for folder in folders}) < len(folders) or len(folders) < 2:
        named = ", ".join(folder.name for folder in folders)
        raise ValueError(f"a mean is one of at least two different checkpoints, and these are named: {named}")
    first, total = take(folders[0]), {}
    made_of, others = [first.made_of], []
    for name in list(first.weights):
        total[name] = first.weights.pop(name).to(torch.float64)
    for folder in folders[1:]:
        one = take(folder)
        _check_alike(folders[0], first, folder, one)
        for name, tensor in one.weights.items():
            total[name] += tensor
        made_of.append(one.made_of)
        others.append(one.model)
        del one, tensor  # before the next one is read
    for tensor in total.values():
        tensor /= len(folders)
    said = {f"{key}s": [each[key] for each in made_of] for key in ("step", "checkpoint")}
    runs = [str(folder.resolve().parent.parent) for folder in folders]
    if len(set(runs)) > 1:
        said["runs"] = runs
    longest = max((first.model, *others), key=lambda model: model.max_position_embeddings)
    return Snapshot(longest, first.tokenizer, total, {**said, **{key: first.made_of[key] for key in LINEAGE}})


def _check_alike(folder: Path, first: Snapshot, other: Path, one: Snapshot) -> None:
    differ = [f"{key} {a} and {b}" for key, (a, b) in unlike(one.model.shape(), first.model.shape()).items()]
    if differ:
        raise ValueError(f"{other} and {folder} have {', '.join(differ)}: models of other shapes have no mean")
    if one.tokenizer != first.tokenizer:
        raise ValueError(
            f"{other} and {folder} were trained with tokenizers {one.tokenizer[:19]} and {first.tokenizer[:19]}: their ids mean "
            "other words, and the mean of their weights nothing"
        )


@contextmanager
def _unchanged(folder: Path) -> Iterator[str]:
    """Gives the seal of a checkpoint, which is read in the block.

    Raises:
        Gone: another one has its name when the block ends, or the block failed and it is not there any more.
        ValueError, OSError: in place of what else DCP raises.
    """
    before = seal(folder)
    try:
        yield before or ""
    except (ValueError, OSError, pickle.UnpicklingError, dcp.CheckpointException) as error:
        if before is None or seal(folder) != before:
            raise _gone(folder) from error
        if isinstance(error, pickle.UnpicklingError):
            raise ValueError(f"checkpoint {folder} cannot be read: {error}") from error
        if isinstance(error, dcp.CheckpointException):  # no Exception; it wraps whatever happens in DCP, Ctrl-C too
            cause, _ = next(iter(error.failures.values()))
            if isinstance(cause, KeyboardInterrupt):
                raise cause from None
            raise OSError(f"checkpoint {folder} cannot be read: {type(cause).__name__}: {cause}") from error
        raise
    if seal(folder) not in (before, None):  # deleted since, it was read to the end
        raise _gone(folder)


def _gone(folder: Path) -> Gone:
    return Gone(f"{folder} was deleted or replaced by the run while it was read")
