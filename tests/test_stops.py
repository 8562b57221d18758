"""When a run stops, with which status, and when it is not started again."""

import errno
import itertools
import json
import os
import re
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import records, trajectory, until
from test_incidents import command, no_scheduler, status_of  # noqa: F401  no_scheduler: a fixture

from data_prep.shard import TokenDataset
from pretrain import checkpoint, history, leaving, saver, scheduler, trainer
from pretrain.__main__ import main


def test_preemptions_are_nobodys_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler.note_start(tmp_path, 0)
    monkeypatch.setenv("CRIA_FAILURES", "0")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "40")
    scheduler.check_restarts(tmp_path, 0, limit=3)
    monkeypatch.setenv("CRIA_FAILURES", "3")
    scheduler.check_restarts(tmp_path, 0, limit=3)
    monkeypatch.setenv("CRIA_FAILURES", "4")
    with pytest.raises(ValueError, match="3 restarts have saved nothing"):
        scheduler.check_restarts(tmp_path, 0, limit=3)
    scheduler.check_restarts(tmp_path, 10, limit=3)
    assert json.loads((tmp_path / scheduler.RECORD).read_text()) == {"updates": 10, "restart": 4, "saved": 0}


def test_a_signal_while_the_shards_are_read_ends_the_start(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Terabytes take long; the first step, after which a run stops otherwise, may be an hour away."""
    check, checked = TokenDataset.check, []

    def slow_check(self: TokenDataset, *arguments: object) -> str | None:
        checked.append(self.directory)
        if len(checked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return check(self, *arguments)

    monkeypatch.setattr(TokenDataset, "check", slow_check)
    short = {"train": {"max_steps": 1}, "optim": {"warmup_steps": 1}, "data": {"verify": "full"}}
    assert status_of(command(datasets, tmp_path, **short)) == scheduler.LATER
    assert not list((tmp_path / "run").rglob("crash-report*")), "nobody's fault"
    assert "stopped by a signal while the shards were read" in capsys.readouterr().out
    assert len(checked) == 2
    assert status_of(command(datasets, tmp_path, **short)) == 0
    left = [datasets / name for name in ("a/validation", "b/train", "b/validation")]
    assert checked == [datasets / "a/train", left[0], *left], "what was found good is not read again, and nothing else"


def test_ctrl_c_before_the_first_step_is_no_crash(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TokenDataset, "check", lambda *_: signal.raise_signal(signal.SIGINT))
    assert status_of(command(datasets, tmp_path, data={"verify": "full"})) == 130
    assert not list((tmp_path / "run").rglob("crash-report*"))
    assert capsys.readouterr().err == "pretrain: interrupted\n"


def test_a_stop_does_not_wait_for_data_that_is_away(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that will not be trained are read ahead; what comes after the warning of a job's end is the time to requeue it."""
    read, reads, rate, failed = TokenDataset._read_once, itertools.count(), trainer.learning_rate, threading.Event()

    def away(self: TokenDataset, *arguments: object) -> int:
        if next(reads) < 16:  # two steps
            return read(self, *arguments)
        failed.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def warned(step: int, *arguments: object) -> float:
        if step == 2:
            assert failed.wait(60)
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(step, *arguments)

    monkeypatch.setattr(TokenDataset, "_read_once", away)
    monkeypatch.setattr(trainer, "learning_rate", warned)
    words = command(datasets, tmp_path, data={"num_workers": 1}, validation={"every_steps": 0})
    assert status_of(words) == scheduler.REQUEUE
    until(lambda: not any(thread.name.startswith("loader") for thread in threading.enumerate()))
    assert checkpoint.committed(tmp_path / "run")[0][0] == 2


def test_a_signal_that_comes_when_all_is_saved_does_not_change_the_status(datasets: Path, tmp_path: Path) -> None:
    """A launcher ends the others when one has left; Python's own end takes a while."""
    assert main(command(datasets, tmp_path, train={"max_steps": 1}, optim={"warmup_steps": 1})) == 0
    assert [signal.getsignal(number) for number in scheduler._STOPS] == [signal.SIG_IGN] * len(scheduler._STOPS)


def test_no_terminal_any_more_is_no_signal_under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    scheduler.Stop()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_the_last_save_is_tried_again_while_there_is_time(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit, tries = saver.Saver._commit, []

    def hiccup(self: saver.Saver, *arguments: object) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(5, "Input/output error")
        commit(self, *arguments)

    monkeypatch.setattr(saver.Saver, "_commit", hiccup)
    assert sum(leaving._PAUSES_S) == 45, "as the README says"
    monkeypatch.setattr(leaving, "_PAUSES_S", (1.0, 2.0))
    last = {"checkpoint": {"every_steps": 0}, "train": {"max_steps": 2, "max_hours": 1}, "optim": {"warmup_steps": 1}}
    assert main(command(datasets, tmp_path, **last)) == 0
    assert len(tries) == 3
    assert "the last checkpoint is tried again in 2 s" in capsys.readouterr().out
    assert [step for step, _ in checkpoint.committed(tmp_path / "run")] == [2]

    tries.clear()
    (tmp_path / "late").mkdir()
    monkeypatch.setattr(leaving, "_PAUSES_S", (4000.0,))  # more than the hour
    assert main(command(datasets, tmp_path / "late", **last)) == scheduler.LATER
    assert re.search(
        r"ended after step 2: the last checkpoint was not saved: .*Input/output error", capsys.readouterr().out
    )
    assert len(tries) == 1
    past = history.read(tmp_path / "late" / "run")
    assert (past.saved, past.status.partition("NOT saved since step 0: ")[1]) == (None, "NOT saved since step 0: ")


def test_a_start_after_one_that_came_to_nothing_saves_first_and_ends_where_it_cannot(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day that cannot be saved is a day lost; and a checkpoint that was to stay for good is made up for."""
    commit = saver.Saver._commit
    monkeypatch.setattr(leaving, "_PAUSES_S", ())
    monkeypatch.setenv("CRIA_VAIN", "1")
    saves = {"every_steps": 10, "keep_last": 2, "keep_every": 10}
    words = command(datasets, tmp_path, checkpoint=saves, train={"max_steps": 40, "log_every": 1})
    with monkeypatch.context() as patch:
        patch.setattr(saver.Saver, "_commit", Mock(side_effect=OSError(122, "Disk quota exceeded")))
        assert main(words) == scheduler.LATER
    past = history.read(tmp_path / "run")
    assert 1 <= past.last_step < 10, "it did not train on"
    assert past.saved is None
    assert "Disk quota exceeded" in past.status
    assert main(words) == 0
    past = history.read(tmp_path / "run")
    assert (past.saved, past.unsaved) == (40, None)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    saves_of_steps = [line["step"] for line in lines if line["kind"] == "save" and line["problem"] is None]
    assert saves_of_steps == [1, 10, 20, 30, 40]

    monkeypatch.delenv("CRIA_VAIN")

    def fails_once(self: saver.Saver, staging: Path, target: Path, *rest: object) -> None:
        if target.name == "step-00000010":
            raise OSError(122, "Disk quota exceeded")
        commit(self, staging, target, *rest)

    monkeypatch.setattr(saver.Saver, "_commit", fails_once)
    (tmp_path / "other").mkdir()
    saves = {"every_steps": 5, "keep_last": 1, "keep_every": 10}
    assert main(command(datasets, tmp_path / "other", checkpoint=saves, train={"max_steps": 30})) == 0
    there = [step for step, _ in checkpoint.committed(tmp_path / "other" / "run")]
    assert there == [30, 20, 15], "15 in the place of 10"


def test_a_run_that_cannot_save_for_hours_ends(datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "_PAUSES_S", ())
    monkeypatch.setattr(saver, "_GIVE_UP_S", 0.0)
    monkeypatch.setattr(saver.Saver, "_commit", Mock(side_effect=OSError(122, "Disk quota exceeded")))
    words = command(datasets, tmp_path, checkpoint={"every_steps": 5}, train={"max_steps": 5000, "log_every": 1})
    assert main(words) == scheduler.LATER
    assert 5 <= history.read(tmp_path / "run").last_step < 100


def test_a_clock_that_ends_all_ranks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    display, clocks = (
        SimpleNamespace(said=[]),
        [(1000.0, "rank 0 on a"), (91_000.0, "rank 1 on b"), (1001.0, "rank 2 on c")],
    )
    display.say = display.said.append
    monkeypatch.setattr(leaving.ranks, "gather", lambda mine: clocks)
    leaving._compare_clocks(0.0, display)
    assert display.said == ["the clock of rank 1 on b is 90000 s ahead of that of rank 0 on a: one of them is wrong"]
    clocks[1] = (1030.0, "rank 1 on b")
    leaving._compare_clocks(0.0, display)
    assert len(display.said) == 1, "they agree"


def test_very_many_ranks_agree_every_few_steps(
    datasets: Path,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As 512 would: a signal in step 6 stops the run after step 10, and the same command goes on to the same end."""
    step, agreed = trainer.optimizer_step, []

    def signalled(run: trainer.Run, *rest: object) -> object:
        if run.step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(run, *rest)

    def agree(values: torch.Tensor) -> torch.Tensor:
        agreed.append(values.tolist())
        return values

    monkeypatch.setattr(trainer, "_RANKS_AGREE", 0.25)
    monkeypatch.setattr(trainer, "optimizer_step", signalled)
    monkeypatch.setattr(trainer.ranks, "all_reduce_max", agree)
    words = command(datasets, tmp_path, checkpoint={"every_steps": 0})
    assert main(words) == scheduler.REQUEUE
    assert "stopped by SIGUSR1 after step 10" in capsys.readouterr().out
    asked = [values for values in agreed if isinstance(values, list) and len(values) == 2]  # one number: of memory
    assert asked == [[0, 0], [0, 0], [0, 0], [signal.SIGUSR1, 0]], "before the first validation, and steps 1, 6 and 11"
    monkeypatch.setattr(trainer, "optimizer_step", step)
    assert main(words) == 0
    assert "resumed after step 10" in capsys.readouterr().out
    assert trajectory(tmp_path / "run") == trajectory(straight)


def test_a_folder_that_another_job_has_taken_ends_the_run(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a file system that locks within a host only. What comes after could not be saved: nobody trains it in vain."""
    commit = saver.Saver._commit

    def steal(self: saver.Saver, *arguments: object) -> None:
        commit(self, *arguments)
        (tmp_path / "run" / ".lock").write_text("process 7 on another-host, 0123\n")

    monkeypatch.setattr(saver.Saver, "_commit", steal)
    assert status_of(command(datasets, tmp_path, train={"max_steps": 4000}, checkpoint={"every_steps": 2})) == 2
    said = capsys.readouterr().out.splitlines()[-1]
    assert "not to be saved: another job (process 7 on another-host, 0123) has begun to write into" in said
    assert [step for step, _ in checkpoint.committed(tmp_path / "run")] == [2]
    assert len(records(tmp_path / "run", "train")) < 50


def test_a_chain_of_jobs_goes_back_once(datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--array=1-20%1 with --resume: each task goes on from the one before, and does not go back to PATH again."""
    straight = command(datasets, tmp_path)
    assert main(straight) == 0
    back = [*straight, "--resume", str(tmp_path / "run" / "checkpoints" / "step-00000010")]
    began = []
    monkeypatch.setenv("CRIA_CHAIN", "1")
    for task in ("1", "2", "3"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
        assert main(back) == 0
        starts = [line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"start"' in line]
        began.append(json.loads(starts[-1])["step"])
    assert began == [10, 20, 20]


def test_memory_that_does_not_suffice_is_said_with_what_helps(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the traceback, which is where a user looks, and in the crash report."""

    def too_much(run: trainer.Run, *rest: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(trainer, "optimizer_step", too_much)
    with pytest.raises(torch.OutOfMemoryError) as found:
        main(command(datasets, tmp_path, train={"micro_batch_size": 4}))
    assert found.value.__notes__[0].startswith(
        "train.micro_batch_size 4 of 32 tokens: a smaller one, or parallel.recompute mlp"
    )
    assert "pretrain plan" in (tmp_path / "run" / "crash-report.txt").read_text()
