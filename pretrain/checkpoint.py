"""Checkpoints: save, commit, verify, find, load, prune.

    save: all ranks write tensors ─> .staging-step-00005000/ ─> synced, hashed ─> manifest.json ─> rename ─> step-00005000/
    load: committed folders, newest first ─> every file against the manifest ─> rank 0 chooses, all ranks follow

    step-00005000/
        tensors/         torch.distributed.checkpoint: "model.NAME", "optimizer.exp_avg.NAME", "optimizer.exp_avg_sq.NAME"
        state.json       what else the run needs: step, fingerprints of the data, versions
        manifest.json    size and sha256 of every other file, written last

A folder without the right name and a manifest is not a checkpoint. What does not match its manifest is set aside under
another name, never deleted, and the one before is taken. DCP's index is a pickle: it is opened only after its checksum.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

FORMAT = "cria-checkpoint"
VERSION = 1
_COMMITTED = re.compile(r"step-(\d{8,})")


def tensors_of(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Everything of a run that is a tensor, by name; sharded ones as DTensors. Saving reads it, loading writes into it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward without a backward (validation) leaves other, gathered parameters in the root
    tensors: dict[str, Tensor] = {}
    fresh = not optimizer.state
    for name, parameter in model.named_parameters():
        assert fresh or parameter in optimizer.state, f"{name} is not the parameter that the optimizer updates"
        state = _optimizer_state(optimizer, parameter)
        tensors[f"model.{name}"] = parameter.data
        tensors[f"optimizer.exp_avg.{name}"] = state["exp_avg"]
        tensors[f"optimizer.exp_avg_sq.{name}"] = state["exp_avg_sq"]
    return tensors


def _optimizer_state(optimizer: torch.optim.AdamW, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of one parameter; made as AdamW itself makes it where no step has been taken yet."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state


def save(run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.AdamW, state: dict[str, Any]) -> Path:
    """Write and commit the checkpoint of `step`; called by all ranks, returns when it is committed.

    `state` goes into state.json as it is; the optimizer's update count is added.
    """
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    staging = folder.with_name(f".staging-{folder.name}")
    if _rank() == 0:
        if staging.exists():
            shutil.rmtree(staging)  # left by a save that was killed
        (staging / "tensors").mkdir(parents=True)
    _barrier()
    tensors = tensors_of(model, optimizer)
    # More than one writer thread can lose a full disk's error: save returns and shards are missing.
    writer = dcp.FileSystemWriter(staging / "tensors", thread_count=1, sync_files=True, overwrite=True)
    with _alone_is_meant():
        dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    updates = int(next(iter(optimizer.state.values()))["step"].item())
    if _rank() == 0:
        _write_synced(staging / "state.json", json.dumps({**state, "updates": updates}, indent=1))
    _barrier()
    _commit(staging, folder, step)
    return folder


def _commit(staging: Path, folder: Path, step: int) -> None:
    """Hash all files, each rank its share; then rank 0 writes the manifest and renames."""
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    mine = {str(path.relative_to(staging)): _describe(path) for path in files[_rank() :: _world_size()]}
    parts: list[Any] = [mine]
    if dist.is_initialized():
        parts = [None] * _world_size()
        dist.all_gather_object(parts, mine)
    if _rank() == 0:
        described = {name: entry for part in parts for name, entry in part.items()}
        manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": dict(sorted(described.items()))}
        _write_synced(staging / "manifest.json", json.dumps(manifest, indent=1))
        _sync_folder(staging / "tensors")
        _sync_folder(staging)
        if folder.exists():  # the same step saved before, by a run that was started again from an earlier one
            _set_aside(folder, "replaced")
        os.rename(staging, folder)
        _sync_folder(folder.parent)
    _barrier()


def prune(run_dir: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` committed checkpoints; 0 keeps all. Called by rank 0 after a commit."""
    for _, folder in _committed(run_dir)[keep_last:] if keep_last else []:
        doomed = folder.with_name(f".deleting-{folder.name}")
        os.rename(folder, doomed)  # half a folder must never look like a checkpoint
        shutil.rmtree(doomed)


def find(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole, or None; the same on all ranks. Corrupt ones are set aside and named to `warn`."""
    chosen: list[Path | None] = [None]
    if _rank() == 0:
        for _, folder in _committed(run_dir):
            problem = verify(folder)
            if problem is None:
                chosen = [folder]
                break
            aside = _set_aside(folder, "corrupt")
            warn(
                f"checkpoint {folder.name} is corrupt ({problem}); it was set aside as {aside.name} and the one before is taken"
            )
    if dist.is_initialized():
        dist.broadcast_object_list(chosen, src=0)
    return chosen[0]


def latest(run_dir: Path, warn: Callable[[str], None]) -> Path:
    """The newest whole checkpoint of a run, for reading only: a corrupt one is named to `warn`, and nothing is set aside.

    Raises:
        FileNotFoundError: there is none, or none is whole.
    """
    committed = [folder for _, folder in _committed(run_dir)]
    for folder in committed:
        problem = verify(folder)
        if problem is None:
            return folder
        warn(f"checkpoint {folder.name} is corrupt ({problem}); the one before is taken")
    found = f"{len(committed)} checkpoints and none is whole" if committed else "no checkpoint"
    raise FileNotFoundError(f"{run_dir} has {found}; train it first: pretrain train --run_dir {run_dir} --config ...")


def verify(folder: Path) -> str | None:
    """Compare every file with the manifest. Returns None where all agree, else what is wrong, in a few words."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            return f"its manifest is {manifest['format']} version {manifest['version']}, not {FORMAT} version {VERSION}"
        files = manifest["files"].items()
        present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"manifest.json"}
        if missing := sorted(set(manifest["files"]) ^ present):
            return f"{missing[0]} is missing or unknown"
        for name, expected in files:
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, not {expected['bytes']}"
            if _describe(folder / name) != expected:
                return f"{name} has another checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read: {error}"
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a verified checkpoint."""
    return json.loads((folder / "state.json").read_bytes())


def load(folder: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """Load a verified checkpoint into model and optimizer, sharded as they are now; returns its state.json.

    Called by all ranks. Any number of ranks can read what any other number wrote.
    """
    tensors, reader = tensors_of(model, optimizer), dcp.FileSystemReader(folder / "tensors")
    with _alone_is_meant():
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    state = read_state(folder)
    for parameter in model.parameters():
        optimizer.state[parameter]["step"].fill_(state["updates"])
    return state


def load_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a verified checkpoint, whole, on the CPU, under the model's parameter names. One process, no group."""
    reader = dcp.FileSystemReader(folder / "tensors")
    known = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in known.items()
        if name.startswith("model.") and isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }
    with _alone_is_meant():
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


@contextmanager
def _alone_is_meant() -> Iterator[None]:
    """Without DCP's warning that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _committed(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all committed checkpoints, newest first, by number."""
    folders = (run_dir / "checkpoints").glob("step-*")
    found = [(int(match[1]), folder) for folder in folders if (match := _COMMITTED.fullmatch(folder.name))]
    return sorted(found, reverse=True)


def _set_aside(folder: Path, why: str) -> Path:
    number = 1
    while (aside := folder.with_name(f"{why}-{folder.name}.{number}")).exists():
        number += 1
    os.rename(folder, aside)
    return aside


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
