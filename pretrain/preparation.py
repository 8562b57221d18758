"""How a run begins, or goes on: everything that can be wrong is found here, before the first step.

Config ─> manifests opened, mixture ─> ranks join, all alike? ─> run folder locked ─> shards verified ─> newest whole checkpoint?
same run? ─> model on its devices, optimizer ─> checkpoint, or --init_from, or the first weights ─> Run
"""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from data_prep.shard import TOKENIZER_DIR, TokenDataset, check_tokenizer, write_atomically
from pretrain import (
    back,
    checkpoint,
    config,
    data,
    going_on,
    init_from,
    left_out,
    metrics,
    pace,
    parallel,
    ranks,
    retention,
    run_folder,
    scheduler,
    soundness,
)
from pretrain.disk import checkpoint_bytes
from pretrain.hosts import is_first_here, this_host
from pretrain.loggers import make_loggers
from pretrain.mixture import Mixture
from pretrain.model import count
from pretrain.optim import make_optimizer
from pretrain.reading import json_mapping
from pretrain.run import Run, TakenUp
from pretrain.sharding import Sharding
from pretrain.skips import Skips
from pretrain.versions import RUN_PACKAGES, source_hash, versions
from pretrain.watchdog import Watchdog, alive, at


def prepare(settings: config.Config, stop: scheduler.Stop | None = None, saves: bool = True) -> Run:
    """Open the data, build the model, and load the checkpoint that the run goes on from, if there is one.

    saves: False for a benchmark, which needs no room for a checkpoint.

    Raises:
        ValueError, OSError: something that the user can mend, in one line.
        SystemExit: a rank got a signal while the shards were read, which may take long; on all ranks.
    """
    seq_len, vocab_size = settings.data.seq_len, settings.model.vocab_size
    sources = data.open_sources(settings.data, vocab_size)
    if is_first_here():  # as in data.open_sources
        check_tokenizer(sources[0].train.directory, sources[0].train.manifest.tokenizer)  # an export ships it
    sets = data.open_sets(settings.validation.sets, sources, seq_len, vocab_size)
    mixture = data.make_mixture(sources, settings.data, settings.seed, settings.train.global_batch_size)
    fabric, sharding = parallel.launch(
        settings.parallel, settings.model, make_loggers(settings), settings.train.deterministic
    )
    _check_alike(settings, sources, sets)
    ranks.everywhere(lambda: init_from.check(settings))
    grad_accum_steps = config.grad_accum_steps(settings.train, fabric.world_size)
    with ExitStack() as on_failure:
        guard = on_failure.enter_context(Watchdog(settings))
        on_failure.enter_context(run_folder.enter(Path(settings.run_dir)))
        if settings.data.verify == "full":
            begun_from = (
                Path(os.path.realpath(path)).parent.parent for path in (settings.resume, settings.init_from) if path
            )
            records = [folder / "verified.json" for folder in (Path(settings.run_dir), *begun_from)]
            _verify_shards(records, data.datasets(sources, sets), stop)
        run = _build(settings, fabric, sharding, sources, sets, mixture, grad_accum_steps, saves)
        run.at_end = on_failure.pop_all()
        guard.rest()
    return run


