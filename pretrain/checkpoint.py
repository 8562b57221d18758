"""Checkpoints: what they are made of, and how they are found, verified and loaded. `saver` writes them.

    load: committed folders, newest first ─> every file against the manifest ─> the same one on all ranks ─> tensors

    step-00005000/
        tensors/         torch.distributed.checkpoint (DCP): "model.NAME", "optimizer.exp_avg.NAME", "optimizer.exp_avg_sq.NAME"
        state.json       what else the run needs: step, fingerprints of the data, versions
        manifest.json    size and sha256 of every other file, written last

A folder of another name is not a checkpoint, and one without a manifest is a corrupt one; step-00005000.old is one that a new
step-00005000 is about to replace, so that at every moment there is one of the two. What does not match its manifest is set aside
under another name, never deleted, and the one before is taken. DCP's index is a pickle: it is opened only after its checksum, by
`index.Reader`.
"""

import hashlib
import os
import re
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from pretrain import ranks
from pretrain.hosts import suspect, this_host
from pretrain.index import Reader
from pretrain.reading import json_mapping
from pretrain.watchdog import alive

T = TypeVar("T")

FORMAT = "cria-checkpoint"
VERSION = 1
_COMMITTED = re.compile(r"step-(\d{8,})(\.old)?")
_PAUSES_S = (1.0, 5.0)
"""Before a checkpoint that cannot be read is tried again (seconds)."""

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # DCP's, where a single process is meant


