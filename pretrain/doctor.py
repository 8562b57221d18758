"""`pretrain doctor`: before the big run, on the machines and with the configuration of the run.

    every rank: versions, device, folder, shards, clock ──> gathered ─┐
    ranks in pairs and by host: all-reduce ───────────────────────────┴─> checkup.judge ─> a table, --exclude=, exit status

Started like the run itself, with the same configuration and overrides: alone, under torchrun or under srun. Nothing of the
run's folder is changed: a file is written in it, or in the nearest folder above it that exists, read, and removed. Exit status
1 where something is bad. On a CPU the lines about GPUs are left out.
"""

import argparse
import os
import shutil
import stat
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from pretrain import checkup, config, data, devices, init_from, metrics, parallel, ranks
from pretrain.checkup import Finding, Link, Measured, Needs
from pretrain.cli import fail
from pretrain.disk import checkpoint_bytes, checkpoints_kept
from pretrain.hosts import this_host
from pretrain.memory import Layout
from pretrain.model import count
from pretrain.speed import sent_bytes
from pretrain.versions import RUN_PACKAGES, own_version, versions

_STYLE = {"ok": "green", "warn": "yellow", "bad": "bold red"}


def main(argv: list[str]) -> int:
    """The command `pretrain doctor`."""
    command = "pretrain doctor"
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--seconds", type=float, default=2.0)
    args, rest = own.parse_known_args(argv)
    purpose = "Check what the run will need: machines, links, files. --seconds S: measure each speed for S seconds (2)."
    try:
        if not args.seconds > 0:
            raise ValueError(f"--seconds {args.seconds:g}: it must be above 0")
        settings = config.parse(rest, command, purpose)
        init_from.check(settings)
        fabric, sharding = parallel.launch(settings.parallel, settings.model, [])
        grad_accum_steps = config.grad_accum_steps(settings.train, fabric.world_size)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        nodes, batch = fabric.world_size // local, settings.train.micro_batch_size
        layout = Layout.of(settings.parallel, sharding, nodes, local, batch, grad_accum_steps)
    except (ValueError, OSError) as error:
        fail(command, error)
    measured, links, needs = examine(settings, layout, fabric.device, args.seconds)
    findings = checkup.judge(measured, links, needs)
    if ranks.rank() == 0:
        show(findings, len(measured))
    parallel.leave()
    return int(any(finding.status == "bad" for finding in findings))


def examine(
    settings: config.Config, layout: Layout, device: torch.device, seconds: float
) -> tuple[list[Measured], list[Link], Needs]:
    """Measure everything; called by all ranks, the same result on all. layout: the run's on these ranks."""
    host = this_host()
    mine: dict[str, Any] = {"rank": ranks.rank(), "host": host, "versions": _versions()}
    mine["device"] = parallel.device_name(device)
    mine["clock_skew_s"] = _clock_skew()
    mine |= devices.look(settings, device, seconds)
    mine |= _look_at_shards(settings, seconds)
    ranks.barrier()
    mine["folder_problem"], mine["write_bytes_per_s"], free = _look_at_folder(settings, seconds)
    measured = ranks.gather(Measured(**mine))
    free = max(ranks.gather(free))  # by any rank that could ask
    needs = _needs(settings, layout, [rank.product_flops or float("nan") for rank in measured], free)
    broken = any(rank.device_problem for rank in measured)  # it would have the others wait for ever
    links = [] if broken else _measure_links([rank.host for rank in measured], device, seconds)
    return measured, links, needs