def _build(
    settings: config.Config,
    fabric: Fabric,
    sharding: Sharding,
    sources: list[data.Source],
    sets: data.Sets,
    mixture: Mixture,
    grad_accum_steps: int,
    saves: bool,
) -> Run:
    """The run as it is before its next step: from which checkpoint, its folder filled, its model and optimizer loaded."""
    run_dir, sizes = Path(settings.run_dir), count(settings.model)
    facts = going_on.facts(settings, sources, sets, mixture)
    at("choosing a checkpoint")
    say = partial(_say, fabric)
    found = going_on.choose(run_dir, settings, facts, sources, say)
    before = None if found is None else found.state
    eos_id = _eos_id(sources) if settings.data.intra_document else None
    at("building the model")
    model = parallel.build(fabric, settings.model, settings.parallel, settings.seed, settings.train.z_loss, eos_id)
    operations = [asdict(choice) for choice in parallel.unwrap(model).operations.choices]
    tokenizer = sources[0].train.directory / TOKENIZER_DIR
    if before is not None:
        # `fill` reads them on rank 0 alone, where a ValueError would leave the others waiting: so all ranks ask for them first,
        # and where one is missing, all raise it (`checkpoint.read_state`).
        for needed in ("config", "operations"):
            before[needed]
    ranks.on_rank_0(lambda: run_folder.fill(settings, tokenizer, operations, before, say))
    if saves and (before is None or before["step"] < settings.train.last_step):
        ranks.on_rank_0(lambda: _make_room(run_dir, settings, say))
    log = metrics.MetricsLog(run_dir, fabric)
    optimizer = make_optimizer(parallel.unwrap(model), settings.optim)
    at("loading the checkpoint")
    taken_up = _take_up(found, settings, sources, parallel.unwrap(model), optimizer, say)
    return Run(
        config=settings,
        run_dir=run_dir,
        fabric=fabric,
        sharding=sharding,
        model=model,
        optimizer=optimizer,
        sources=sources,
        mixture=mixture,
        grad_accum_steps=grad_accum_steps,
        facts=facts,
        flops_per_token=metrics.flops_per_token(settings.model, settings.data.seq_len, sizes.total, sizes.in_products),
        log=log,
        clock=metrics.Clock(fabric.device),
        comparison=pace.Comparison(settings.watchdog.stragglers_every, fabric.device),
        step=taken_up.step,
        skips=_make_skips(settings, next(model.parameters()).device, before),
        taken_up=taken_up,
        sets=sets,
    )


def _make_skips(settings: config.Config, device: torch.device, before: dict[str, Any] | None) -> Skips:
    """As they were at a checkpoint, whose state is `before`; None: of a new run."""
    saved = None
    if before is not None:
        trained = left_out.trained_steps(0, before["step"], settings.train.leave_out)
        without = {"total": max(0, trained - before["updates"]), "tally": 0, "grad_norms": []}
        saved = before.get("skips", without)  # an earlier version of Cria saved none
    return Skips(settings.optim.skip_grad_norm_above, settings.train.max_skipped_steps, device, saved)


def _take_up(
    found: going_on.Found | None,
    settings: config.Config,
    sources: list[data.Source],
    model: torch.nn.Module,
    optimizer: torch.optim.AdamW,
    say: Callable[[str], None],
) -> TakenUp:
    """Put into the model and the optimizer what they go on from, or begin with."""
    if found is None:
        if settings.init_from is None:
            return TakenUp()
        init_from.load(settings, sources, model, say)
        return TakenUp(init_from=str(Path(settings.init_from).resolve()))
    state = checkpoint.load(found.folder, model, optimizer)
    tensors = checkpoint.tensors_of(model, optimizer)
    if problem := soundness.not_finite(tensors):
        raise ValueError(f"{found.folder} was saved broken: {problem}. Take an earlier checkpoint with --resume")
    if problem := soundness.unlike_replicas(tensors):  # which have read the same bytes
        raise OSError(f"{found.folder} was read unlike by the replicas: {problem}. Start again without that host")
    if settings.init_from is not None:
        say(f"{settings.run_dir} has a checkpoint: the run goes on from it, and --init_from changes nothing")
    return TakenUp(
        step=state["step"],
        tokens=state["tokens_per_source"],
        updates=state["updates"],
        init_from=state.get("init_from"),
        branched_from=found.branched_from,
        branched_from_manifest=found.branched_from_manifest,
        branches=found.branches,
    )


def _say(fabric: Fabric, line: str) -> None:
    if fabric.is_global_zero:  # fabric.print is for one rank of each node
        print(line, flush=True)


def _eos_id(sources: list[data.Source]) -> int:
    """The token that ends every document of all sources, by which a model tells documents apart."""
    manifest = sources[0].train.manifest  # all have one tokenizer and one policy, see data.open_sources
    if not manifest.append_eos or manifest.tokenizer.eos_id is None:
        raise ValueError(
            f"data.intra_document needs the ends of documents, and {sources[0].train.directory} was prepared without EOS after "
            "each; prepare it with --append_eos true, or set data.intra_document to false"
        )
    return manifest.tokenizer.eos_id


def _make_room(run_dir: Path, settings: config.Config, say: Callable[[str], None]) -> None:
    checkpoints = run_dir / "checkpoints"
    retention.clear(checkpoints, say)  # what a killed save left takes room, too
    try:
        # Sent back, the newest may be what the run was sent back from: nothing goes before it saves.
        if back.read(run_dir) is None:
            # keep_last may be lower than it was
            gone = retention.prune(run_dir, settings.checkpoint, settings.branch_point)
            if gone:
                say(f"older checkpoints were deleted: {', '.join(gone)}")
    except OSError as error:
        say(f"older checkpoints could not be deleted: {error}")
    number, size = retention.count_set_aside(checkpoints)
    if number:
        say(f"{checkpoints} holds {number} that were set aside, {size / 2**20:,.1f} MiB, which nothing deletes")
    retention.check_room(checkpoints, checkpoint_bytes(settings.model))


