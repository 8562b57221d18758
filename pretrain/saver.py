"""Writes checkpoints while training goes on.

    save ─> copy in the host's memory ─┬─> training goes on
                                       └─> thread: room on the disk? ─> .staging-step-00005000/ ─> synced ─> hashed
                                                   ─> manifest.json ─> renamed to step-00005000/ ─> older ones pruned

The rename is the commit: before it there is no checkpoint of that step, after it there is a whole one. Every stage ends with
the ranks' agreement that it went well on all of them; where it did not, the staging folder goes, the reason is said, and
training goes on with the checkpoints that there are. The thread's collectives have a group of their own, so that they never
mix with training's.
"""

import gc
import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.tensor import DTensor

from pretrain import back, checkpoint, lock, ranks, retention, scheduler, synced
from pretrain.folder import sync
from pretrain.optim import updates
from pretrain.sections import CheckpointConfig
from pretrain.watchdog import alive

T = TypeVar("T")

_AGAIN_S = 300.0
"""So long after a save that failed it is tried again (seconds)."""
_GIVE_UP_S = 7200.0
"""When saves have failed for so long the run ends (seconds): a night that cannot be saved is a night lost."""
_REMEMBERED = 8
"""So many saves tell how long one takes: a disk that once stood still is forgotten."""