def tensors_of(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Everything of a run that is a tensor, by name; sharded ones as DTensors. Saving reads it, loading writes into it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward without a backward (validation) leaves other, gathered parameters in root and head
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


def find(run_dir: Path, warn: Callable[[str], None], or_none: bool = False) -> Path | None:
    """The newest checkpoint that is whole, or None where none was ever committed; called by all ranks, the same for all.

    The ranks share the work of reading every file. Rank 0 names corrupt checkpoints to `warn` and sets them aside.

    or_none: the run goes back to another one and does not need it: None in place of the ValueError below.

    Raises:
        ValueError: no checkpoint is whole though there are, or were, some; or the newest was written by a newer Cria. A new
            run is never begun then.
        OSError: on all ranks, as `committed` and verify_together, or where a corrupt one cannot be set aside.
    """
    folders = _seen_by_rank_0(lambda: [folder for _, folder in committed(run_dir)])
    for folder in folders:
        problem = verify_together(folder)
        if problem is None:
            return folder
        if _seen_by_rank_0(partial(_of_a_newer_cria, folder)):
            if or_none:
                return None
            raise ValueError(
                f"{folder}: {problem}; go on with the version of Cria that wrote it, or take another run_dir"
            )
        ranks.on_rank_0(partial(_reject, folder, problem, warn))
    lost = _seen_by_rank_0(lambda: sorted(n for n in _names(run_dir / "checkpoints") if n.startswith("corrupt-")))
    if lost and not or_none:
        raise ValueError(
            f"{run_dir} has no whole checkpoint left; in its checkpoints/ were set aside: {', '.join(lost)}. Bring one back, "
            "name one with --resume, or begin anew in another run_dir"
        )
    return None


def _seen_by_rank_0(look: Callable[[], T]) -> T:
    def here() -> T:
        try:
            return look()
        except OSError as error:
            raise OSError(f"{error}, on {this_host()}") from error

    return ranks.on_rank_0(here)


def _reject(folder: Path, problem: str, warn: Callable[[str], None]) -> None:
    try:
        aside = set_aside(folder, "corrupt")
    except OSError as error:
        raise OSError(f"checkpoint {folder.name} is corrupt ({problem}) and cannot be set aside: {error}") from error
    warn(f"checkpoint {folder.name} is corrupt ({problem}); it is set aside as {aside.name}, the one before is taken")


def latest(run_dir: Path, warn: Callable[[str], None]) -> Path:
    """The newest whole checkpoint of a run, for reading only: a corrupt one is named to `warn`, and nothing is set aside.

    Raises:
        FileNotFoundError: there is none, or none is whole.
        OSError: as `committed` and `verify`.
    """
    folders = [folder for _, folder in committed(run_dir)]
    for folder in folders:
        problem = verify(folder)
        if problem is None:
            return folder
        warn(f"checkpoint {folder.name} is corrupt ({problem}); the one before is taken")
    found = f"{len(folders)} checkpoints and none is whole" if folders else "no checkpoint"
    raise FileNotFoundError(f"{run_dir} has {found}; train it first: pretrain train --run_dir {run_dir} --config ...")


def verify_together(folder: Path) -> str | None:
    """`verify` by all ranks, each its share of the files; the same answer for all.

    What one of them finds wrong is looked at again, by a rank of another host where there is one: a host whose memory is bad
    would find every checkpoint corrupt.

    Raises:
        OSError: on all ranks, where one could not read a file, which says nothing about what stands in it, or where it finds
            something wrong that a second look does not.
    """
    world_size = ranks.world_size()
    problems = _look_together(folder, ranks.rank())
    first = next((number for number, (_, problem) in enumerate(problems) if problem is not None), None)
    if first is None:
        return None
    host, problem = problems[first]
    second = next((number for number in range(world_size) if problems[number][0] != host), first)
    again = _look_together(folder, first if ranks.rank() == second else None)[second]
    if again[1] is None:
        suspect(host)
        raise OSError(
            f"{folder}, as rank {first} on {host} reads it, is corrupt ({problem}), and a second look, on {again[0]}, finds it "
            f"whole: {host} reads or computes wrongly, now and then at least. It stays where it is; start again without that host"
        )
    return problem if world_size == 1 else f"rank {first}: {problem}"


def _look_together(folder: Path, part: int | None) -> list[tuple[str, str | None]]:
    """Every rank's host, and what it finds wrong in part `part` of as many as there are ranks (None: it does not look).

    Raises OSError as verify_together.
    """
    found, unreadable = None, None
    if part is not None:
        for pause_s in (0.0, *_PAUSES_S):
            time.sleep(pause_s)
            try:
                found, unreadable = verify(folder, share=(part, ranks.world_size()), alive=alive), None
                break
            except OSError as error:
                unreadable = f"{folder} cannot be read on {this_host()}: {error}"
    if unreadable := ranks.first_problem(unreadable):
        raise OSError(
            f"{unreadable}. Its content may be whole, so it stays where it is; start again without that host, or, where no "
            "host can read it, move the folder away"
        )
    return ranks.gather((this_host(), found))


def verify(folder: Path, share: tuple[int, int] = (0, 1), alive: Callable[[], None] = lambda: None) -> str | None:
    """Compare the files with the manifest. Returns None where all agree, else what is wrong, in a few words.

    share: (k, n) reads every n-th file from the k-th on; part 0 also compares the sizes of all. alive: called now and then, to
    say that the work goes on.

    Raises:
        OSError: a file or folder is there and cannot be read now: a stale handle, no permission, a failing disk.
    """
    try:
        manifest = json_mapping((folder / "manifest.json").read_bytes())
        if _is_newer(manifest):
            return f"its manifest is of version {manifest['version']}, and this is Cria of version {VERSION}"
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            return f"its manifest is one of {manifest['format']} {manifest['version']}, not of {FORMAT} {VERSION}"
        named = _COMMITTED.fullmatch(folder.name)
        if named and int(named[1]) != manifest["step"]:
            return f"its manifest is that of step {manifest['step']}"
        files = manifest["files"]
        if missing := sorted(set(files) - set(_files(folder))):  # others that lie there are never read
            return f"{missing[0]} is missing"
        for name, expected in files.items() if share[0] == 0 else ():  # before anything is read
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, not {expected['bytes']}"
        for name in sorted(files)[share[0] :: share[1]]:
            if describe(folder / name, alive) != files[name]:
                return f"{name} has another checksum"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return f"it cannot be read: {error}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read: {error}"
    return None


def _is_newer(manifest: dict[str, Any]) -> bool:
    """Whether a later Cria has written a checkpoint, which this one cannot judge."""
    return manifest["format"] == FORMAT and manifest["version"] > VERSION


def _of_a_newer_cria(folder: Path) -> bool:
    # What raises one of these is corrupt.
    with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError):
        return _is_newer(json_mapping((folder / "manifest.json").read_bytes()))
    return False


def hint(folder: Path) -> str:
    """What to say more of a folder that is no checkpoint: where those of a run lie; "" where it is none of a run's."""
    return f"; name one of those in {folder / 'checkpoints'}" if (folder / "checkpoints").is_dir() else ""


