"""Faults 1, 8, 9, 10 and 13, made in whole training runs on 1, 2 and 4 ranks (see faults.py).

A tiny model trains 24 steps over data so short that a run goes through four epochs of it. The undisturbed run of as many
ranks is the reference; every line that a disturbed run ever logged must be the reference's, and its last checkpoint too.
"""

import dataclasses
import json
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_config, write_config, write_dataset
from forks import HUNG, die_at_a_commit, die_in_a_save, finish, gone, kill, start_training, train_to_the_end

from data_prep.shard import Manifest
from pretrain import checkpoint, config

STEPS = 24
KILLS_A_RUN = 4
LENGTHS = (35, 15)
"""Sequences of the two sources."""
SHARES, LATER, CHANGE = (5.6, 2.4), (4.0, 4.0), 13
"""Of each source, how many sequences a step takes; from step CHANGE on the second figures."""
SAVED = 3
"""Steps between saves."""


def make_data(folder: Path) -> Path:
    """Two sources that a run goes through more than twice."""
    for seed, name in enumerate("ab"):
        write_dataset(folder / name / "train", LENGTHS[seed] * 32 + 5, seed)
        write_dataset(folder / name / "validation", 200, 10 + seed)
    return folder


def make_settings(data: Path, scratch: Path) -> config.Config:
    """The configuration of all trials; each has its own run_dir."""
    tree = tiny_config(data, scratch / "run", train={"max_steps": STEPS}, validation={"every_steps": 6})
    tree["checkpoint"] = {"every_steps": SAVED, "keep_last": 2}
    tree["data"]["stages"] = [{"first_step": CHANGE, "weights": {"a": 1, "b": 1}}]
    return config.load(write_config(scratch / "trial.yaml", tree))


def at(settings: config.Config, run_dir: Path) -> config.Config:
    """The same in another folder."""
    return dataclasses.replace(settings, run_dir=str(run_dir))


def read_log(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """All lines of a kind, in the order in which they were written, but one that a kill tore."""
    path = run_dir / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["kind"] == kind:
            found.append(record)
    return found


def compare(run_dir: Path, reference: Path, exact: bool) -> None:
    """Every step there and the same sequences; all figures and tensors the same to the bit, or losses within 1e-5."""
    lines, expected = read_log(run_dir), {line["step"]: line for line in read_log(reference)}
    assert sorted({line["step"] for line in lines}) == sorted(expected) == list(range(1, STEPS + 1)), (
        "steps are missing"
    )
    for line in lines:
        step, want = line["step"], expected[line["step"]]
        assert line["data_hash"] == want["data_hash"], f"step {step} holds other sequences"
        for figure in ("loss", "grad_norm", "lr") if exact else ():
            assert line[figure] == want[figure], f"step {step}: {figure} {line[figure]!r}, not {want[figure]!r}"
        assert abs(line["loss"] - want["loss"]) <= 1e-5, f"step {step}: loss {line['loss']}, not {want['loss']}"
    validated, expected = (
        read_log(run_dir, "validation"),
        {line["step"]: line["losses"] for line in read_log(reference, "validation")},
    )
    assert {line["step"] for line in validated} == expected.keys() != set(), "validations are missing"
    for line in validated:
        step, losses, want = line["step"], line["losses"], expected[line["step"]]
        near = losses.keys() == want.keys() and all(abs(losses[name] - want[name]) <= 1e-5 for name in want)
        assert losses == want if exact else near, f"validation of step {step}: {losses}, not {want}"
    if exact:
        ours, theirs = (checkpoint.load_tensors(checkpoint.latest(folder, print)) for folder in (run_dir, reference))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), "the last checkpoint has other tensors"


# --- 1 and 9: kills --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Ranks, and how the model lies over them."""

    name: str
    ranks: int
    node_size: int | None = None
    """Ranks of a node; None: all."""
    parallel: dict[str, Any] = field(default_factory=dict)
    micro_batch_size: int = 2

    def settings(self, settings: config.Config, run_dir: Path) -> config.Config:
        """`settings` in this world, and in this folder."""
        train = dataclasses.replace(settings.train, micro_batch_size=self.micro_batch_size)
        parallel = dataclasses.replace(settings.parallel, **self.parallel)
        return dataclasses.replace(settings, run_dir=str(run_dir), train=train, parallel=parallel)


def plain(worlds: list[int]) -> list[World]:
    """Ranks of one node, as `auto` has them on a CPU."""
    return [World(f"{ranks} ranks", ranks) for ranks in worlds]


