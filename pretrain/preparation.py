"""How a run begins, or goes on: everything that can be wrong is found here, before the first step.

Config ─> manifests opened, mixture ─> ranks join ─> run folder locked ─> shards verified ─> newest whole checkpoint? same run?
─> model on its devices, optimizer ─> checkpoint, or --init_from, or the first weights ─> Run
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from data_prep.shard import TOKENIZER_DIR, check_tokenizer, write_atomically
from pretrain import checkpoint, config, data, going_on, metrics, pace, parallel, ranks, saver, scheduler
from pretrain.lock import Lock
from pretrain.memory import checkpoint_bytes
from pretrain.model import num_parameters
from pretrain.optim import learning_rate, make_optimizer
from pretrain.reading import json_mapping, yaml_mapping
from pretrain.run import Begun, Run
from pretrain.sections import OptimConfig
from pretrain.sharding import Sharding
from pretrain.watchdog import Watchdog, alive, at

_SHARED_S = 60.0
"""How long a file of rank 0's may stay unseen by another rank, before run_dir is taken for two different folders (seconds)."""


def prepare(settings: config.Config, stop: scheduler.Stop | None = None, saves: bool = True) -> Run:
    """Open the data, build the model, and load the checkpoint that the run goes on from, if there is one.

    saves: False for a benchmark, which needs no room for a checkpoint.

    Raises:
        ValueError, OSError: something that the user can mend, in one line.
        SystemExit: a rank got a signal while the shards were read, which may take long; on all ranks.
    """
    sources = data.open_sources(settings.data, settings.model.vocab_size)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # as in data.open_sources
        check_tokenizer(sources[0].train.directory, sources[0].train.manifest.tokenizer)  # an export ships it
    mixture = data.make_mixture(sources, settings.data, settings.seed, settings.train.global_batch_size)
    fabric, sharding = parallel.launch(
        settings.parallel, settings.model, metrics.make_loggers(settings), settings.train.deterministic
    )
    accumulate = config.grad_accum_steps(settings.train, fabric.world_size)
    with ExitStack() as on_failure:
        guard = on_failure.enter_context(Watchdog(settings))
        on_failure.enter_context(_enter(Path(settings.run_dir)))
        if settings.data.verify == "full":
            _verify_shards(Path(settings.run_dir) / "verified.json", sources, stop)
        run = _build(settings, fabric, sharding, sources, mixture, accumulate, saves)
        run.at_end = on_failure.pop_all()
        guard.rest()
    return run


def _build(
    settings: config.Config,
    fabric: Fabric,
    sharding: Sharding,
    sources: list[data.Source],
    mixture: data.Mixture,
    accumulate: int,
    saves: bool,
) -> Run:
    """The model and the optimizer, as they are before the next step."""
    run_dir = Path(settings.run_dir)
    facts = going_on.facts(settings, sources, mixture)
    at("choosing a checkpoint")
    found = going_on.choose(run_dir, settings, facts, sources, say=fabric.print)
    eos_id = _eos_id(sources) if settings.data.intra_document else None
    at("building the model")
    model = parallel.build(fabric, settings.model, settings.parallel, settings.seed, settings.train.z_loss, eos_id)
    done = 0 if found is None else checkpoint.read_state(found)["step"]
    operations = [asdict(choice) for choice in parallel.unwrap(model).operations.choices]
    will_save = saves and done < settings.train.max_steps
    _fill_folder(settings, run_dir, sources, operations, fabric, done, will_save)
    log = metrics.MetricsLog(run_dir, fabric)
    optimizer = make_optimizer(parallel.unwrap(model), settings.optim)
    step = 0
    skipped_steps = torch.zeros((), device=fabric.device)
    skipped_in_a_row = torch.zeros((), device=fabric.device)
    tokens: dict[str, int] = {}
    at("loading the checkpoint")
    if found is not None:
        state = checkpoint.load(found, parallel.unwrap(model), optimizer)
        step = state["step"]
        skipped_steps += step - state["updates"]
        skipped_in_a_row += state.get("skipped_in_a_row", 0)
        tokens = state["tokens_per_source"]
        if settings.init_from is not None:
            fabric.print(f"{run_dir} has a checkpoint: the run goes on from it, and --init_from changes nothing")
    elif settings.init_from is not None:
        going_on.init_from(settings, sources, parallel.unwrap(model), say=fabric.print)
    return Run(
        config=settings,
        run_dir=run_dir,
        fabric=fabric,
        sharding=sharding,
        model=model,
        optimizer=optimizer,
        sources=sources,
        mixture=mixture,
        grad_accum_steps=accumulate,
        facts=facts,
        flops_per_token=metrics.flops_per_token(settings.model, settings.data.seq_len, *num_parameters(settings.model)),
        log=log,
        clock=metrics.Clock(fabric.device),
        comparison=pace.Comparison(settings.watchdog.stragglers_every, fabric.device),
        step=step,
        skipped_steps=skipped_steps,
        skipped_in_a_row=skipped_in_a_row,
        begun=Begun(step, tokens),
    )


def _eos_id(sources: list[data.Source]) -> int:
    """The token that ends every document of all sources, by which a model tells documents apart."""
    manifest = sources[0].train.manifest  # all have one tokenizer and one policy, see data.open_sources
    if not manifest.append_eos or manifest.tokenizer.eos_id is None:
        raise ValueError(
            f"data.intra_document needs the ends of documents, and {sources[0].train.directory} was prepared without EOS after "
            "each; prepare it with --append_eos true, or set data.intra_document to false"
        )
    return manifest.tokenizer.eos_id