def _files(folder: Path) -> list[str]:
    """Relative paths of all files, at any depth. Raises OSError, never FileNotFoundError, where a folder cannot be listed."""
    try:
        with os.scandir(folder) as found:
            entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in found]
    except OSError as error:
        raise OSError(f"{folder} cannot be listed: {error}") from error
    files = [name for name, is_folder in entries if not is_folder]
    return files + [f"{name}/{inner}" for name, is_folder in entries if is_folder for inner in _files(folder / name)]


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a verified checkpoint. Raises ValueError where it is no JSON object, and when asked for what it lacks."""
    file = folder / "state.json"
    try:
        return _State(json_mapping(file.read_bytes()), file)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}; take another checkpoint") from error


class _State(dict[str, Any]):
    """Whole by its checksum, it may still be of another version, or made by hand."""

    def __init__(self, content: dict[str, Any], file: Path):
        super().__init__(content)
        self._file = file

    def __missing__(self, key: str) -> Any:
        raise ValueError(
            f"{self._file} has no {key}: another version of Cria wrote it; go on with that one, or begin a new run with its "
            f"weights alone: --init_from {self._file.parent} and another run_dir"
        )


def load(folder: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """Load a verified checkpoint into model and optimizer, sharded as they are now; returns its state.json.

    Called by all ranks. Any number of ranks can read what any other number wrote.
    """
    _read(folder, tensors_of(model, optimizer))
    state = read_state(folder)
    for parameter in model.parameters():
        optimizer.state[parameter]["step"].fill_(state["updates"])
    return state


def load_into(folder: Path, model: nn.Module) -> None:
    """Load the weights of a verified checkpoint, and nothing else, into a model, sharded as it is; called by all ranks."""
    _read(folder, {f"model.{name}": parameter.data for name, parameter in model.named_parameters()})


def load_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a verified checkpoint, whole, on the CPU, under the model's parameter names. Without a process group."""
    return {name.removeprefix("model."): tensor for name, tensor in load_tensors(folder, "model.").items()}


def load_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a verified checkpoint whose names begin with `prefix` (none other is read), whole, on the CPU.

    Names are those of `tensors_of`. Without a process group.
    """
    reader = Reader(folder / "tensors")
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def _read(folder: Path, tensors: dict[str, Tensor]) -> None:
    reader = Reader(folder / "tensors")
    reader.read_metadata()  # what is wrong with it is raised as it is: DCP would take it for a file that is missing
    dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


def tensor_files(folder: Path) -> set[str]:
    """Names of the files in tensors/ that DCP's index says hold tensors."""
    return {place.relative_path for place in Reader(folder / "tensors").read_metadata().storage_data.values()}


def committed(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all committed checkpoints, newest first, by number.

    Raises:
        OSError: the folder is there and cannot be listed, or is a link that leads nowhere: nothing is begun anew then.
    """
    folder = run_dir / "checkpoints"
    found = [(int(match[1]), folder / name) for name in _names(folder) if (match := _COMMITTED.fullmatch(name))]
    return sorted(found, key=lambda entry: (entry[0], entry[1].suffix != ".old"), reverse=True)


def _names(folder: Path) -> list[str]:
    """What lies in a folder; nothing where there is no such entry. Raises OSError as `committed`."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        if not folder.is_symlink():
            return []
    raise OSError(
        f"{folder} is a link that leads to {os.readlink(folder)}, which is not there: mount it, or remove the link"
    )


def updates(run_dir: Path) -> int:
    """How often the weights had been updated at the newest checkpoint whose state can be read; 0 without one."""
    for _, folder in committed(run_dir):
        with suppress(OSError, ValueError):
            return int(read_state(folder)["updates"])
    return 0


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint, or a config.yaml, so that nobody takes it for one; returns its new path. Nothing is deleted."""
    name, number = f"{why}-{folder.name.removesuffix('.old')}", 1
    while (aside := folder.with_name(f"{name}.{number}")).exists():
        number += 1
    os.rename(folder, aside)
    return aside


def describe(path: Path, alive: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """A file's entry in the manifest: its size in bytes and its sha256. `alive` is called while it is read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            alive()
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