def show(findings: list[Finding], world_size: int) -> None:
    """The table, and what to do."""
    table = Table(title=f"pretrain doctor on {world_size} ranks", title_justify="left")
    for name in ("host", "check", "", "found", "wanted"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        status = f"[{_STYLE[finding.status]}]{finding.status}[/]"
        table.add_row(finding.host, finding.check, status, finding.found, finding.wanted)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # lines stay whole in a file
    console.print(table)
    bad = [finding for finding in findings if finding.status == "bad"]
    for finding in bad:
        console.print(f"bad: {finding.host}: {finding.check}: {finding.found}", markup=False)
    if hosts := checkup.excluded(findings):
        console.print(f"leave them out: sbatch --exclude={','.join(hosts)} ...", markup=False)
    if not bad:
        console.print("nothing is bad")


# --- what each rank measures -----------------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    """Of everything whose difference between ranks is a bug to come."""
    found = versions(*RUN_PACKAGES, "numpy")
    found["cria"] = own_version()
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        driver = devices.output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = driver.splitlines()[0] if driver else "unknown"
    return found


def _clock_skew() -> float:
    """How far this host's clock is before rank 0's (seconds), by the quickest of eight questions; asked in turn."""
    skew = 0.0
    for other in range(1, ranks.world_size()):
        if ranks.rank() in (0, other):
            skew = _ask_clock(other)
    ranks.barrier()
    return skew


def _ask_clock(other: int) -> float:
    """Rank `other` asks rank 0 for the time; returns, on `other`, its own clock less rank 0's."""
    box = torch.zeros((), dtype=torch.float64)
    best = (float("inf"), 0.0)
    for _ in range(8):
        if ranks.rank() == 0:
            dist.recv(box, src=other)
            dist.send(torch.tensor(time.time(), dtype=torch.float64), dst=other)
            continue
        asked, began = time.time(), time.perf_counter()
        dist.send(box, dst=0)
        dist.recv(box, src=0)
        took = time.perf_counter() - began
        best = min(best, (took, asked + took / 2 - box.item()))
    return best[1]


def _look_at_shards(settings: config.Config, seconds: float) -> dict[str, Any]:
    """Open all, compare sizes, check one whole shard a dataset, another one on each rank; read sequences at random."""
    try:
        seq_len, vocab_size = settings.data.seq_len, settings.model.vocab_size
        sources = data.open_sources(settings.data, vocab_size)
        sets = data.open_sets(settings.validation.sets, sources, seq_len, vocab_size)
        datasets = data.datasets(sources, sets)
        for dataset in datasets:
            shards = len(dataset.manifest.shards)
            problem = dataset.check(share=(ranks.rank() % shards, shards))
            if problem is not None:
                return {"shard_problem": problem}
        seen = " ".join(dataset.signature() for dataset in datasets)
        rng = np.random.default_rng(ranks.rank())
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < min(seconds, 1.0):
            for source in sources:
                indices = rng.integers(0, source.train.num_sequences(settings.data.seq_len), 16)
                source.train.sequences(indices, settings.data.seq_len)
                count += 16
        item = np.dtype(datasets[0].manifest.shards[0].dtype).itemsize
        speed = count * (settings.data.seq_len + 1) * item / (time.perf_counter() - began)
    except (ValueError, OSError) as error:
        return {"shard_problem": " ".join(str(error).split())}
    return {"shards_seen": seen, "read_bytes_per_s": speed}


def _look_at_folder(settings: config.Config, seconds: float) -> tuple[str | None, float | None, int]:
    """Write a file, bring it to the disk, read it back, remove it; all ranks at once.

    It lies in the run's folder, or in the nearest folder above it that exists. Returns what is wrong, or None; bytes/s; and how
    much is free (bytes).
    """
    path, problem, speed, free = None, None, None, 0
    try:
        folder = _existing(Path(settings.run_dir))
        free = shutil.disk_usage(folder).free
        path = folder / f".doctor-{ranks.rank()}-{os.getpid()}"
        speed = _write_and_read(path, seconds)
    except OSError as error:
        problem = str(error)
    finally:
        try:
            if path is not None:
                path.unlink(missing_ok=True)
        except OSError as error:  # on a read-only one it is raised for a missing file, too
            problem = problem or str(error)
    return problem, None if problem else speed, free


def _write_and_read(path: Path, seconds: float) -> float:
    """Bytes/s of writing a file to the disk. Raises OSError where that fails, or something else is read than was written."""
    block = np.random.default_rng(ranks.rank()).bytes(4 << 20)
    written = 0
    began = time.perf_counter()
    with open(path, "wb") as file:
        while written == 0 or (time.perf_counter() - began < seconds and written < 1 << 30):
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written += len(block)
    took = time.perf_counter() - began
    with open(path, "rb") as file:
        file.seek(-len(block), os.SEEK_END)
        if file.read() != block:
            raise OSError(f"{path.parent}: what was read is not what was written")
    return written / took


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that there is. Raises OSError for one that is there and cannot be looked at."""
    folder = Path(os.path.realpath(folder))
    while True:
        try:
            if stat.S_ISDIR(os.stat(folder).st_mode):
                return folder
        except (FileNotFoundError, NotADirectoryError):
            pass
        folder = folder.parent


# --- what ranks measure together -------------------------------------------------------------------------------------


def _measure_links(hosts: list[str], device: torch.device, seconds: float) -> list[Link]:
    """All-reduces: among the ranks of each host, one host after the other; then from each host to the next, one pair after the
    other, all of a pair's ranks at once, each with the other host's of the same local rank: by rails, as a hybrid run does.
    """
    if len(hosts) == 1:
        return []
    by_host = {host: [rank for rank, its in enumerate(hosts) if its == host] for host in dict.fromkeys(hosts)}
    at_once: list[tuple[tuple[str, ...], list[list[int]]]] = [
        ((h,), [members]) for h, members in by_host.items() if len(members) > 1
    ]
    names = list(by_host)
    pairs = list(pairwise(names)) + ([(names[-1], names[0])] if len(names) > 2 else [])
    at_once += [((a, b), [list(ends) for ends in zip(by_host[a], by_host[b])]) for a, b in pairs]
    results = []
    for where, rails in at_once:
        groups = [dist.new_group(members) for members in rails]  # called by all
        mine = next((group for group, members in zip(groups, rails) if ranks.rank() in members), None)
        tensor = torch.ones(2**26 if device.type == "cuda" else 2**20, device=device)
        if mine is not None:
            dist.all_reduce(tensor, group=mine)  # NCCL connects ranks at the first sum of a size
            devices.finish(device)
        ranks.barrier()
        speeds = ranks.gather(0.0 if mine is None else _all_reduce_speed(mine, tensor, seconds))
        results += [Link(where, min(speeds[n] for n in members), rail) for rail, members in enumerate(rails)]
    return results


def _all_reduce_speed(group: dist.ProcessGroup, tensor: torch.Tensor, seconds: float) -> float:
    """Bytes/s that each member sends: 2 (n - 1) / n of the tensor an all-reduce (a ring's traffic)."""
    device, size = tensor.device, dist.get_world_size(group)
    times = 20 if device.type == "cuda" else max(2, int(5 * seconds))  # the same number on all members
    began = time.perf_counter()
    for _ in range(times):
        dist.all_reduce(tensor, group=group)
    devices.finish(device)
    return 2 * (size - 1) / size * tensor.nbytes * times / (time.perf_counter() - began)


def _needs(settings: config.Config, layout: Layout, flops: list[float], free_bytes: int) -> Needs:
    """What the run asks, with steps as long as they are at half the speed of the measured matrix product."""
    sizes = count(settings.model)
    T, G = settings.data.seq_len, settings.train.global_batch_size
    per_token = metrics.flops_per_token(settings.model, T, sizes.total, sizes.in_products)["m1"]
    step_s = G * T * per_token / (0.5 * min(flops) * len(flops))
    saves = settings.checkpoint
    by_steps_s = saves.every_steps * step_s if saves.every_steps else None
    by_clock_s = 60 * saves.every_minutes if saves.every_minutes and saves.keep_last else None
    return Needs(
        checkpoint_bytes=checkpoint_bytes(settings.model),
        kept=checkpoints_kept(saves, settings.train.max_steps, settings.optim.lr_decay_steps),
        free_bytes=free_bytes,
        save_every_s=min((s for s in (by_steps_s, by_clock_s) if s is not None), default=None),
        read_bytes_per_s=G * (T + 1) * 4 / step_s / len(flops),  # at most four bytes an id
        send_bytes_per_s=_sent_across(sizes.total, layout) / step_s,
    )


def _sent_across(parameters: int, layout: Layout) -> float:
    """Bytes that a host sends to others in a step: a ring larger than a host leaves it once; each rank has its own replicas."""
    *in_ring, to_replicas = sent_bytes(parameters, layout)
    if layout.nodes == 1:
        return 0.0
    own = to_replicas * min(layout.shards, layout.gpus_per_node)
    return own + (sum(in_ring) if layout.shards > layout.gpus_per_node else 0.0)
