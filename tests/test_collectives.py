"""Who is waited for inside a collective, by PyTorch's record: of three real ranks under gloo, and on made-up records."""

import json
import multiprocessing
import os
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import until
from processes import free_port

from pretrain import crash, stuck
from pretrain.collectives import read, recorded
from pretrain.crash import Rank

PAIRS = ([0, 1], [1, 2], [0, 2])
CASES: dict[str, list[list[tuple[int, ...]]]] = {
    "one is late": [[(0, 1, 2)], [(0, 1, 2)], []],
    "a chain": [[(0, 1)], [(1, 2)], []],
    "a circle": [[(0, 1)], [(1, 2)], [(0, 2)]],
    "a queue": [[(0, 1), (0, 1, 2)], [], [(0, 1, 2)]],
    "another order": [[(0, 1)], [(0, 1, 2)], [(0, 1, 2)]],
}
"""For each rank the groups in which it calls a collective, in this order. Who is not there calls it after the record is taken."""


def together(store: dist.Store, what: str, number: int) -> None:
    """Wait until all three have done it, without a collective."""
    store.set(f"{what} {number}", "done")
    store.wait([f"{what} {rank}" for rank in range(3)])


def rank_of_three(number: int, port: int, out: Path) -> None:
    """Each case after the other, on the same groups."""
    try:
        store = dist.TCPStore("127.0.0.1", port, 3, is_master=number == 0)
        dist.init_process_group("gloo", store=store, rank=number, world_size=3)
        groups = {(0, 1, 2): dist.group.WORLD} | {tuple(pair): dist.new_group(pair) for pair in PAIRS}
        for name, calls in CASES.items():
            dist.barrier()
            until(lambda: not any("open" in group for group in recorded().values()))
            called = [
                dist.all_reduce(torch.ones(2, 3), group=groups[members], async_op=True) for members in calls[number]
            ]
            together(store, f"{name}: called", number)
            (out / f"{name}.{number}").write_text(json.dumps(recorded()))
            together(store, f"{name}: recorded", number)
            everywhere = [members for mine in calls for members in mine]
            for members in dict.fromkeys(everywhere):
                if number in members and members not in calls[number]:
                    dist.all_reduce(torch.ones(2, 3), group=groups[members])
            for work in called:
                work.wait()
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (out / f"error.{number}").write_text(traceback.format_exc())
        os._exit(1)


@pytest.fixture(scope="module")
def records_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, dict[str, Any]]]:
    """Case -> rank -> what was recorded."""
    out, port = tmp_path_factory.mktemp("records"), free_port()
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=rank_of_three, args=(number, port, out)) for number in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    errors = [path.read_text() for path in out.glob("error.*")]
    assert not errors, errors[0]
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    return {name: {n: json.loads((out / f"{name}.{n}").read_text()) for n in range(3)} for name in CASES}


@pytest.mark.parametrize(
    ("case", "named", "words"),
    [
        ("one is late", [2], "rank 2 did not come to {} 2 of gloo 0 (default_pg), in which ranks 0, 1 wait"),
        ("a chain", [2], "rank 2 did not come to {} 1 of gloo 2 (undefined), in which rank 1 waits"),
        (
            "a circle",
            [],
            "they wait for each other in different collectives: rank 0 in {} 2 of gloo 1 (undefined), for rank 1; "
            "rank 1 in {} 2 of gloo 2 (undefined), for rank 2; rank 2 in {} 1 of gloo 3 (undefined), for rank 0",
        ),
        ("a queue", [1], "rank 1 did not come to {} 6 of gloo 0 (default_pg), in which rank 2 waits"),
        (
            "another order",
            [],
            "they wait for each other in different collectives: ranks 1, 2 in {} 8 of gloo 0 (default_pg), for rank 0; "
            "rank 0 in {} 4 of gloo 1 (undefined), for rank 1",
        ),
    ],
)
def test_who_keeps_real_ranks_waiting(
    records_of: dict[str, dict[int, dict[str, Any]]], case: str, named: list[int], words: str
) -> None:
    found, what = stuck.compare(records_of[case])
    assert (found, what) == (named, words.replace("{}", "gloo:all_reduce(2x3), number"))


def group(
    enqueued: int, completed: int, what: str = "", since_ns: int = 0, ranks: tuple[int, ...] = (0, 1)
) -> dict[str, Any]:
    """As `recorded` gives it."""
    last = {"ranks": list(ranks), "description": "d", "enqueued": enqueued, "completed": completed}
    return {**last, "open": what, "since_ns": since_ns} if what else last


GATHER = "nccl:_all_gather_base(1024)"