_CODE = "the code of Cria"


def _check_alike(settings: config.Config, sources: list[data.Source], sets: data.Sets) -> None:
    """Raise ValueError, where it is the code OSError, on all ranks where one has another configuration or data than rank 0.

    They would train together all the same, each with its own learning rate, say, and nobody could tell.
    """
    if ranks.world_size() == 1:
        return
    mine = config.flat(asdict(settings))
    for path in ("run_dir", "data.sources", "validation.sets"):  # which nodes may have in different places
        del mine[path]
    mine["data.sources"] = [(entry.name, entry.weight) for entry in settings.data.sources]
    mine["validation.sets"] = list(sets)
    # Where one rank has none, the keys below it are not compared.
    mine["model.rope_scaling"] = settings.model.rope_scaling
    for source in sources:
        mine[f"the shards of {source.name}"] = source.train.manifest.fingerprint
        mine[f"the validation shards of {source.name}"] = source.validation and source.validation.manifest.fingerprint
    for name, dataset in sets.items():
        mine[f"the validation shards of {name}"] = dataset.manifest.fingerprint
    mine |= {name: was for name, was in versions(*RUN_PACKAGES).items() if name != "python"}
    code = ranks.everywhere(lambda: source_hash() if is_first_here() else None)
    mine |= {_CODE: code} if code else {}
    (first_host, first), *others = ranks.gather((this_host(), mine))
    for number, (host, theirs) in enumerate(others, start=1):
        unlike = [key for key in theirs if theirs[key] != first.get(key)]
        if unlike:
            problem = (
                f"rank {number} on {host} has {unlike[0]} = {theirs[unlike[0]]}, and rank 0 on {first_host} "
                f"{first.get(unlike[0])}: give all ranks the same configuration, data and code"
            )
            # A shared checkout that was changed a moment ago is not the same everywhere yet: a restart tries again.
            raise OSError(problem) if unlike == [_CODE] else ValueError(problem)


def _verify_shards(records: list[Path], datasets: list[TokenDataset], stop: scheduler.Stop | None) -> None:
    """Have the ranks read all shards, each its share, but for what a record says was found good and has not changed since.

    records: this run's own, which is written, and those of the runs that it was begun from, where they are any.
    """
    known: dict[str, str] = {}
    for record in reversed(records):
        with suppress(OSError, ValueError):  # none yet, or torn: all is read
            known |= json_mapping(record.read_bytes())
    for dataset in datasets:
        # as rank 0 sees it: 60,000 shards asked for by each of 128 ranks would be a load on the file system
        key, signature = str(dataset.directory), ranks.on_rank_0(partial(dataset.signature, of_these_files=True))
        if ranks.broadcast(known.get(key)) != signature:
            _read_shards(dataset, stop)
        known[key] = signature
        # at once: what is found good is not read again, though the next one is damaged
        ranks.on_rank_0(partial(_note, records[0], json.dumps(known, indent=1).encode() + b"\n"))


def _read_shards(dataset: TokenDataset, stop: scheduler.Stop | None) -> None:
    """All of them, the ranks together. Raises ValueError where one is damaged, SystemExit where a signal came."""
    at_a_time = 16 * ranks.world_size()  # shards between two looks at the signals
    parts = -(-len(dataset.manifest.shards) // at_a_time)
    for part in range(parts):
        at("checking the shards")
        share = (ranks.rank() * parts + part, ranks.world_size() * parts)
        problem = ranks.first_problem(ranks.everywhere(partial(dataset.check, share, alive)))
        if problem is not None:
            raise ValueError(f"{problem}; data-prep verify {dataset.directory} names all that is wrong")
        if ranks.all_reduce_max(torch.tensor(stop.signalled if stop else 0)):
            if ranks.rank() == 0:
                print("stopped by a signal while the shards were read, before the first step", flush=True)
            raise SystemExit(scheduler.LATER)


def _note(record: Path, content: bytes) -> None:
    if not (record.is_file() and record.read_bytes() == content):
        write_atomically(record, content)
