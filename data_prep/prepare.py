"""Documents to shards: parallel, restartable, nothing lost. The commands `data-prep slimpajama` and `starcoder`.

    Source.units --> those without a record, shared out --> worker processes: Job.prepare_unit
                                                               |  records
                                     Job.finish: manifest <----+

A unit is one input file. It is done when its record is there, its shard has the recorded length and the input file
still has the recorded size; a rerun redoes the others. So the result is the same whatever the number of workers and
restarts. A unit that fails fails the command, after the units under way are done.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

from data_prep.job import Job, UnitRecord
from data_prep.progress import Display, print_totals
from data_prep.shard import MANIFEST_NAME, Manifest
from data_prep.sources import SlimPajama, Source, Split, StarCoder
from data_prep.tokenizer import load


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What every source needs to become a dataset."""

    input: str
    """Folder in the publisher's layout."""
    split: Split
    """Which part of the source: train or validation."""
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

    def source(self) -> Source:
        """The source that these options describe."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SlimPajamaOptions(PrepareOptions):
    """Prepare SlimPajama: SPLIT/chunk*/*.jsonl.zst, without RedPajamaGithub."""

    def source(self) -> Source:
        """See PrepareOptions."""
        return SlimPajama(self.input, self.split)


@dataclass(frozen=True, kw_only=True)
class StarCoderOptions(PrepareOptions):
    """Prepare StarCoderData: LANGUAGE/train-*.parquet, column `content`."""

    holdout: float = 0.001
    """Share of the documents that is held out of train for validation; the same for both splits."""

    def source(self) -> Source:
        """See PrepareOptions."""
        return StarCoder(self.input, self.split, self.holdout)


def run(options: PrepareOptions) -> Manifest:
    """Prepare a dataset, or what is left of it, and write its manifest.

    Raises ValueError and OSError for what is wrong with the input, the tokenizer or the settings; what was done until
    then stays done.
    """
    if options.workers < 0:
        raise ValueError(f"workers is {options.workers}; give a number of processes, or 0 for one a CPU core")
    start = time.monotonic()
    source, tokenizer, out = options.source(), load(options.tokenizer), Path(options.out)
    units = source.units()
    job = Job(out, source, tokenizer.info, options.append_eos, options.prepend_bos)
    job.begin(tokenizer)
    done = {unit: record for unit in units if (record := job.finished(unit))}
    todo = [unit for unit in units if unit not in done]
    if todo:  # while shards are replaced, no manifest may vouch for them
        (out / MANIFEST_NAME).unlink(missing_ok=True)
    workers = min(options.workers or len(os.sched_getaffinity(0)), max(1, len(todo)))
    with Display(f"{source.name} {source.split}", len(todo), sum(map(job.source_bytes, todo))) as display:
        for record in _prepare_all(job, todo, workers):
            done[record.shard.source_file] = record
            display.advance(record.source_bytes, record.shard.tokens)
    manifest = job.finish([done[unit] for unit in units])
    seconds = time.monotonic() - start
    new_tokens = sum(done[unit].shard.tokens for unit in todo)
    print_totals(manifest)
    print(
        f"{out}: {len(todo):,} of {len(units):,} input files done now in {seconds:.1f} s (workers: {workers}), "
        f"{new_tokens / seconds / 1e6:.2f}M tokens/s"
    )
    return manifest


def _prepare_all(job: Job, units: list[str], workers: int) -> Iterator[UnitRecord]:
    """Do all `units`, yielding each record as it comes. The first failure ends it, after the units under way."""
    if workers == 1:
        yield from map(job.prepare_unit, units)
        return
    # Spawned, not forked: pyarrow and the tokenizers have threads, which a fork would leave with locks held.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin_worker)
    try:
        for future in as_completed([pool.submit(job.prepare_unit, unit) for unit in units]):
            yield future.result()
    except BrokenProcessPool:
        raise OSError(
            "a worker process was killed, perhaps for want of memory: run the same command again with fewer --workers; "
            "finished files are kept"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """Leave Ctrl-C to the command, and end at once when that is killed instead of waiting for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