@contextmanager
def _enter(run_dir: Path) -> Iterator[None]:
    """Make the run's folder and lock it, so that no other job writes into it; where that fails, all ranks fail alike."""
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
        with suppress(OSError):
            for folder in (run_dir.parent, run_dir):
                os.listdir(folder)  # asks the server
            if (run_dir / ".lock").read_text() == mark:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.5)


def _fill_folder(
    settings: config.Config,
    run_dir: Path,
    sources: list[data.Source],
    operations: list[dict[str, Any]],
    fabric: Fabric,
    step: int,
    will_save: bool,
) -> None:
    """Have rank 0 put into the run's folder what an export and a person need besides the weights, and see that there is room.

    step: after which the run goes on. will_save: there must be room for a checkpoint.

    Raises:
        OSError: it could not, or the disk has no room for a checkpoint; on all ranks.
    """

    def fill() -> None:
        for torn in (*run_dir.glob("*.tmp"), *run_dir.glob("tokenizer/*.tmp")):  # a killed start's
            torn.unlink()
        _keep_config(settings, run_dir, step, say=fabric.print)
        _keep_tokenizer(sources[0].train.directory / TOKENIZER_DIR, run_dir / "tokenizer")
        write_atomically(run_dir / "operations.json", json.dumps(operations, indent=1).encode() + b"\n")
        saver.clear(run_dir / "checkpoints", say=fabric.print)  # what a killed save left takes room, too
        if will_save:
            saver.check_room(run_dir / "checkpoints", checkpoint_bytes(settings.model))

    ranks.on_rank_0(fill)


def _keep_tokenizer(source: Path, target: Path) -> None:
    """Copy what is not there yet. The data may be read-only, and the copy is not to be."""
    target.mkdir(exist_ok=True)
    for file in (entry for entry in source.iterdir() if entry.is_file()):
        content = file.read_bytes()
        copy = target / file.name
        if not copy.exists() or copy.read_bytes() != content:
            write_atomically(copy, content)


def _keep_config(settings: config.Config, run_dir: Path, step: int, say: Any) -> None:
    """Write config.yaml; where the run goes on, after `step`, with another one, say what changed and keep the one before."""
    path = run_dir / "config.yaml"
    if path.exists():
        before, now = _read_config(path, say), asdict(settings)
        changes = [f"seed: {before['seed']} -> {now['seed']}"] if before.get("seed", now["seed"]) != now["seed"] else []
        changes += [
            f"{section}.{key}: {before[section].get(key)} -> {value}"
            for section in ("model", "data", "train", "optim", "validation", "parallel")
            for key, value in now[section].items()
            if isinstance(before.get(section), dict) and before[section].get(key) != value
        ]
        if changes:
            kept = checkpoint.set_aside(path, "before")
            say(f"the configuration changed ({'; '.join(changes)}); the one before is kept as {kept.name}")
            if step:
                _say_learning_rate(settings, before, step + 1, say)
    config.write(replace(settings, resume=None), path)  # a run started from this file goes on, and not back once more


def _say_learning_rate(settings: config.Config, before: dict[str, Any], step: int, say: Any) -> None:
    """Name a jump in the schedule that another max_steps, warm-up or rate makes at the next step."""
    with suppress(KeyError, TypeError, ZeroDivisionError):  # of an earlier version of Cria, with other keys
        was = learning_rate(step, OptimConfig(**before["optim"]), before["train"]["max_steps"])
        now = learning_rate(step, settings.optim, settings.train.max_steps)
        if was != now:
            say(f"the learning rate of step {step:,} is {now:.3g} by the new schedule and was {was:.3g} by the old one")


def _read_config(path: Path, say: Any) -> dict[str, Any]:
    """What the run's own config.yaml says; one that nobody can read is kept under another name."""
    try:
        return yaml_mapping(path.read_bytes())
    except ValueError:
        say(f"{path} could not be read; it is kept as {checkpoint.set_aside(path, 'before').name}")
        return {}


def _verify_shards(record: Path, sources: list[data.Source], stop: scheduler.Stop | None) -> None:
    """Have the ranks read all shards, each its share, except those that `record` says were found good and did not change."""
    known: dict[str, str] = {}
    with suppress(OSError, ValueError):  # none yet, or torn: read all shards
        known = json_mapping(record.read_bytes())
    for dataset in (d for source in sources for d in (source.train, source.validation) if d is not None):
        # as rank 0 sees it: 60,000 shards asked for by each of 128 ranks would be a load on the file system
        key, signature = str(dataset.directory), ranks.on_rank_0(dataset.signature)
        if ranks.broadcast(known.get(key)) == signature:
            continue
        at_a_time = 16 * ranks.world_size()  # shards between two signs of life
        parts = -(-len(dataset.manifest.shards) // at_a_time)
        for part in range(parts):
            at("checking the shards")
            share = (ranks.rank() * parts + part, ranks.world_size() * parts)
            problem = ranks.first_problem(dataset.check(share, alive))
            if problem is not None:
                raise ValueError(f"{problem}; data-prep verify {dataset.directory} names all that is wrong")
            if ranks.all_reduce_max(torch.tensor(stop.signalled if stop else 0)):
                if ranks.rank() == 0:
                    print("stopped by a signal while the shards were read, before the first step", flush=True)
                raise SystemExit(scheduler.LATER)
        known[key] = signature
        if ranks.rank() == 0:  # at once: what is found good is not read again, though the next one is damaged
            write_atomically(record, json.dumps(known, indent=1).encode() + b"\n")
