"""Documents to shards: parallel, restartable, nothing lost. `data-prep slimpajama`, `starcoder`, `text`, `hf`, `finish`.

    Source.units --> those of this task without a record --> workers: one unit is one input file is one shard
                                                               |  records; bad documents against the budget
                             Folder.finish: manifest <---------+  (a single task; an array: data-prep finish)

A unit is done when its record is there, its shard has the recorded length and the input file still has the recorded
size; a rerun redoes the others, and those whose input file was damaged: it may have been replaced by a whole one of the
same size. Asked for the reference, it redoes those that gigatoken encoded. So the result is the same whatever the number
of workers, tasks and restarts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from data_prep.budget import Budget, check_share
from data_prep.encoder import Encoder, fast_encoder
from data_prep.folder import Folder, Settings, UnitRecord, listing
from data_prep.lock import only_run
from data_prep.progress import Display, print_totals
from data_prep.scan import cores
from data_prep.shard import DTYPES, Manifest, token_dtype
from data_prep.sources import SlimPajama, Source, Split, StarCoder
from data_prep.space import require_space
from data_prep.tokenizer import Tokenizer, check_marks, load
from data_prep.unit import Job
from data_prep.workers import prepare_units, start_server

_SPACE_CHECK_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class WorkOptions:
    """What it takes to make a dataset, from whatever source."""

    tokenizer: str
    """A tokenizer.model (SentencePiece), a tokenizer.json (Hugging Face), or a folder with one."""
    out: str
    """Folder of the dataset. Begun before, it is completed: only unfinished input files are done."""
    append_eos: bool = True
    """Put EOS after each document."""
    prepend_bos: bool = False
    """Put BOS before each document."""
    workers: int = 0
    """Processes; 0 takes one a CPU core. The result is the same with any number."""
    task: str = "1/1"
    """K/N does every N-th input file from the K-th on, for an array of N jobs; `data-prep finish OUT` joins them."""
    max_bad_documents: float = 0.0001
    """Share of the documents that may be broken: they are named and skipped, more of them stop the work."""
    encoder: str = "auto"
    """auto: gigatoken where it is exact. reference: SentencePiece or tokenizers, ten times slower; also redoes files that
    gigatoken encoded."""
    check_every: int = 1000
    """Every so many documents are encoded by the reference too, and a difference stops the work; 0 for none."""
    check_space: bool = True
    """Estimate before and during the work whether the disk has room for the shards."""
    allow_other_inputs: bool = False
    """Accept that input files disappeared since the folder was begun (they are left out) or, in an array, were added."""

    def source(self) -> Source:
        """The source that these options describe."""
        raise NotImplementedError

    def task_of(self) -> tuple[int, int]:
        """K and N. Raises ValueError unless 1 <= K <= N."""
        k, _, n = self.task.partition("/")
        if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
            raise ValueError(f"task {self.task!r} is not K/N with 1 <= K <= N, like 3/16")
        return int(k), int(n)


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(WorkOptions):
    """What a source in a publisher's layout needs to become a dataset."""

    input: str
    """Folder in the publisher's layout."""
    split: Split
    """Which part of the source: train or validation."""


@dataclass(frozen=True, kw_only=True)
class SlimPajamaOptions(PrepareOptions):
    """Prepare SlimPajama: SPLIT/chunk*/*.jsonl.zst, without RedPajamaGithub."""

    def source(self) -> Source:
        """See WorkOptions."""
        return SlimPajama(self.input, self.split)


@dataclass(frozen=True, kw_only=True)
class StarCoderOptions(PrepareOptions):
    """Prepare StarCoderData: FOLDER/*.parquet, column `content`, special folders included."""

    holdout: float = 0.001
    """Share of the documents that is held out of train for validation; the same for both splits."""

    def source(self) -> Source:
        """See WorkOptions."""
        return StarCoder(self.input, self.split, self.holdout)


def run(options: WorkOptions) -> Manifest | None:
    """Prepare a dataset, one task's part of it, or what is left; gives the manifest, None when it is only a part.

    Raises ValueError and OSError for what is wrong with the input, the tokenizer, the settings or the disk; what was
    done until then stays done.
    """
    if options.workers < 0 or options.check_every < 0:
        raise ValueError(f"workers {options.workers} and check_every {options.check_every} must not be below 0")
    task, tasks = options.task_of()
    check_share(options.max_bad_documents)
    if options.workers != 1:
        start_server()
    source, tokenizer, folder = options.source(), load(options.tokenizer), Folder(options.out)
    policy = (options.append_eos, options.prepend_bos)
    check_marks(tokenizer, *policy)
    settings = Settings(source.name, source.split, tokenizer.info, *policy, source.settings)
    inputs = {unit: source.source_bytes(unit) for unit in source.units()}
    folder.check(settings)
    encoder = _choose(tokenizer, options.encoder)
    with only_run(folder.out, task, tasks):
        if tasks == 1:
            folder.sweep()
        folder.begin(settings, tokenizer, inputs, tasks, options.allow_other_inputs)
        job = Job(folder, source, settings, encoder.engine, options.check_every)
        records = _prepare(job, encoder, inputs, options)
        if tasks > 1:
            print(f"{folder.out}: task {task} of {tasks} is done; after the last one: data-prep finish {folder.out}")
            return None
        manifest = folder.finish(settings, (records[unit] for unit in inputs))
    print_totals(manifest)
    return manifest


