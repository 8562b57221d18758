"""What a run says of its speed is so; and the log outlives its disk and its loggers.

What cannot be written waits, who fails is switched off, the run goes on.
"""

import json
import os
import re
import resource
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
import wandb
from conftest import records, tiny_config, write_config
from wandb.errors import AuthenticationError, CommError, UsageError

from pretrain import config, data, history, logbook, loggers, metrics, preparation, saver, trainer, validation
from pretrain.model import count


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What W&B is told by it is undone."""
    monkeypatch.setenv("WANDB_MODE", "online")
    for name in ("WANDB_FINISH_TIMEOUT", "WANDB_FINISH_TIMEOUT_RAISES"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_a_steps_time_is_that_of_training_alone(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a step, and of no validation (100 s) and save (50 s) between the five of a line; later steps take longer."""
    now, counts = [1000.0], Counter[str]()

    def takes(owner: Any, name: str, seconds: Iterator[float]) -> None:
        method = getattr(owner, name)

        def slow(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            now[0] += next(seconds)
            return method(*args, **options)

        monkeypatch.setattr(owner, name, slow)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    takes(data.MicroBatches, "__getitem__", repeat(0.125))  # four a step
    takes(trainer, "clip_gradients", chain(repeat(0.5, 5), repeat(1.5, 5)))
    takes(validation, "losses", repeat(100.0))
    takes(saver.Saver, "save", repeat(50.0))
    takes(logbook, "log_start", repeat(20.0))
    sections = {"train": {"max_steps": 10, "log_every": 5}, "validation": {"every_steps": 2}}
    tree = tiny_config(datasets, tmp_path / "run", checkpoint={"every_steps": 3}, **sections)
    run = preparation.prepare(config.load(write_config(tmp_path / "c.yaml", tree)))
    assert trainer.train(run) == 0
    assert counts == {"__getitem__": 40, "clip_gradients": 10, "losses": 6, "save": 4, "log_start": 1}
    figures = {
        step: (line["step_time_s"], line["data_wait_s"], line["tokens_per_sec"])
        for step, line in records(tmp_path / "run", "train").items()
    }
    assert figures == {5: (1.0, 0.5, 8 * 32), 10: (2.0, 0.5, 8 * 32 / 2)}


def test_the_flops_of_a_token_are_tinyllamas_by_both_conventions() -> None:
    """Term by term: embedding, head, 22 layers' products and norms, the last norm; and 22 layers' attention over 2,048."""
    settings = config.load(Path(__file__).parent.parent / "configs" / "tinyllama-1.1b.yaml")
    layer = 2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632
    products = 22 * layer + 32000 * 2048
    whole = products + 32000 * 2048 + (2 * 22 + 1) * 2048
    attention = 22 * 2048 * 2048
    expected = {"m1": 6 * whole + 12 * attention, "m3": 6 * products + 6 * attention}
    assert expected == {"m1": 7_707_586_560, "m3": 6_760_169_472}
    sizes = count(settings.model)
    assert metrics.flops_per_token(settings.model, settings.data.seq_len, sizes.total, sizes.in_products) == expected


def make_log(run_dir: Path, *loggers: object) -> metrics.MetricsLog:
    fabric: Any = SimpleNamespace(is_global_zero=True, loggers=loggers)
    return metrics.MetricsLog(run_dir, fabric)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes: a write takes what fits, and the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def steps(run_dir: Path) -> list[int]:
    """Of the lines that are whole, in the order of the file."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def test_what_a_full_disk_does_not_take_is_written_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = make_log(tmp_path)
    log.write("train", 1, {"loss": 1.0})
    with full_disk((tmp_path / "metrics.jsonl").stat().st_size + 9):
        for step in (2, 3):
            log.write("train", step, {"loss": 1.0})
        assert steps(tmp_path) == [1]
    log.write("train", 4, {"loss": 1.0})
    log.write("train", 5, {"loss": 1.0})
    log.close()
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert history.read(tmp_path).torn_lines == 1, "what fitted of step 2 swallows nothing"
    failed, again = capsys.readouterr().out.splitlines()
    assert "metrics.jsonl cannot be written, training goes on" in failed
    assert "File too large" in failed
    assert "metrics.jsonl is written again, with the 3 lines that were kept" in again


def test_the_last_lines_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "_KEPT_LINES", 2)
    log = make_log(tmp_path)
    with full_disk(0):
        for step in range(1, 5):
            log.write("train", step, {"loss": 1.0})
    log.write("train", 5, {"loss": 1.0})
    assert steps(tmp_path) == [4, 5]
    assert capsys.readouterr().out.endswith("with the 2 lines that were kept; 3 before them are lost\n")
    with full_disk(0):
        log.write("train", 6, {"loss": 1.0})
        log.close()
    assert "its last 1 lines could not be written and are lost" in capsys.readouterr().out


def test_a_file_that_cannot_be_opened_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=r"Is a directory.*metrics.jsonl"):
        make_log(tmp_path)


class Recorder:
    """A logger that notes what it is given, and fails when it is told to."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.calls = fails, list[str]()

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call.startswith(self.fails or "never"):
            raise ValueError("what it says") from KeyError("what it was")

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self._note(f"log {step} {metrics}")

    def finalize(self, status: str) -> None:
        self._note(f"finalize {status}")


class WandbLogger(Recorder):
    """Passes for W&B's: its experiment starts as `starts` says, one a try, and ends as `finish` does."""

    version = "abc"

    def __init__(self, *starts: Exception | None, fails: str = "", finish: Any = None) -> None:
        super().__init__(fails)
        self.starts = list(starts)
        self._finish = finish or (lambda: None)

    @property
    def experiment(self) -> Any:
        if self.starts and (error := self.starts.pop(0)) is not None:
            raise error
        return SimpleNamespace(finish=self.finish, dir="runs/wandb/run-1/files")

    def finish(self) -> None:
        self._note("finish")
        self._finish()


def test_a_logger_that_fails_is_switched_off_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = Recorder(fails="log 2"), Recorder()
    log = make_log(tmp_path, bad, good)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": 1.0, "words": "no number"})
    log.write("straggler", 3, {"rank": 1})
    log.close()
    logged = [f"log {step} {{'train/loss': 1.0}}" for step in (1, 2, 3)]
    assert bad.calls == logged[:2]
    assert good.calls == [*logged, "finalize success"]
    assert steps(tmp_path) == [1, 2, 3, 3]
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "Recorder is switched off, metrics.jsonl goes on: KeyError: 'what it was'"


def test_at_the_end_everything_is_attempted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, good = WandbLogger(fails="fin"), WandbLogger()
    log = make_log(tmp_path, bad, good)
    with full_disk(0):
        log.write("train", 1, {})
        log.close()
    assert bad.calls[1:] == good.calls[1:] == ["finalize success", "finish"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["WandbLogger"] * 2


def test_wandb_uploads_for_a_minute_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def too_slow() -> None:
        raise TimeoutError("Timed out finishing run.")

    make_log(tmp_path, WandbLogger(finish=too_slow)).close()
    (line,) = capsys.readouterr().out.splitlines()
    assert "`wandb sync runs/wandb/run-1`" in line
    settings = wandb.Settings()
    settings.update_from_env_vars(dict(os.environ))
    assert (settings.finish_timeout, settings.finish_timeout_raises) == (60.0, True), "what W&B makes of it"


def test_a_wandb_id_that_a_full_disk_cut_is_made_anew(datasets: Path, tmp_path: Path) -> None:
    """W&B refuses an empty one, at each start."""
    settings = config.load(write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run", logger="wandb")))
    (tmp_path / "run").mkdir()
    for kept in ("", "abc\n"):
        (tmp_path / "run" / loggers.WANDB_ID).write_text(kept)
        (logger,) = loggers.make_loggers(settings)
        assert re.fullmatch(kept.strip() or "[0-9a-f]{8}", str(logger.version))


def test_a_copied_run_is_another_one_at_wandb_and_a_moved_one_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    original.mkdir()
    (original / loggers.WANDB_ID).write_text(f"abc\n{original}\n")
    assert loggers._kept_id(original) == "abc"
    shutil.copytree(original, elsewhere)
    assert loggers._kept_id(elsewhere) == ""
    assert f"go on as run abc, delete {original / loggers.WANDB_ID}" in capsys.readouterr().out
    assert loggers._kept_id(original) == "abc"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "samefile", mock.Mock(side_effect=PermissionError))
        assert loggers._kept_id(elsewhere) == "abc", "of somebody's own folder nothing is known"
    shutil.rmtree(original)
    assert loggers._kept_id(elsewhere) == "abc", "as if it had been moved"
    (tmp_path / "link").symlink_to(elsewhere)
    (elsewhere / loggers.WANDB_ID).write_text(f"abc\n{tmp_path / 'link'}\n")
    assert loggers._kept_id(elsewhere) == "abc", "the same folder by another name"


TO_NOBODY = (
    'Failed to get resume status: context deadline exceeded while retrying: Post "https://x": connection refused'
)


@pytest.mark.parametrize(
    "error", [CommError(TO_NOBODY), CommError("returned error 503: busy"), TimeoutError("no answer")]
)
def test_a_wandb_that_cannot_be_reached_is_waited_for_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    torn_down: list[None] = []
    monkeypatch.setattr(wandb, "teardown", lambda: torn_down.append(None))
    logger = WandbLogger(error)
    make_log(tmp_path, logger).write("train", 1, {"loss": 1.0})
    assert len(logger.calls) == len(torn_down) == 1
    assert os.environ["WANDB_MODE"] == "offline"
    assert (tmp_path / loggers.WANDB_ID).read_text() == f"abc\n{tmp_path}\n"
    (line,) = capsys.readouterr().out.splitlines()
    assert "goes on offline, and `wandb sync` uploads it later" in line
    assert str(error) in line


@pytest.mark.parametrize(
    "error",
    [
        AuthenticationError("the key is none"),
        UsageError("what is meant"),
        CommError('Failed to get resume status for run abc: returned error 401: {"errors":[]}'),
        CommError("Failed to get resume status for run abc: input: user is not logged in"),
    ],
)
def test_a_wandb_that_says_no_is_a_refusal(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(ValueError, match=r"W&B did not start: .*--logger tensorboard"):
        make_log(tmp_path, WandbLogger(error))
    assert os.environ["WANDB_MODE"] == "online"


def test_a_gpus_memory_is_what_tensors_and_the_allocator_took(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"allocated_bytes.all.peak": 3 * 2**30, "reserved_bytes.all.peak": 5 * 2**30, "num_alloc_retries": 7}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    clock = cast(metrics.Clock, SimpleNamespace(steps=4, train_s=2.0, data_wait_s=0.4))
    found = metrics.train_metrics(clock, 1000, 2, {"m1": 1e9}, torch.device("cuda"))
    assert (found["peak_mem_gib"], found["reserved_mem_gib"], found["alloc_retries"]) == (3, 5, 7)
    assert found["tokens_per_sec_per_gpu"] == 1000
    on_cpu = metrics.train_metrics(clock, 1000, 2, {"m1": 1e9}, torch.device("cpu"))
    assert not {"reserved_mem_gib", "alloc_retries"} & set(on_cpu)
