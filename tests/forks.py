"""Ranks as forked processes, to be killed: the parent has imported everything, so that a start takes a tenth of a second."""

import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import torch.distributed as dist
from processes import free_port

from pretrain import config, parallel, preparation, train, trainer

assert preparation
assert trainer  # imported for the children


def fork_ranks(ranks: int, output: Path, body: Callable[[int], int | None], node_size: int | None = None) -> list[int]:
    """Start `body(rank)` in `ranks` processes with the variables that torchrun sets; they exit with what it returns.

    node_size: ranks of a node, for all that they know; None: they are all of one.
    """
    port = free_port()
    return [_fork(rank, ranks, node_size or ranks, port, output, body) for rank in range(ranks)]


def _fork(rank: int, ranks: int, node_size: int, port: int, output: Path, body: Callable[[int], int | None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        with open(output, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if ranks > 1:
            node, local_rank = divmod(rank, node_size)
            places = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": node_size}
            os.environ.update({name: str(value) for name, value in (places | {"GROUP_RANK": node}).items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="faults")
        status = body(rank) or 0
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def start_training(
    ranks: int,
    settings: config.Config,
    before: Callable[[int], None] = lambda rank: None,
    output: Path | None = None,
    node_size: int | None = None,
) -> list[int]:
    """`pretrain train` with settings that are parsed already; `before` is called in each process with its rank."""

    def body(rank: int) -> int:
        config.parse = lambda argv: settings  # type: ignore[assignment]
        before(rank)
        return train.main([])

    run_dir = Path(settings.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    return fork_ranks(ranks, output or run_dir / "output.txt", body, node_size)


def with_group(ranks: int, body: Callable[[int], int | None]) -> Callable[[int], int | None]:
    """`body` inside a gloo process group, where there is more than one rank."""

    def joined(rank: int) -> int | None:
        if ranks > 1:
            dist.init_process_group("gloo")
        status = body(rank)
        parallel.leave()
        return status

    return joined


HUNG = -99
"""The status of a process that had to be killed, because it did not end."""


def finish(pids: list[int], patience_s: float = 60, limit_s: float = 600) -> list[int]:
    """Wait for all; when one is gone the others get `patience_s` to go by themselves. Returns statuses, -9 for killed.

    Nothing is waited for without end: after `limit_s` all are killed. Who is killed here has the status HUNG.
    """
    statuses: dict[int, int] = {}
    hung: set[int] = set()
    deadline, first = time.monotonic() + limit_s, True
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
                    deadline, first = time.monotonic() + patience_s if first else deadline, False
        if time.monotonic() > deadline:
            late = set(pids) - set(statuses)
            kill(list(late))
            hung |= late
        time.sleep(0.005)
    return [HUNG if pid in hung and statuses[pid] == -9 else statuses[pid] for pid in pids]


def kill(pids: list[int]) -> None:
    """SIGKILL, now."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def gone(pid: int) -> bool:
    """Whether a child has ended, without reaping it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def train_to_the_end(ranks: int, settings: config.Config, node_size: int | None = None) -> None:
    """Train undisturbed until the run is done."""
    statuses = finish(start_training(ranks, settings, node_size=node_size))
    if statuses != [0] * ranks:
        output = (Path(settings.run_dir) / "output.txt").read_text()
        raise AssertionError(f"{settings.run_dir} ended with {statuses}\n{output[-3000:]}")


def die_in_a_save(count: int, after: bool, later: bool = False) -> Callable[[int], None]:
    """Makes rank 0 kill itself right before or after the `count`-th call that touches the disk from the saver's thread.

    later: the count begins when there is a checkpoint.
    """

    def arm(rank: int) -> None:
        if rank != 0:
            return
        calls, counting = 0, not later

        def counted(call: Callable) -> Callable:
            def wrapper(*args: object, **options: object) -> object:
                nonlocal calls, counting
                if not threading.current_thread().name.startswith("saver"):
                    return call(*args, **options)
                calls += counting
                mine = counting and calls == count  # a call may make others
                if mine and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = call(*args, **options)
                if mine:
                    os.kill(os.getpid(), signal.SIGKILL)
                counting = counting or (call is rename and Path(args[1]).name.startswith("step-"))  # type: ignore[arg-type]
                return result

            return wrapper

        rename = os.rename
        for name in ("fsync", "rename", "open", "mkdir", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        Path.mkdir = counted(Path.mkdir)  # type: ignore[method-assign]
        shutil.rmtree = counted(shutil.rmtree)  # type: ignore[assignment]

    return arm


def die_at_a_commit(step: int) -> Callable[[int], None]:
    """Makes rank 0 kill itself as soon as the checkpoint of this step is one."""
    return die_at_a_rename(f"step-{step:08d}")


def die_at_a_rename(pattern: str) -> Callable[[int], None]:
    """Makes rank 0 kill itself as soon as a file or folder has got a name like this one."""

    def arm(rank: int) -> None:
        rename = os.rename

        def renamed(source: os.PathLike, target: os.PathLike) -> None:
            rename(source, target)
            if fnmatch(Path(target).name, pattern):
                os.kill(os.getpid(), signal.SIGKILL)

        if rank == 0:
            os.rename = renamed  # type: ignore[assignment]

    return arm