class Saver:
    """Saves a run's checkpoints, one at a time. Every method is called by all ranks."""

    def __init__(
        self, run_dir: Path, config: CheckpointConfig, say: Callable[[str], None], step: int = 0, branch_point: int = 0
    ):
        """`say` is told, on rank 0, what was saved and what could not be; it may be called from another thread.

        step: the one after which the run was taken up. branch_point: `Config.branch_point`.
        """
        self.step = step
        """After this step the newest copy was taken, which is saved, being written, or could not be."""
        cuda = torch.cuda.is_initialized()  # by this run: a GPU that it leaves alone is none of its business
        self._folder = run_dir / "checkpoints"
        self._config, self._branch_point = config, branch_point
        self._say = say if ranks.rank() == 0 else lambda line: None
        self._group = dist.new_group(backend="gloo", timeout=ranks.TIMEOUT) if dist.is_initialized() else None
        # Not DefaultStager: torch 2.11's throws its buffers away after a copy, and then fails at the next.
        self._stager = StateDictStager(pin_memory=cuda)
        device = torch.cuda.current_device() if cuda else None
        self._thread = futures.ThreadPoolExecutor(1, "saver", initializer=_use_device, initargs=(device,))
        self._pending: futures.Future[str | None] | None = None
        self._problem: str | None = None
        """Why the last save failed, the same on all ranks; None: it did not."""
        self._last_try_at = time.perf_counter()
        """When the last save began or, once it is over, ended, well or not; at first, when this was made."""
        self._failing_since: float | None = None
        """Since when saves have failed; None: the last one did not."""
        self._unproven = scheduler.last_start_in_vain()
        """Whether nothing may be trained before a save succeeds: the last start may have ended because none did."""
        self._owed = False
        """Whether a checkpoint that was to stay for good could not be saved: the next one stays in its place."""
        self.outcomes: deque[dict[str, Any]] = deque()
        """Of the saves that have ended, on rank 0: `step`, `seconds` and `problem` (None: it is saved). To be taken out."""
        self.taken = False
        """Whether another job has taken the run's folder, so that no save can succeed; known on rank 0."""
        self._back = back.read(run_dir) if ranks.rank() == 0 else None
        """Where this start was sent back to: all that it saves has its mark."""
        self._signs = 0
        """Grows while the thread gets on."""
        self._last_saves_s = self._remembered() if ranks.rank() == 0 else ()
        """Seconds that each of the last saves took on this rank, from the copy to the commit; on rank 0 of earlier starts too."""

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.AdamW, state: dict[str, Any]) -> None:
        """Take a copy of the run as it is after `step` and see that it is written; `state` goes into state.json.

        Returns when the copy is taken. Waits for an earlier save that is still being written.
        """
        self.wait()
        before, self.step = self.step, step
        self._last_try_at = time.perf_counter()
        cuda = next(model.parameters()).is_cuda
        tensors = self._stager.stage(checkpoint.tensors_of(model, optimizer), non_blocking=cuda)
        if cuda:
            torch.cuda.synchronize()  # the copies are done
        # Where train.leave_out has passed over a milestone this one stays in its place.
        since = range(min(before + 1, step), step + 1)
        milestone = any(retention.is_milestone(n, self._config, self._branch_point) for n in since)
        keep = self._config.keep_last == 0 or milestone or self._owed
        start = None if self._back is None else self._back.start
        state = {**state, "updates": updates(optimizer), "keep": keep, "back": start, "job": scheduler.job()}
        self._pending = self._thread.submit(self._write, step, tensors, state)

    @property
    def longest_s(self) -> float:
        """The longest of the last saves on this rank (seconds); rank 0 knows those of earlier starts, too."""
        return max(self._last_saves_s, default=0.0)

    def _remembered(self) -> tuple[float, ...]:
        """What the newest checkpoint knows of the saves up to its own."""
        with suppress(OSError, ValueError):  # it was verified a moment ago; a figure is not worth a run
            for _, folder in checkpoint.committed(self._folder.parent)[:1]:
                return tuple(checkpoint.read_state(folder)["last_saves_s"])
        return ()

    def overdue(self) -> bool:
        """Whether it is time to save, whatever the step; on rank 0, elsewhere False."""
        if not self._can_tell():
            return False
        problem = self._last_problem()
        if self._unproven and problem is None:
            return True
        # without keep_last the clock would fill the disk
        by_clock = 60 * self._config.every_minutes if self._config.keep_last else 0.0
        every_s = by_clock if problem is None else _AGAIN_S
        return 0 < every_s < time.perf_counter() - self._last_try_at

    def given_up(self) -> bool:
        """Whether saves have failed for too long, or that by which a start had to prove that it can; on rank 0, as `overdue`."""
        if not self._can_tell():
            return False
        if self._last_problem() is None:
            return False
        return self._unproven or (
            self._failing_since is not None and time.perf_counter() - self._failing_since > _GIVE_UP_S
        )

    def _can_tell(self) -> bool:
        """Whether this is rank 0, which tells the others, and no save is being written."""
        return ranks.rank() == 0 and (self._pending is None or self._pending.done())

    def _last_problem(self) -> str | None:
        """Of the last save, where none is being written."""
        return self._problem if self._pending is None else self._pending.result()

    def wait(self) -> str | None:
        """Wait for the save that is being written; returns why the last one failed, or None.

        What the thread gets done counts for the watchdog, so that a slow disk is not taken for a hang.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return self._problem
        seen = self._signs
        while not futures.wait([pending], timeout=0.5).done:
            if self._signs != seen:
                seen = self._signs
                alive()
        self._problem = pending.result()
        return self._problem

    def _alive(self) -> None:
        self._signs += 1

    def close(self) -> None:
        """Wait, and end the thread.

        Raises:
            OSError: the last save failed, so that what was trained since the one before it is lost.
        """
        problem = self.wait()
        self._thread.shutdown()
        self._stager.close()
        if problem is not None:
            raise OSError(f"the last checkpoint was not saved: {problem}")

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> str | None:
        """In the thread: all that comes after the copy. Returns why it failed, the same on all ranks, or None."""
        target = self._folder / f"step-{step:08d}"
        staging = target.with_name(f".staging-{target.name}")
        started = time.perf_counter()
        try:
            sizes = self._all_ranks(lambda: _bytes_of(tensors))
            self._rank_0(lambda: self._make_room(staging, sum(sizes)))
            self._all_ranks(lambda: self._write_tensors(staging, tensors))
            names = self._all_ranks(lambda: _files_of(staging) if ranks.rank() == 0 else [])[0]  # it commits
            parts = self._all_ranks(lambda: _hash_share(staging, names, self._alive))
            entries = {name: entry for part in parts for name, entry in part.items()}
            state = {**state, "last_saves_s": self._last_saves_s_with(time.perf_counter() - started)}
            self._rank_0(lambda: self._commit(staging, target, state, entries))
        except _Failed as failure:
            if ranks.rank() == 0 and not self.taken:  # else the folder may be the other job's
                shutil.rmtree(staging, ignore_errors=True)
            self._say(f"step {step}: NOT saved, training goes on: {failure}")
            self._ended(step, started, str(failure))
            self._owed = self._owed or state["keep"]
            self._failing_since = self._failing_since or self._last_try_at
            return str(failure)
        if ranks.rank() == 0:
            self._tidy(step, target)
        size = sum(entry["bytes"] for entry in entries.values())
        took = self._ended(step, started, None)
        self._failing_since, self._unproven, self._owed = None, False, False
        self._last_saves_s = self._last_saves_s_with(took)
        self._say(f"step {step}: saved {target} ({size / 2**20:,.1f} MiB in {took:.1f} s)")
        return None

    def _ended(self, step: int, started: float, problem: str | None) -> float:
        self._last_try_at = time.perf_counter()
        took = self._last_try_at - started
        if ranks.rank() == 0:
            self.outcomes.append({"step": step, "seconds": took, "problem": problem})
        return took

    def _tidy(self, step: int, target: Path) -> None:
        """After a commit: what it has made needless goes. What fails is tried again after the next one, or at the next start."""
        run_dir = self._folder.parent
        try:
            if self._back is not None:
                retention.set_aside_what_was_left(run_dir, self._back, self._say)
            # What this save has replaced (its .old), and newer ones: a run that went back and lost back.json leaves them.
            for number, folder in checkpoint.committed(run_dir):
                if number >= step and folder != target:
                    checkpoint.set_aside(folder, "replaced")
        except OSError as error:
            self._say(f"step {step}: what the run has left could not be set aside, and nothing is deleted: {error}")
            return
        try:
            scheduler.note_saved(run_dir)
            if self._back is not None:
                back.forget(run_dir)
        except OSError as error:
            self._say(f"step {step}: {run_dir} cannot be written: {error}")
        try:
            deleted = retention.prune(run_dir, self._config, self._branch_point)
            if len(deleted) > 1:  # one for another is what was asked for
                self._say(f"step {step}: older checkpoints were deleted: {', '.join(deleted)}")
        except OSError as error:
            self._say(f"step {step}: older checkpoints could not be deleted: {error}")

    def _all_ranks(self, stage: Callable[[], T]) -> list[T]:
        """Run a stage on every rank and return all results; where it fails on one, all raise _Failed alike.

        A stage must hold no collective after something that can fail: the ranks would lose step with each other.
        """
        problem, value = None, None
        try:
            value = stage()
        except (Exception, dcp.CheckpointException) as error:  # DCP's is no Exception
            problem = _describe_error(error)
        outcomes = ranks.gather((problem, value), self._group)
        self._alive()
        for number, (found, _) in enumerate(outcomes):
            if found is not None:
                raise _Failed(found if len(outcomes) == 1 else f"rank {number}: {found}")
        return [result for _, result in outcomes]  # type: ignore[misc]

    def _rank_0(self, stage: Callable[[], None]) -> None:
        """Run a stage on rank 0 while the others wait for how it ends."""
        self._all_ranks(stage if ranks.rank() == 0 else lambda: None)

    def _make_room(self, staging: Path, needed: int) -> None:
        """Begin an empty folder, if what will be written (bytes) fits the disk."""
        self._check_lock()
        if not self._folder.exists():
            if not self._folder.parent.exists():
                self._say(f"{self._folder.parent} is gone, moved or deleted: a new one is made for the checkpoints")
            self._folder.mkdir(parents=True)
            sync(self._folder.parent)
        retention.clear(self._folder, self._say)
        retention.check_room(self._folder, needed)
        (staging / "tensors").mkdir(parents=True)

    def _check_lock(self) -> None:
        try:
            lock.check(self._folder.parent)
        except lock.Taken:
            self.taken = True
            raise

    def _write_tensors(self, staging: Path, tensors: dict[str, Tensor]) -> None:
        # One thread: with more of them an error of a full disk can get lost, and save returns though files are missing. No copy
        # ahead: the tensors are on the host already, and it would wait for the GPU's queue of training hundreds of times.
        writer = synced.Writer(
            staging / "tensors", thread_count=1, per_thread_copy_ahead=0, sync_files=True, overwrite=True
        )
        writer.fs = synced.Files(self._alive)
        gc.disable()  # to collect what DCP makes of a large world's plans would hold up the training thread for seconds
        try:
            dcp.save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        finally:
            gc.enable()

    def _last_saves_s_with(self, seconds: float) -> tuple[float, ...]:
        return (*self._last_saves_s, seconds)[-_REMEMBERED:]

    def _commit(self, staging: Path, target: Path, state: dict[str, Any], entries: dict[str, Any]) -> None:
        self._check_lock()
        synced.write(staging / "state.json", json.dumps(state, indent=1))
        files = {**entries, "state.json": checkpoint.describe(staging / "state.json")}
        manifest = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "step": state["step"]}
        synced.write(
            staging / "manifest.json", json.dumps({**manifest, "files": dict(sorted(files.items()))}, indent=1)
        )
        sync(staging / "tensors")
        sync(staging)
        old = target.with_suffix(".old")
        if target.exists():  # a run that was started again from an earlier one has come here once more
            if old.exists():  # and was killed below
                checkpoint.set_aside(old, "replaced")
            os.rename(target, old)  # still a checkpoint, until the new one is
        os.rename(staging, target)
        sync(self._folder)


class _Failed(Exception):
    """A stage failed on some rank; raised on all of them."""


def _describe_error(error: BaseException) -> str:
    of_ranks = getattr(error, "failures", {})  # of DCP's CheckpointException: (exception, its traceback) by rank
    return "; ".join(sorted({_in_words(e) for e, _ in of_ranks.values()})) or _in_words(error)


def _in_words(error: BaseException) -> str:
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def _bytes_of(tensors: dict[str, Tensor]) -> int:
    """What is written for this rank, in bytes: of replicas one is, and it does not matter here which."""
    size = 0
    for tensor in tensors.values():
        held, replicas = tensor, 1
        if isinstance(tensor, DTensor):
            held = tensor.to_local()
            replicas = math.prod(n for n, p in zip(tensor.device_mesh.shape, tensor.placements) if p.is_replicate())
        size += held.numel() * held.element_size() // replicas
    return size


def _files_of(staging: Path) -> list[str]:
    """All files, relative and sorted. Raises FileNotFoundError where one that DCP's index names is not to be seen."""
    names = sorted(str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file())
    missing = {f"tensors/{name}" for name in checkpoint.tensor_files(staging)} - set(names)
    if missing:
        raise FileNotFoundError(
            f"{sorted(missing)[0]} was written and is not in {staging}: do all ranks share this folder?"
        )
    return names


def _use_device(device: int | None) -> None:
    """A thread begins on GPU 0; each rank's would take memory there for a context of its own."""
    if device is not None:
        torch.cuda.set_device(device)


def _hash_share(staging: Path, names: list[str], alive: Callable[[], None]) -> dict[str, Any]:
    """Name -> manifest entry of this rank's share of the files."""
    return {name: checkpoint.describe(staging / name, alive) for name in names[ranks.rank() :: ranks.world_size()]}
