"""Streams that are closed, that nobody reads, or that lead to a full disk end no run, and other commands in one line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny_config, wait_for, write_config
from processes import Process

from pretrain.progress import Display
from pretrain.streams import _nothing, _stream

RECORD = {"loss": 1.0, "tokens_per_sec": 1.0, "step_time_s": 1.0, "lr": 1.0, "grad_norm": 1.0}


def unread_pipe() -> int:
    """The end to write to of a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("opened", [unread_pipe, full_disk])
def test_a_log_that_cannot_be_written_does_not_end_a_run(
    opened: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor = opened()
    monkeypatch.setattr(sys, "stdout", _stream(descriptor, None, "replace", _nothing))
    display = Display(max_steps=10, step=0, last_step=10, show=True)
    display.say("a line")
    display.train_line(1, RECORD)
    print("another", flush=True)
    monkeypatch.undo()
    with pytest.raises(OSError, match=r"Broken pipe|No space left"):
        os.write(descriptor, b"a line")
    os.close(descriptor)


def test_a_run_whose_log_nobody_reads_any_more_trains_saves_and_ends_as_it_would(
    datasets: Path, tmp_path: Path
) -> None:
    """As with `| tee log`, where Ctrl-C ends `tee` first."""
    tree = tiny_config(datasets, tmp_path / "run", train={"max_steps": 5_000}, checkpoint={"every_steps": 0})
    config = write_config(tmp_path / "c.yaml", tree)
    os.mkfifo(tmp_path / "log")
    process = Process(("train", "--config", str(config)), dict(os.environ), merged=True, out=tmp_path / "log")
    with open(tmp_path / "log") as log:
        assert next(line for line in log if line.startswith("step 2/"))
    (tmp_path / "log").unlink()
    (tmp_path / "log").touch()  # what a failure of the test would read
    wait_for(tmp_path / "run", 10, process)
    os.kill(process.pid, 2)
    assert process.wait(300) == 130
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["kind"], last["reason"]) == ("stop", "SIGINT")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{last['step']:08d}"]


@pytest.mark.parametrize("module", ["pretrain", "data_prep"])
@pytest.mark.parametrize(
    ("opened", "status", "said"),
    [(unread_pipe, 141, ""), (full_disk, 2, "cannot be written: No space left on device\n")],
)
def test_a_command_whose_output_nobody_gets_ends_quietly_or_in_one_line(
    module: str, opened: Callable[[], int], status: int, said: str
) -> None:
    descriptor = opened()
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, stdout=descriptor, stderr=subprocess.PIPE, text=True, check=False)
    os.close(descriptor)
    assert done.returncode == status
    assert done.stderr.endswith(said)
    assert done.stderr.count("\n") == len(said.splitlines())


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_are_opened_before_anything_else_takes_their_number(closed: str, tmp_path: Path) -> None:
    """A socket with such a number would be lost to the watcher that it is meant for."""
    code = (
        "import os, sys; from pretrain.streams import standard_streams\n"
        "with standard_streams('x'):\n"
        " print('a'); print('b', file=sys.stderr)\n"
        f" open({str(tmp_path / 'fd')!r}, 'w').write(str([os.dup(0) > 2, *map(os.get_inheritable, range(3))]))"
    )
    subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code], capture_output=True, check=True)
    assert (tmp_path / "fd").read_text() == "[True, True, True, True]"


def test_a_table_is_printed_whatever_width_and_letters_there_are() -> None:
    code = (
        "from pretrain.streams import standard_streams; from rich.console import Console\n"
        "with standard_streams('x'): Console().print('before → after')"
    )
    env = {**os.environ, "COLUMNS": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "before ? after\n"
