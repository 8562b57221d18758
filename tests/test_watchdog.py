"""Who hangs, who died, who was first, who is slow: judged on made-up reports, and made for real (see hangs.py)."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import pretrain, records, tiny_config, until, wait_for, write_config
from processes import free_port

from pretrain import config, crash, pace, preparation, processes, trainer, watchdog, watcher
from pretrain.crash import Facts, Rank
from pretrain.pace import Pace
from pretrain.slots import slots_of_rank
from pretrain.watcher import CELL, CELL_BYTES, EXIT_STATUS, Watcher

IN_A_COLLECTIVE = """Thread 0x1 (most recent call first):
  File "/x/threading.py", line 1 in wait

Current thread 0x2 (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 4394 in all_gather_single
  File "/x/pretrain/trainer.py", line 87 in optimizer_step
"""
IN_PYTHON = """Thread 0x2 (most recent call first):
  File "/x/pretrain/trainer.py", line 87 in optimizer_step
"""


def waiting(number: int, beats: int = 10, age_s: float = 6.0, **more: object) -> Rank:
    """A rank that has been in one place for a while."""
    return Rank(number, f"node{number}", place="forward", beats=beats, age_s=age_s, limit_s=5.0, **more)


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ([waiting(0), waiting(1, beats=9), waiting(2)], [1]),
        ([waiting(0), waiting(1), waiting(2, state="T")], [2]),
        ([waiting(0, stacks=IN_A_COLLECTIVE), waiting(1, stacks=IN_PYTHON)], [1]),
        ([waiting(0, stacks=IN_A_COLLECTIVE), waiting(1, stacks=IN_A_COLLECTIVE)], []),
        ([waiting(0, left=True), waiting(1), waiting(2, beats=11)], [1]),
        ([waiting(0)], [0]),
    ],
)
def test_who_hangs_is_behind_or_stopped_or_does_not_wait_for_others(ranks: list[Rank], named: list[int]) -> None:
    assert crash.overdue(ranks)
    cause = crash.first_cause(ranks)
    assert (cause.kind, [rank.number for rank in cause.ranks]) == ("hangs", named)


def test_a_rank_that_waits_for_one_that_goes_on_does_not_hang() -> None:
    assert not crash.overdue([waiting(0, beats=11, age_s=100.0), waiting(1, beats=10, age_s=1.0)])
    assert not crash.overdue([waiting(0, age_s=100.0), waiting(1, age_s=1.0)]), "it has just come"
    assert crash.overdue([waiting(0, beats=11, age_s=1.0), waiting(1, beats=10, age_s=5.1)])
    assert not crash.overdue([Rank(0, age_s=1e9, limit_s=0.0)]), "a place without a limit"


ABORTED = f"Fatal Python error: Aborted\n\n{IN_A_COLLECTIVE}"
OWN_GPU = "DistBackendError: NCCL error in: NCCLUtils.cpp:1, unhandled cuda error, ncclUnhandledCudaError: Call to CUDA failed."
NO_MEMORY = f"{OWN_GPU} Last error: Cuda failure 2 'out of memory'"
RESET = "RuntimeError: [gloo/transport/tcp/pair.cc:537] Read error [::1]:1: Connection reset by peer"


@pytest.mark.parametrize(
    ("ranks", "kind", "named"),
    [
        # The others' connections closed before the cause was reported, and after.
        ([waiting(0, error=RESET, ended_at_s=1.0), waiting(1, error="ValueError: x", ended_at_s=1.1)], "failed", 1),
        (
            [waiting(0, error="KeyError: 'x'", ended_at_s=1.0), waiting(1, error="ValueError: x", ended_at_s=1.1)],
            "failed",
            0,
        ),
        ([waiting(0, error=RESET, ended_at_s=1.0), waiting(1, gone="it died", ended_at_s=1.3)], "died", 1),
        ([waiting(0, error=RESET, ended_at_s=1.0), waiting(1, error=RESET, ended_at_s=0.9)], "failed", 1),
        # NCCL's thread aborts the process where a connection breaks: on all ranks it is the link, on one its own doing.
        ([waiting(n, gone="it died", stacks=ABORTED, ended_at_s=2.0 - n) for n in (0, 1)], "failed", 1),
        ([waiting(0, error=RESET, ended_at_s=1.0), waiting(1, gone="x", stacks=ABORTED, ended_at_s=2.0)], "failed", 0),
        ([waiting(0), waiting(1, gone="it died", stacks=ABORTED, ended_at_s=1.0)], "died", 1),
        (
            [waiting(0, gone="x", stacks=ABORTED, ended_at_s=2.0), waiting(1, error="ValueError: x", ended_at_s=1.0)],
            "failed",
            1,
        ),
        ([waiting(0, gone="x", stacks=ABORTED, ended_at_s=2.0), waiting(1, gone="it died", ended_at_s=1.0)], "died", 1),
        ([waiting(0, gone="it died", stacks=ABORTED, ended_at_s=2.0)], "died", 0),
        # NCCL is the first to say that this rank's own GPU failed; the others go on for a moment.
        ([waiting(0, age_s=1.0), waiting(1, error=OWN_GPU, ended_at_s=1.0)], "failed", 1),
        ([waiting(n, error=NO_MEMORY, ended_at_s=2.0 - n) for n in (0, 1)], "failed", 1),
        ([waiting(0, error=RESET, ended_at_s=1.0), waiting(1, error=OWN_GPU, ended_at_s=1.1)], "failed", 1),
        # The first that lost another one, while nobody is anywhere for too long.
        ([waiting(0, error=RESET, ended_at_s=1.0), *(waiting(n, age_s=1.0) for n in range(1, 16))], "failed", 0),
        # A collective gave up on a rank that says nothing: that one hangs.
        ([waiting(0, error="DistBackendError: NCCL timeout", ended_at_s=1.0), waiting(1)], "hangs", 1),
    ],
)
def test_the_cause_is_the_first_that_is_no_consequence(ranks: list[Rank], kind: str, named: int) -> None:
    cause = crash.first_cause(ranks)
    assert (cause.kind, [rank.number for rank in cause.ranks]) == (kind, [named])
    assert ("micro_batch_size takes less" in cause.advice) == ("out of memory" in cause.line)


@pytest.mark.parametrize(
    ("error", "gone", "machine"),
    [
        ("AcceleratorError: CUDA error: an illegal memory access was encountered", None, True),
        ("DistBackendError: NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)", None, True),
        (None, "killed by SIGKILL", True),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", None, False),
        ("AcceleratorError: CUDA error: out of memory", None, False),
        ("DistBackendError: NCCL error: unhandled cuda error. Cuda failure 2 'out of memory'", None, False),
        ("AcceleratorError: CUDA error: device-side assert triggered", None, False),
        ("OSError: [Errno 5] Input/output error", None, False),
        (RESET, None, False),
    ],
)
def test_a_machine_is_under_suspicion_for_what_no_program_raises(
    error: str | None, gone: str | None, machine: bool
) -> None:
    failed = waiting(1, error=error, gone=gone, ended_at_s=1.0)
    assert crash.first_cause([waiting(0, age_s=1.0), failed]).machine is machine
    assert crash.first_cause([waiting(0), waiting(1, beats=9)]).machine


def test_the_page_is_one_page_for_128_ranks(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(100)))
    ranks = [waiting(n, error=RESET, ended_at_s=2.0 + n, step=7, trace="  frame\n" * 500) for n in range(128)]
    ranks[77].error, ranks[77].ended_at_s = "ValueError: an id of 40000", 1.0
    page = crash.page(crash.first_cause(ranks), ranks, Facts(str(tmp_path), 4, 1024, {"torch": "2.13"}))
    assert len(page.splitlines()) < 110
    assert "rank 77 on node77 failed first: ValueError: an id of 40000" in page
    slots = ", ".join(f"{part[0]}-{part[-1]}" for part in slots_of_rank(77, 128, 7, 4, 1024))
    assert slots.count("-") == 2
    assert f"pretrain order --config {tmp_path}/config.yaml --step 7   (rank 77: slots {slots})" in page
    assert '{"step": 99}' in page
    crash.publish(tmp_path, crash.REPORT, page)
    assert sorted(path.name for path in tmp_path.iterdir()) == [crash.REPORT, "metrics.jsonl"]


def test_a_rank_whose_torchrun_is_gone_ends(tmp_path: Path) -> None:
    """An agent that is killed leaves its ranks behind; one that does not stop by itself is ended, after the limit."""
    script = Path(__file__).parent / "fake_rank.py"
    command = f"{sys.executable} -S {script} $$ {tmp_path} & wait"
    agent = subprocess.Popen(["bash", "-c", command], stderr=subprocess.DEVNULL)
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    agent.kill()
    agent.wait()
    rank = int((tmp_path / "pid").read_text())
    until(lambda: (tmp_path / crash.REPORT).exists() and processes.stat(rank)[:1] in ([], ["Z"]))
    assert "the torchrun that had started it is gone" in (tmp_path / crash.REPORT).read_text()


def test_slow_ranks_are_named_by_their_own_work() -> None:
    def ranks(*figures: tuple[float, float, float | None]) -> list[Pace]:
        return [Pace(f"node{n}", 1.0, wait, work, product) for n, (wait, work, product) in enumerate(figures)]

    def named(paces: list[Pace]) -> list[tuple[int, str]]:
        return [(line["rank"], line["what"]) for line in pace.slow_ranks(paces)]

    assert named(ranks((0.0, 0.5, None), (0.0, 0.5, None), (0.0, 0.56, None))) == [(2, "own work")]
    assert named(ranks((0.0, 0.5, None), (0.1, 0.5, None))) == [(1, "own work")]
    assert named(ranks((0.0, 0.5, None), (0.0, 0.54, None), (0.0, 0.45, None))) == []
    # On a GPU: waits as a share of the step, the product by itself; how long the host works says nothing there.
    assert named(ranks((0.0, 0.1, 1e-3), (0.02, 0.9, 1e-3), (0.13, 0.1, 1.2e-3))) == [
        (2, "matrix product"),
        (2, "waiting for data"),
    ]
    line = pace.slow_ranks(ranks((0.0, 0.5, None), (0.0, 0.75, None)))[0]
    assert pace.words(line) == "slow: rank 1 on node1: own work 0.75 s, the median 0.5 s (+50%)"


def test_an_exception_leaves_its_page(datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tiny_config(datasets, tmp_path / "run", watchdog={"limit_s": 300.0}, validation={"every_steps": 0})
    run = preparation.prepare(config.load(write_config(tmp_path / "c.yaml", tree)))
    backward = run.fabric.backward

    def fail(loss: torch.Tensor) -> None:
        if run.step == 3:
            raise ValueError("a made-up error")
        backward(loss)

    monkeypatch.setattr(run.fabric, "backward", fail)
    with pytest.raises(ValueError, match="made-up"):
        trainer.train(run)
    page = (tmp_path / "run" / crash.REPORT).read_text()
    assert "rank 0 on " in page
    assert "failed first: ValueError: a made-up error" in page
    assert "in fail" in page, "no traceback"
    assert f"torch {version('torch')}" in page
    assert '"step": 3' in page
    command = re.search(r"pretrain (order .*? --step 4)", page)
    assert command is not None
    assert "step 4 of" in pretrain(*shlex.split(command[1])).stdout


def test_a_refusal_is_not_the_death_of_its_watcher(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The watcher ends as soon as it has heard of it, before the rank that was busy meanwhile says goodbye."""
    settings = config.load(write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run")))
    report = watchdog.Watchdog._report

    def busy(guard: watchdog.Watchdog, error: BaseException) -> None:
        report(guard, error)
        assert guard._process.wait(30) == 0
        time.sleep(0.1)

    monkeypatch.setattr(watchdog.Watchdog, "_report", busy)
    with pytest.raises(ValueError, match="refused"), watchdog.Watchdog(settings):
        raise ValueError("refused")
    assert capfd.readouterr().err == ""


def test_the_first_step_alone_may_take_longer(datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles; whatever comes after it has the shorter limit."""
    limits: dict[str, float] = {}
    write = watchdog.Watchdog._write

    def noted(guard: watchdog.Watchdog, place: str, step: int | None, limit_s: float) -> None:
        limits[place] = limit_s
        write(guard, place, step, limit_s)

    monkeypatch.setattr(watchdog.Watchdog, "_write", noted)
    sections = {"watchdog": {"limit_s": 300.0, "first_step_limit_s": 900.0}, "validation": {"every_steps": 0}}
    tree = tiny_config(datasets, tmp_path / "run", train={"max_steps": 1}, optim={"warmup_steps": 1}, **sections)
    run = preparation.prepare(config.load(write_config(tmp_path / "c.yaml", tree)))
    assert trainer.train(run) == 0
    assert (limits["forward and backward"], limits["clipping and update"], limits["save"]) == (900.0, 900.0, 300.0)


def test_a_place_without_a_step_belongs_to_the_one_before(datasets: Path, tmp_path: Path) -> None:
    """Its rank's crash report names that step's documents, and not that there was none yet."""
    settings = config.load(write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run")))
    with watchdog.Watchdog(settings) as guard:
        steps = []
        for place, step in (("preparing", None), ("validation", 7), ("validation on prose", None), ("save", 8)):
            guard.at(place, step)
            steps.append(CELL.unpack_from(guard._cell)[-1])
    assert steps == [-1, 7, 7, 8]


def test_a_full_temporary_folder_is_not_in_its_way(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    settings = config.load(write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run")))
    with watchdog.Watchdog(settings) as guard:
        guard.at("somewhere", 3)
        os.kill(os.getpid(), watcher.STACK_SIGNAL)
        assert b"in test_a_full_temporary_folder" in os.pread(guard._stacks.fileno(), 50_000, 0)
    assert guard._process.wait(30) == 0, "it saw that the rank left"


def test_the_users_errors_leave_no_page(datasets: Path, tmp_path: Path) -> None:
    tree = tiny_config(datasets, tmp_path / "run", resume=str(tmp_path / "nowhere"))
    done = pretrain("train", "--config", write_config(tmp_path / "c.yaml", tree), ranks=2, check=False)
    assert done.returncode == 2
    assert f"--resume {tmp_path / 'nowhere'} is not there" in done.stderr
    assert not (tmp_path / "run" / crash.REPORT).exists()


def test_time_at_the_place_before_is_not_held_against_the_limit_of_this_one() -> None:
    """As after a first step that compiled for long, when the rank goes on between a look and the message of it."""
    watcher = object.__new__(Watcher)
    watcher._parent = os.getpid()
    watcher._cell = bytearray(CELL.pack(7, 0, 300.0, 1).ljust(CELL_BYTES, b"\0"))  # type: ignore[assignment]
    watcher._seen, watcher._age_s = bytes(watcher._cell[: CELL.size]), 30.0
    assert (watcher._where()["age_s"], watcher._where()["limit_s"]) == (30.0, 300.0)
    CELL.pack_into(watcher._cell, 0, 8, 0, 20.0, 1)
    assert (watcher._where()["age_s"], watcher._where()["limit_s"]) == (0.0, 20.0)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_ranks_in_trouble(tmp_path: Path) -> None:
    """The short form of hangs.py: who is named and where, that all processes end, and with which status."""
    kinds = ["stop", "lock", "data", "save", "order", "raise", "kill-0", "slow"]
    script = Path(__file__).parent / "hangs.py"
    command = [sys.executable, str(script), "--only", *kinds, "--limit_s", "20", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == kinds
    for kind, place in {
        "stop": "stopped by a signal",
        "lock": "'clipping and update'",
        "data": "'waiting for data'",
        "save": "'save'",
    }.items():
        found = summary[kind]
        assert re.match(r"rank 1 on \S+ hangs at ", found["what"] or ""), f"{kind}: {found}"
        assert place in found["what"], kind
        assert found["statuses"][0] == EXIT_STATUS, f"{kind}: the rank that waits ends with the watchdog's status"
        assert found["statuses"][1] in (EXIT_STATUS, -signal.SIGKILL), f"{kind}: by itself, or else by force"
    stacks = {kind: (tmp_path / kind / crash.STACKS).read_text() for kind in ("stop", "lock", "data", "save")}
    assert all(text.count("=== rank ") == 2 for text in stacks.values())
    assert "in hold_the_lock" in stacks["lock"]
    assert "in sleep" in stacks["data"], "the loader's thread"
    assert "in sleep" in stacks["save"], "the saver's thread"

    assert summary["order"]["statuses"] == [EXIT_STATUS, EXIT_STATUS]
    assert re.search(
        r"number \d+ of gloo 0 \(default_pg\): rank 0: gloo:all_reduce\(2\); rank 1: gloo:broadcast\(7\)$",
        summary["order"]["what"],
    )
    assert "rank 0 on " in summary["raise"]["what"]
    assert "failed first: ValueError: a made-up error" in summary["raise"]["what"]
    found = summary["kill-0"]
    assert re.match(r"rank 0 on \S+ is gone", found["what"] or ""), found
    assert found["statuses"][0] == -signal.SIGKILL
    assert found["statuses"][1] not in (0, -signal.SIGKILL), "the other one ends by itself"

    slow = summary["slow"]
    assert (slow["statuses"], slow["steps"], slow["what"]) == ([0, 0], 12, None), "a false alarm"
    assert slow["stragglers"], "nobody is named"
    assert {line["rank"] for line in slow["stragglers"]} == {1}


def test_a_killed_rank_takes_the_other_agents_ranks_with_it(datasets: Path, tmp_path: Path) -> None:
    """Two torchrun agents, as on two nodes; a rank of the second is killed, and the first one's must not wait for it."""
    tree = tiny_config(datasets, tmp_path / "run", train={"max_steps": 100_000}, validation={"every_steps": 0})
    config_file = write_config(tmp_path / "c.yaml", tree)
    where = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{free_port()}"]
    command = [sys.executable, "-m", "torch.distributed.run", *where, "-m", "pretrain", "train", "--config"]
    agents = [
        subprocess.Popen([*command, str(config_file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    wait_for(tmp_path / "run", 3, agents[0])
    victim = int(Path(f"/proc/{agents[1].pid}/task/{agents[1].pid}/children").read_text().split()[0])
    os.kill(victim, signal.SIGKILL)
    outputs = [agent.communicate(timeout=120)[0] for agent in agents]
    assert all(agent.returncode for agent in agents), "\n".join(outputs)
    page = (tmp_path / "run" / crash.REPORT).read_text()
    assert re.search(rf"rank (\d) on \S+ is gone: it died without a word(.|\n)*rank \1 .*process {victim} ", page), page
    assert not records(tmp_path / "run", "stop")