def _choose(tokenizer: Tokenizer, encoder: str) -> Encoder:
    """The encoder, which is said."""
    if encoder not in ("auto", "reference"):
        raise ValueError(f"encoder {encoder!r} is neither auto nor reference")
    asked = (Encoder(tokenizer, "reference"), f"{tokenizer.info.kind}, as asked")
    chosen, words = fast_encoder(tokenizer) if encoder == "auto" else asked
    print(f"encoding with {words}", flush=True)
    return chosen


def _prepare(job: Job, encoder: Encoder, inputs: dict[str, int], options: WorkOptions) -> dict[str, UnitRecord]:
    """Do those of `inputs` that are this task's and not done; gives the records of all that are this task's.

    Room and budget are those of all inputs, whoever does them: the other tasks fill the same disk, and whether so many bad
    documents are borne must not depend on how the array is cut. `finish` has the last word on them.
    """
    start = time.monotonic()
    folder, bytes_a_token = job.folder, DTYPES[token_dtype(job.settings.tokenizer.vocab_size)].itemsize
    task, tasks = options.task_of()
    mine = dict(list(inputs.items())[task - 1 :: tasks])
    done, budget = _done_before(folder, mine, sum(inputs.values()), options)
    todo = {unit: size for unit, size in mine.items() if unit not in done}
    new: list[UnitRecord] = []
    checked = start
    if todo:
        folder.unfinish()
        if options.check_space:
            require_space(folder.out, _left(folder, inputs, todo), done.values(), bytes_a_token)
    workers = min(options.workers or cores(), max(1, len(todo)))
    with Display(f"{job.source.name} {job.source.split}", len(todo), sum(todo.values())) as display:
        for record in prepare_units(job, encoder, todo, workers, display.tick):
            done[record.shard.source_file] = record
            new.append(record)
            budget.add(record)
            budget.enforce(final=False)
            display.file_done()
            if options.check_space and time.monotonic() - checked > _SPACE_CHECK_SECONDS:
                checked = time.monotonic()
                left = {unit: size for unit, size in todo.items() if unit not in done}
                require_space(folder.out, _left(folder, inputs, left), new, bytes_a_token)
    budget.enforce(final=tasks == 1)
    seconds, tokens = time.monotonic() - start, sum(record.shard.tokens for record in new)
    print(
        f"{folder.out}: {len(todo):,} of {len(mine):,} input files done now in {seconds:.1f} s (workers: {workers}), "
        f"{tokens:,} tokens, {tokens / seconds / 1e6:.2f}M tokens/s"
    )
    return done


def _left(folder: Folder, inputs: dict[str, int], todo: dict[str, int]) -> dict[str, int]:
    """`todo`, and what other tasks have still to do."""
    recorded = folder.names_with_record()
    return {unit: size for unit, size in inputs.items() if unit in todo or unit not in recorded}


def _done_before(
    folder: Folder, mine: dict[str, int], total: int, options: WorkOptions
) -> tuple[dict[str, UnitRecord], Budget]:
    """What earlier runs have done of `mine` with files that were whole, by the encoder asked for, in a new budget.

    The budget is that of all inputs, `total` bytes.

    When their bad documents exceed it already, all files with bad documents are done again: they may have been mended,
    and a repaired file can have its old size.
    """
    done = {
        unit: record
        for unit, record in folder.records(mine).items()
        if not record.is_damaged and options.encoder in ("auto", record.engine)
    }
    budget = _counted(done, total, options)
    all_there = options.task_of()[1] == 1 and len(done) == len(mine)
    if budget.is_exceeded(final=all_there):
        done = {unit: record for unit, record in done.items() if not record.bad_documents}
        budget = _counted(done, total, options)
    return done, budget


def _counted(done: dict[str, UnitRecord], total: int, options: WorkOptions) -> Budget:
    budget = Budget(options.max_bad_documents, total)
    for record in done.values():
        budget.add(record, say=False)
    return budget


# --- joining the parts of an array -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FinishOptions:
    """Join the parts that the tasks of an array have made: check that every input file is done, write the manifest."""

    directory: str = field(metadata={"positional": True, "help": "Folder of the dataset"})
    max_bad_documents: float = 0.0001
    """Share of the documents that may be broken, as it was given to the tasks."""


def finish(options: FinishOptions) -> Manifest:
    """Write the manifest over all units. Raises ValueError, naming them, when units are missing or too much is bad."""
    folder = Folder(options.directory)
    settings, inputs = folder.settings(), folder.inputs()
    with only_run(folder.out, 1, 1):
        folder.sweep()
        records = folder.records(inputs)
        missing = [unit for unit in inputs if unit not in records]
        if missing:
            raise ValueError(
                f"{len(missing):,} of {len(inputs):,} input files are not done: {listing(missing)}. Run the command that was "
                "begun in this folder again, all of it or the task that has them; it does these and no others"
            )
        budget = Budget(options.max_bad_documents, sum(inputs.values()))
        for record in records.values():
            budget.add(record)
        budget.enforce(final=True)
        manifest = folder.finish(settings, records.values())
    print_totals(manifest)
    return manifest
