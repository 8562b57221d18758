"""Faults 2 and 3, made in the saver alone, on 1 and 2 ranks (see faults.py).

A small sharded model whose every tensor is filled with the number of its save: a checkpoint that holds two numbers is a mix.
"""

import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from forks import die_at_a_rename, die_in_a_save, finish, fork_ranks, gone, kill, with_group
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pretrain import checkpoint, ranks, saver
from pretrain.sections import CheckpointConfig

KEEP = CheckpointConfig(keep_last=2)


class Filled:
    """A model and its optimizer, sharded where there are several ranks, and a saver."""

    def __init__(self, run_dir: Path, say: Callable[[str], None] = print) -> None:
        self.model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
        if dist.is_initialized():
            fully_shard(self.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        checkpoint.tensors_of(self.model, self.optimizer)  # makes the optimizer's state
        self.saver = saver.Saver(run_dir, KEEP, say)

    def save(self, step: int, number: int) -> None:
        """Fill all tensors with `number` and save them as `step`."""
        with torch.no_grad():
            for tensor in checkpoint.tensors_of(self.model, self.optimizer).values():
                (tensor.to_local() if hasattr(tensor, "to_local") else tensor).fill_(number)
        self.saver.save(step, self.model, self.optimizer, {"step": step, "save": number})


def check_all(run_dir: Path) -> tuple[int, int]:
    """There is a checkpoint; all that are committed are whole and of one save each. Returns the newest's step and save."""
    newest = checkpoint.latest(run_dir, warn=_fail)
    for _, folder in checkpoint.committed(run_dir):
        assert checkpoint.verify(folder) is None, f"{folder} is committed and not whole: {checkpoint.verify(folder)}"
        save = checkpoint.read_state(folder)["save"]
        for name, tensor in checkpoint.load_tensors(folder).items():
            assert bool((tensor == save).all()), f"{folder}: {name} is not of save {save}: a mix"
    state = checkpoint.read_state(newest)
    return state["step"], state["save"]


def _fail(line: str) -> None:
    raise AssertionError(line)


# --- 2: kills in saves -----------------------------------------------------------------------------------------------


def save_trials(folder: Path, trials: int, seed: int, worlds: list[int]) -> dict:
    """Ranks that do nothing but save, prune and save again what they had saved, killed at random moments and crash points.

    A kill that fell into none of these is checked too, and is not one of the `trials`.
    """
    moments, places, failures, turn = random.Random(seed), Counter[str](), [], 0
    deck: list[str] = []
    while places["kills"] < trials and len(failures) < trials:
        number = worlds[turn % len(worlds)]
        turn += 1
        run_dir = folder / f"saves-{number}"
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            before = check_all(run_dir) if checkpoint.committed(run_dir) else (0, 0)
            deck = deck or moments.sample(["all", "one", "point", "point", *NAMED], 4 + len(NAMED))
            if _kill_saver(run_dir, number, before, deck.pop(), moments):
                where = _where(run_dir)
                places.update({"kills": int(not where["fell into none"]), f"{number} ranks": 1, **where})
            if before == (0, 0) and not checkpoint.committed(run_dir):
                continue  # it was killed in its first save: there was none to lose
            step, save = check_all(run_dir)
            assert save >= before[1], f"save {save} of step {step} is older than what was there before: {before}"
        except (AssertionError, OSError) as error:
            failures.append(f"turn {turn} on {number} ranks: {type(error).__name__}: {error}")
            os.rename(run_dir, folder / f"failed-{turn}")
    return {"trials": places.pop("kills"), "differ": len(failures), "failures": failures, "places": dict(places)}


NAMED = {"prune": ".deleting-*", "replay": "*.old"}
"""Crash points that are few among all: where rank 0 has just given a folder such a name."""


def _kill_saver(run_dir: Path, number: int, before: tuple[int, int], how: str, moments: random.Random) -> bool:
    """Start ranks that save on from `before`, and kill all, or one, or rank 0 at a crash point; False: they came to the end."""
    point = (moments.randrange(1, 100), moments.random() < 0.5)
    plan = random.Random(moments.random())

    def body(rank: int) -> None:
        state = Filled(run_dir)
        if how == "point":
            die_in_a_save(*point)(rank)
        elif how in NAMED:
            die_at_a_rename(NAMED[how])(rank)
        step, save = before
        for _ in range(6 if before[0] else 8):
            # A run started again from an earlier checkpoint comes to a step once more.
            step, save = max(1, step - plan.choice([0, 0, 1, 2])) if plan.random() < 0.4 else step + 1, save + 1
            state.save(step, save)
        state.saver.close()

    pids = fork_ranks(number, run_dir / "output.txt", with_group(number, body))
    if how in ("all", "one"):
        if not before[0]:
            while not checkpoint.committed(run_dir) and not gone(pids[0]):
                time.sleep(0.002)
        else:
            _wait_for_a_save(run_dir, pids[0])
        time.sleep(moments.uniform(0.0, 0.3))
        kill(pids if how == "all" else [moments.choice(pids)])
    statuses = finish(pids, patience_s=5 if how in ("all", "one") else 60)
    assert -9 in statuses or set(statuses) == {0}, (run_dir / "output.txt").read_text()[-2000:]
    return -9 in statuses


def _wait_for_a_save(run_dir: Path, pid: int) -> None:
    while not any((run_dir / "checkpoints").glob(".staging-*")) and not gone(pid):
        time.sleep(0.002)


def _where(run_dir: Path) -> Counter[str]:
    """What the kill left behind says where it fell; removed by the next start."""
    folder = run_dir / "checkpoints"
    staged, doomed = list(folder.glob(".staging-*")), list(folder.glob(".deleting-*"))
    replaced = list(folder.glob("*.old")) or any(
        (folder / path.name.removeprefix(".staging-")).exists() for path in staged
    )
    found = Counter[str]()
    found["fell into a flush"] += bool(staged)
    found["fell into a prune"] += bool(doomed)
    found["fell into a replayed save"] += bool(replaced)
    found["fell into none"] += not (staged or doomed or replaced)
    return found


# --- 3: damage -------------------------------------------------------------------------------------------------------


def damage_trials(folder: Path, trials: int, seed: int) -> dict:
    """Damage a file of the newest checkpoint of two ranks: it must be found, and the one before taken. Undone after.

    trials: flipped bits; other kinds of damage come beside them. In every 25th trial two ranks, or four, look for a
    checkpoint: they agree, and the bad one is set aside.
    """
    run_dir, moments = folder / "damage", random.Random(seed)
    run_dir.mkdir(parents=True)

    def write(rank: int) -> None:
        state = Filled(run_dir)
        for step in (1, 2):
            state.save(step, step)
        state.saver.close()

    assert finish(fork_ranks(2, run_dir / "output.txt", with_group(2, write))) == [0, 0]
    check_all(run_dir)
    newest, before = (path for _, path in checkpoint.committed(run_dir))
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert len(files) == 5, "two ranks' tensors, their index, state, manifest"
    kinds, missed = Counter[str](), []
    count = 0
    while kinds["flip"] < trials:
        path, kind = moments.choice(files), moments.choice(KINDS)
        whole = path.read_bytes()
        damaged = damage(whole, kind, (before / path.relative_to(newest)).read_bytes(), moments)
        if damaged == whole or (path.name == "manifest.json" and damaged is not None and _same_json(damaged, whole)):
            continue  # a changed manifest that says the same is no damage: a flip in its white space, say
        path.unlink() if damaged is None else path.write_bytes(damaged)
        kinds[kind] += 1
        count += 1
        if checkpoint.latest(run_dir, warn=lambda line: None) != before:
            missed.append(f"{kind} of {path.relative_to(newest)}")
        if count % 25 == 0:
            number = 2 + 2 * (count % 50 == 0)
            kinds[f"{number} ranks agree and set it aside"] += 1
            missed += _disagreements(run_dir, newest, before, number)
        path.write_bytes(whole)
    return {"trials": trials, "missed": len(missed), "failures": missed, "places": dict(kinds)}


KINDS = ("flip", "flip", "flip", "flip", "flip", "flip", "zero", "truncate", "delete", "swap")


def damage(whole: bytes, kind: str, other: bytes, moments: random.Random) -> bytes | None:
    """The damaged content of a file, None for a deleted one."""
    place = moments.randrange(len(whole))
    if kind == "flip":
        return whole[:place] + bytes([whole[place] ^ 1 << moments.randrange(8)]) + whole[place + 1 :]
    if kind == "zero":
        return whole[:place] + bytes(len(whole[place : place + 512])) + whole[place + 512 :]
    return {"truncate": whole[:place], "swap": other, "delete": None}[kind]


def _same_json(a: bytes, b: bytes) -> bool:
    try:
        first, second = json.loads(a), json.loads(b)
        return first == second
    except ValueError:
        return False


def _disagreements(run_dir: Path, newest: Path, before: Path, number: int) -> list[str]:
    """Have so many ranks find a checkpoint; brings back what they set aside."""

    def find(rank: int) -> int:
        found = ranks.gather(checkpoint.find(run_dir, warn=print))
        return 0 if found == [before] * number else 1

    statuses = finish(fork_ranks(number, run_dir / "output.txt", with_group(number, find)))
    aside = newest.with_name(f"corrupt-{newest.name}.1")
    wrong = [] if statuses == [0] * number and aside.is_dir() else [f"{number} ranks ended with {statuses}"]
    if aside.is_dir():
        os.rename(aside, newest)
    return wrong