_OFTEN, _ONCE = {"gather": "layer", "reduce": "micro_step"}, {"gather": "step", "reduce": "step"}
LAYOUTS = [
    World(
        "hybrid, 2 nodes, exchanged once a step, bf16", 4, 2, {"strategy": "hybrid", **_ONCE, "precision": "bf16"}, 1
    ),
    World("shard_grad_op, bf16", 2, None, {"strategy": "shard_grad_op", **_ONCE, "precision": "bf16"}),
    World("hybrid, 2 nodes", 4, 2, {"strategy": "hybrid", **_OFTEN}, 1),
    World("full_shard, 2 nodes, recomputed", 4, 2, {"strategy": "full_shard", **_OFTEN, "recompute": "mlp"}, 1),
]
"""What `auto` takes on GPUs, and what a user may; two micro-steps each."""


def kill_trials(settings: config.Config, folder: Path, trials: int, seed: int, worlds: list[World]) -> dict:
    """Runs that are killed up to four times each, in each world in turn; `trials` kills in all, of no more worlds than that."""
    moments, places, failures, done = random.Random(seed), Counter[str](), [], 0
    worlds = worlds[:trials]
    straight = {world.name: folder / f"straight-{number}" for number, world in enumerate(worlds)}
    for world in worlds:
        train_to_the_end(world.ranks, world.settings(settings, straight[world.name]), world.node_size)
    deck: list[str] = []
    turn, kills_a_run = 0, min(KILLS_A_RUN, -(-trials // len(worlds)))
    while done < trials and len(failures) < trials:
        world = min(worlds, key=lambda world: places[world.name])  # where there were the fewest kills so far
        run_dir = folder / f"killed-{turn}"
        try:
            kills = min(kills_a_run, trials - done)
            done += kill_some(world, world.settings(settings, run_dir), kills, moments, deck, places)
            train_to_the_end(world.ranks, world.settings(settings, run_dir), world.node_size)
            compare(run_dir, straight[world.name], exact=True)
            places.update(resumes(run_dir))
            shutil.rmtree(run_dir)
        except AssertionError as error:
            failures.append(f"run {turn}, {world.name}: {error}")
        turn += 1
    return {"trials": done, "differ": len(failures), "failures": failures, "runs": turn, "places": dict(places)}


PLACES = {
    "all": "all ranks",
    "first": "rank 0 alone",
    "other": "another rank alone",
    "save": "a crash point of a save",
    "edge": "an epoch's edge",
}


def kill_some(
    world: World, settings: config.Config, kills: int, moments: random.Random, deck: list[str], places: Counter[str]
) -> int:
    """Kill a run so many times, or until it is done; counts each kill in `places` and returns how many there were.

    The last of several kills is where the next step goes into another epoch, if there is such a place left; all others are of
    the kinds in `deck`, by turns. A run that is killed once is killed when it has a checkpoint to go on from. Ranks that lose
    another one must end by themselves.
    """
    run_dir = Path(settings.run_dir)
    start = partial(start_training, world.ranks, settings, node_size=world.node_size)
    for number in range(kills):
        edge = _next_edge(run_dir) if 0 < number == kills - 1 else None
        how, trained, victims = "edge" if edge else _draw(deck, moments), True, [0]
        if edge:
            pids = start(before=die_at_a_commit(edge))
        elif how == "save":
            pids = start(before=die_in_a_save(moments.randrange(1, 50), moments.random() < 0.5, later=kills == 1))
        else:
            pids = start()
            trained = _wait(run_dir, pids[0], moments, early=kills > 1)
            every = range(world.ranks)
            victims = {"all": [*every], "first": [0], "other": [moments.choice(every[1:] or every)]}[how]
            kill([pids[victim] for victim in victims])
        # Who has not yet met the others knows nothing of their end, and waits: its launcher would end it.
        statuses = finish(pids, patience_s=120 if trained else 5)
        if -9 not in statuses:
            deck += [] if edge else [how]
            return number
        assert not trained or HUNG not in statuses, f"{PLACES[how]} was killed, and others hung: {statuses}"
        places[world.name] += 1
        places[PLACES["all" if len(victims) == world.ranks and how in ("first", "other") else how]] += 1
        places["fell into a save"] += any((run_dir / "checkpoints").glob(".*"))
        for left in (path for _, path in checkpoint.committed(run_dir)):
            problem = checkpoint.verify(left)
            assert problem is None, f"{left} is committed and not whole: {problem}"
    return kills


def _draw(deck: list[str], moments: random.Random) -> str:
    """The next kind of kill: in a random order, and each as often as the others."""
    if not deck:
        deck += moments.sample(["all", "first", "other", "save"], 4)
    return deck.pop()


def _wait(run_dir: Path, pid: int, moments: random.Random, early: bool = True) -> bool:
    """Until a random moment, up to seven steps later; returns whether the ranks train.

    early: in a quarter of the cases it is while the run starts; else there is a checkpoint first.
    """
    if early and moments.random() < 0.25:
        time.sleep(moments.uniform(0.0, 1.0))
        return False
    enough = len(read_log(run_dir)) + moments.randrange(1, 8)
    while (len(read_log(run_dir)) < enough or not (early or checkpoint.committed(run_dir))) and not gone(pid):
        time.sleep(0.005)
    time.sleep(moments.uniform(0.0, 0.2))
    return True


def resumes(run_dir: Path) -> Counter[str]:
    """How often the run went on from a checkpoint, in the second or a later epoch of a source, and at an epoch's edge."""
    counts = Counter[str]()
    for step in (line["step"] for line in read_log(run_dir, "start")):
        counts["resumed"] += 0 < step < STEPS
        counts["resumed in epoch 2 or later"] += any(taken >= n for taken, n in zip(_taken(step), LENGTHS))
        counts["resumed at an epoch's edge"] += _at_an_edge(step)
    return counts


def _next_edge(run_dir: Path) -> int | None:
    """The first step after the newest checkpoint that is saved and at an epoch's edge."""
    newest = max((step for step, _ in checkpoint.committed(run_dir)), default=0)
    return next((step for step in range(newest + 1, STEPS) if step % SAVED == 0 and _at_an_edge(step)), None)


def _at_an_edge(step: int) -> bool:
    """Whether the step after this one goes into another epoch of a source."""
    return step > 0 and any(a // n < b // n for a, b, n in zip(_taken(step), _taken(step + 1), LENGTHS))


def _taken(steps: int) -> list[float]:
    """Sequences of each source in the first `steps` steps."""
    late = max(0, steps - CHANGE + 1)
    return [(steps - late) * before + late * after for before, after in zip(SHARES, LATER)]


def repeat_trials(settings: config.Config, folder: Path, trials: int, worlds: list[int]) -> dict:
    """The same undisturbed run again: bit for bit the first one."""
    failures, seen = [], Counter[str]()
    for ranks in worlds:
        train_to_the_end(ranks, at(settings, folder / f"first-{ranks}"))
        for _ in range(trials):
            again = at(settings, folder / "again")
            try:
                train_to_the_end(ranks, again)
                compare(folder / "again", folder / f"first-{ranks}", exact=True)
            except AssertionError as error:
                failures.append(f"{ranks} ranks: {error}")
            seen[f"{ranks} ranks"] += 1
            shutil.rmtree(folder / "again")
    return {"trials": sum(seen.values()), "differ": len(failures), "failures": failures, "places": dict(seen)}


# --- 8: other ranks --------------------------------------------------------------------------------------------------


def elastic_trials(settings: config.Config, folder: Path, trials: int, seed: int) -> dict:
    """Two kills a run, the second at an epoch's edge, each start on another number of ranks, micro-batch and workers."""
    moments, failures, shapes = random.Random(seed), [], Counter[str]()
    train_to_the_end(1, at(settings, folder / "straight"))
    before_the_last_edge = max(filter(_at_an_edge, range(0, STEPS, SAVED))) - SAVED
    for trial in range(trials):
        run_dir = folder / f"elastic-{trial}"
        try:
            for number in range(3):
                ranks, workers = moments.choice([1, 2, 4]), moments.choice([0, 1, 2, 4])
                micro_batch = moments.choice([b for b in (1, 2, 4, 8) if 8 % (b * ranks) == 0])
                now = dataclasses.replace(
                    at(settings, run_dir),
                    data=dataclasses.replace(settings.data, num_workers=workers),
                    train=dataclasses.replace(settings.train, micro_batch_size=micro_batch),
                )
                shapes.update({f"{ranks} ranks": 1, f"{workers} workers": 1, f"micro-batch {micro_batch}": 1})
                if number == 2:
                    train_to_the_end(ranks, now)
                    break
                if number == 1 and (edge := _next_edge(run_dir)):
                    statuses = finish(start_training(ranks, now, die_at_a_commit(edge)), patience_s=120)
                    assert -9 in statuses, "not killed"
                    assert HUNG not in statuses, statuses
                    continue
                pids = start_training(ranks, now, die_at_a_commit(before_the_last_edge))
                _wait(run_dir, pids[0], moments)
                kill(pids)
                finish(pids)
            compare(run_dir, folder / "straight", exact=False)
            shapes.update(resumes(run_dir))
            shutil.rmtree(run_dir)
        except AssertionError as error:
            failures.append(f"run {trial}: {error}")
    return {"trials": trials, "differ": len(failures), "failures": failures, "places": dict(shapes)}


# --- 10: data --------------------------------------------------------------------------------------------------------

SPOILT = ("truncated", "flipped", "swapped", "wrong dtype", "wrong tokenizer", "id beyond the vocabulary")


def data_trials(settings: config.Config, folder: Path, trials: int, seed: int) -> dict:
    """A shard or manifest that is not what it should be: refused before step 1 in one line that names the file."""
    moments, failures, kinds = random.Random(seed), [], Counter[str]()
    good = Path(settings.data.sources[0].train).parents[1]
    for trial in range(trials):
        kind = SPOILT[trial % len(SPOILT)]
        data, run_dir = folder / f"data-{trial}", folder / f"spoilt-{trial}"
        shutil.copytree(good, data)
        named = spoil(data / moments.choice("ab") / "train", kind, moments)
        sources = [
            dataclasses.replace(entry, train=entry.train.replace(str(good), str(data)))
            for entry in settings.data.sources
        ]
        now = dataclasses.replace(at(settings, run_dir), data=dataclasses.replace(settings.data, sources=sources))
        statuses = finish(start_training(1, now))
        said = (run_dir / "output.txt").read_text()
        if statuses != [2] or named not in said or "Traceback" in said or read_log(run_dir):
            failures.append(f"trial {trial}: {kind}: {statuses}, {named} was to be named: {said[-300:]}")
        kinds[kind] += 1
        shutil.rmtree(data)
        shutil.rmtree(run_dir)
    return {"trials": trials, "missed": len(failures), "failures": failures, "places": dict(kinds)}


def spoil(dataset: Path, kind: str, moments: random.Random) -> str:
    """Spoil one shard, or what the manifest says of it; returns the name that a refusal must give."""
    number = moments.randrange(3)
    shard = dataset / "shards" / f"part-{number}.npy"
    content = bytearray(shard.read_bytes())
    if kind in ("wrong dtype", "wrong tokenizer", "id beyond the vocabulary"):
        manifest = Manifest.load(dataset)
        if kind == "wrong dtype":
            shards = list(manifest.shards)
            shards[number] = dataclasses.replace(shards[number], dtype="uint32")
            manifest = dataclasses.replace(manifest, shards=tuple(shards))
        elif kind == "wrong tokenizer":
            tokenizer = dataclasses.replace(manifest.tokenizer, fingerprint=f"sha256:{moments.randrange(16**8):064x}")
            manifest = dataclasses.replace(manifest, tokenizer=tokenizer)
        else:
            tokenizer = dataclasses.replace(manifest.tokenizer, vocab_size=moments.randrange(100, 290))
            manifest = dataclasses.replace(manifest, tokenizer=tokenizer)
        manifest.save(dataset)
        return shard.name if kind == "wrong dtype" else str(dataset)
    if kind == "truncated":
        del content[-2 * moments.randrange(1, 100) :]
    elif kind == "flipped":
        content[moments.randrange(128, len(content))] ^= 1 << moments.randrange(8)
    else:
        other = (dataset / "shards" / f"part-{(number + 1) % 3}.npy").read_bytes()[128:]
        content[128:] = (other + other)[: len(content) - 128]
    shard.write_bytes(content)
    return shard.name


# --- 13: two jobs ----------------------------------------------------------------------------------------------------


def two_jobs_trials(settings: config.Config, folder: Path, trials: int, seed: int, worlds: list[int]) -> dict:
    """Two jobs started on one folder at once, or the second some time later: one is refused, the other trains as if alone."""
    moments, failures, seen = random.Random(seed), [], Counter[str]()
    for ranks in worlds:
        train_to_the_end(ranks, at(settings, folder / f"alone-{ranks}"))
    for trial in range(trials):
        ranks, run_dir = worlds[trial % len(worlds)], folder / f"jobs-{trial}"
        first = start_training(ranks, at(settings, run_dir))
        wait = moments.choice([0.0, moments.uniform(0.0, 1.0)])
        time.sleep(wait)
        second = start_training(ranks, at(settings, run_dir))
        statuses = sorted([finish(first), finish(second)])
        said = (run_dir / "output.txt").read_text()
        finished = f"resumed after step {STEPS}" in said  # the second came when the first had ended
        seen["after the end" if finished else "at once" if wait == 0 else "later"] += 1
        try:
            assert finished or statuses == [[0] * ranks, [2] * ranks], f"{statuses}\n{said[-2000:]}"
            assert finished or "is writing into" in said
            compare(run_dir, folder / f"alone-{ranks}", exact=True)
            assert len(read_log(run_dir)) == STEPS, "both wrote"
            shutil.rmtree(run_dir)
        except AssertionError as error:
            failures.append(f"trial {trial} on {ranks} ranks: {error}")
    return {"trials": trials, "missed": len(failures), "failures": failures, "places": dict(seen)}