@pytest.mark.parametrize(
    ("records", "named", "words"),
    [
        # Rank 1's GPU stopped before the end of a collective that rank 0's has done; both have called more.
        (
            {0: {"nccl f": group(9, 5, GATHER)}, 1: {"nccl f": group(8, 4, GATHER)}},
            [1],
            f"{GATHER}, number 5 of nccl f (d) has come back on rank 0 and not on rank 1",
        ),
        ({r: {"nccl f": group(9, 4, GATHER)} for r in (0, 1)}, [], f"ranks 0, 1 wait in {GATHER}, number 5 of nccl f (d)"),
        ({r: {"nccl f": group(9, -1, GATHER)} for r in (0, 1)}, [], f"ranks 0, 1 wait in {GATHER}, number 1 of nccl f (d)"),
        (
            {0: {"gloo g": group(3, 2, "gloo:all_reduce(2)")}, 1: {"gloo g": group(3, 2, "gloo:broadcast(5)")}},
            [],
            "they called different collectives as number 3 of gloo g (d): rank 0: gloo:all_reduce(2); rank 1: gloo:broadcast(5)",
        ),
        # Two shards, each of two ranks, and replicas: all have called all of it, and one shard's first is the oldest.
        (
            {
                0: {"nccl a": group(9, 4, GATHER, 10), "nccl r": group(2, 1, "nccl:all_reduce(7)", 20, (0, 2))},
                1: {"nccl a": group(9, 4, GATHER, 10), "nccl s": group(2, 1, "nccl:all_reduce(7)", 20, (1, 3))},
                2: {"nccl b": group(9, 9, ranks=(2, 3)), "nccl r": group(2, 1, "nccl:all_reduce(7)", 20, (0, 2))},
                3: {"nccl b": group(9, 9, ranks=(2, 3)), "nccl s": group(2, 1, "nccl:all_reduce(7)", 20, (1, 3))},
            },
            [],
            f"ranks 0, 1 wait in {GATHER}, number 5 of nccl a (d)",
        ),
        ({0: {"nccl f": group(9, 9)}, 1: {"nccl f": group(8, 8)}}, [], ""),
        ({}, [], ""),
        # Rank 1 has said nothing: nothing is known of it.
        ({0: {"nccl f": group(9, 4, GATHER)}}, [], f"rank 0 waits in {GATHER}, number 5 of nccl f (d)"),
    ],
)  # fmt: skip
def test_who_keeps_gpus_waiting(records: dict[int, dict[str, dict[str, Any]]], named: list[int], words: str) -> None:
    assert stuck.compare(records) == (named, words)


def test_what_was_sent_or_is_part_of_another_one_is_not_open() -> None:
    def entry(number: int, **more: Any) -> dict[str, Any]:
        about = {"pg_id": 0, "process_group": ["0", "default_pg"], "collective_seq_id": number, "is_p2p": False}
        return {
            **about,
            "retired": False,
            "profiling_name": f"nccl:{number}",
            "input_sizes": [[2]],
            "time_created_ns": 1,
            **more,
        }

    status = {"0": {"last_enqueued_collective": "4", "last_started_collective": "-1", "last_completed_collective": "2"}}
    entries = [
        entry(1, process_group=["1", "gone"]),
        entry(2),
        entry(2, is_p2p=True),
        entry(9, is_p2p=True),
        entry(3, retired=True),
        entry(4),
        entry(5),
    ]
    groups = read({"entries": entries, "pg_status": status}, {"0": [0, 1]})
    assert list(groups) == ["0"], "the other one is no more"
    found = groups["0"]
    assert (found["open"], found["enqueued"], found["completed"]) == ("nccl:4(2)", 4, 2)
    assert read({"comm_lib_version": "", "pg_status": {}}, {}) == {}, "nothing was recorded"


def test_the_report_names_who_is_waited_for() -> None:
    late, early = {"gloo 0": group(4, 4)}, {"gloo 0": group(5, 4, "gloo:all_reduce(3)")}
    stacks = 'Thread 0x1 (most recent call first):\n  File "/x/torch/distributed/distributed_c10d.py", line 1 in all_reduce\n'
    ranks = [
        Rank(
            number, f"node{number}", place="forward", beats=3, age_s=6.0, limit_s=5.0, stacks=stacks, collectives=record
        )
        for number, record in enumerate((early, late))
    ]
    cause = crash.first_cause(ranks)
    assert (cause.kind, cause.ranks, cause.machine) == ("hangs", [ranks[1]], True)
    assert cause.line.startswith(
        "all 2 ranks have been at 'forward' for 6.0 s (limit 5 s); rank 1 did not come to gloo:all_reduce(3)"
    )
    for rank in ranks:
        rank.collectives = None
    assert crash.first_cause(ranks).line.endswith("none stands out: a collective or the devices do not come back")
