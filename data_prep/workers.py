"""Units shared out to processes, and how far they all are.

    units, the largest first --> groups --> worker processes: prepare_unit --> records, as they come
                                                 |
                                      counters in shared memory: bytes read, tokens made --> whoever draws the progress

A unit that fails fails the work, after the groups under way are done; a worker that is killed does too. A worker whose
parent is gone ends at once.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, forkserver, get_context, parent_process
from typing import Any

from data_prep.encoder import Encoder
from data_prep.folder import UnitRecord
from data_prep.shard import TOKENIZER_DIR
from data_prep.tokenizer import load
from data_prep.unit import Job, Report, prepare_unit

_GROUP_BYTES = 16 << 20
_GROUP_UNITS = 64
_TICK_SECONDS = 0.5

Tick = Callable[[int, int], None]
"""Told, twice a second, how many bytes have been read and tokens made in all."""


def start_server() -> None:
    """Start the process that workers are forked from, which imports what they need while this one gets ready.

    Workers are not forked from this process: pyarrow and the tokenizers have threads, which a fork would leave with
    locks held. In the server nothing has run but imports, and there is one thread.
    """
    # The words that gigatoken remembers lie all over some hundred MB: with huge pages it is a fifth faster (on glibc).
    ours = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "OPENBLAS_NUM_THREADS": "1"}
    ours["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # else pyarrow starts one when it is imported
    ours = {name: value for name, value in ours.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        forkserver.set_forkserver_preload(["data_prep.workers", "gigatoken", "pyarrow.parquet"])
        forkserver.ensure_running()
    finally:
        for name in ours:
            del os.environ[name]


def prepare_units(job: Job, encoder: Encoder, inputs: dict[str, int], workers: int, tick: Tick) -> Iterator[UnitRecord]:
    """Do all units of `inputs` (unit to size in bytes), yielding each record as it comes.

    One worker is this process, with `encoder`; more of them are processes, each with its own.
    """
    if workers == 1:
        yield from _in_this_process(job, encoder, inputs, tick)
        return
    start_server()
    context = get_context("forkserver")
    counters = context.RawArray("q", 2 * workers)
    order = context.Value("i", 0)
    pool = ProcessPoolExecutor(
        workers, context, initializer=_begin_worker, initargs=(job, encoder.model, counters, order)
    )
    groups = _groups(inputs, workers)
    running: set[Future[list[UnitRecord]]] = set()
    try:
        while True:
            while len(running) < 2 * workers and (group := next(groups, None)):
                running.add(pool.submit(_prepare_group, group))
            if not running:
                break
            done, running = wait(running, _TICK_SECONDS, FIRST_COMPLETED)
            tick(sum(counters[::2]), sum(counters[1::2]))
            for future in done:
                yield from future.result()
    except BrokenProcessPool:
        raise OSError(
            "a worker process was killed, perhaps for want of memory: run the same command again, with fewer --workers "
            "if need be; finished files are kept"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_this_process(job: Job, encoder: Encoder, inputs: dict[str, int], tick: Tick) -> Iterator[UnitRecord]:
    totals = [0, 0]

    def report(more_bytes: int, more_tokens: int) -> None:
        totals[0] += more_bytes
        totals[1] += more_tokens
        tick(*totals)

    for unit in inputs:
        yield prepare_unit(job, encoder, unit, report)


def _groups(inputs: dict[str, int], workers: int) -> Iterator[list[str]]:
    """Units in the order in which to begin them: the largest first, so that no worker is left alone with one at the end;
    small ones together, so that handing them out costs nothing, but in several groups for each worker. A unit of unknown
    size (0 bytes) is a group of its own.
    """
    limit = min(_GROUP_BYTES, sum(inputs.values()) // (4 * workers))
    group: list[str] = []
    size = 0
    for unit in sorted(inputs, key=lambda unit: -inputs[unit]):
        group.append(unit)
        size += inputs[unit]
        if not inputs[unit] or size >= limit or len(group) >= _GROUP_UNITS:
            yield group
            group, size = [], 0
    if group:
        yield group


# --- in a worker -----------------------------------------------------------------------------------------------------

_worker: tuple[Job, Encoder, Report]


def _begin_worker(job: Job, model: bytes, counters: Any, order: Any) -> None:
    """Leave Ctrl-C to the command, and end at once when that is killed instead of waiting for work for ever."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    with order.get_lock():
        place = 2 * order.value
        order.value += 1

    def report(more_bytes: int, more_tokens: int) -> None:
        counters[place] += more_bytes  # nobody else writes here
        counters[place + 1] += more_tokens

    _worker = (job, Encoder(load(job.folder.out / TOKENIZER_DIR), job.engine, model), report)
    gc.freeze()  # what is there now stays; looking for garbage in it again and again takes a fiftieth of the time


def _prepare_group(units: list[str]) -> list[UnitRecord]:
    job, encoder, report = _worker
    return [prepare_unit(job, encoder, unit, report) for unit in units]
