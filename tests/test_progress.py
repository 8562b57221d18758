"""What a user sees of a preparation and of a run while it runs: lines without a terminal, one bar with one."""

import io
import re

import pytest
from rich.console import Console

from data_prep import progress
from data_prep.progress import Display
from pretrain import progress as training


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.mark.parametrize(("total_bytes", "left"), [(5_000_000_000, "12 min left"), (0, "9 min left")])
def test_a_line_a_minute(clock: Clock, capsys: pytest.CaptureFixture, total_bytes: int, left: str) -> None:
    """After three minutes a fifth of the bytes is done; where these are not known, a quarter of the files."""
    with Display("slimpajama train", 4, total_bytes) as display:
        for second in range(1, 181):
            clock.now += 1
            if second == 30:
                display.file_done()
            display.tick(second * 1_000_000_000 // 180, second * 15_000_000)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("slimpajama train: 1/4 files  5.6 MB/s  15.00M tokens/s, ")
    assert lines[2].endswith(left)


def test_one_bar_on_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=120))
    with Display("starcoder train", 2, 1_000_000) as display:
        clock.now += 1
        display.file_done()
        display.tick(500_000, 4_000_000)
    assert "starcoder train" in screen.getvalue()
    assert "1/2 files  0.5 MB/s  4.00M tokens/s" in screen.getvalue()


RECORD = {"loss": 2.34567, "tokens_per_sec": 24_130.0, "lr": 4e-4, "grad_norm": 0.5678, "step_time_s": 2.5}


def test_a_line_a_record_of_training(capsys: pytest.CaptureFixture) -> None:
    """What is left are the steps that are to come, each as long as the last."""
    display = training.Display(10_000, 100, last_step=10_000, show=True)
    for step, left in ((1_000, "6:15:00"), (9_999, "0:00:02"), (10_000, "0:00:00")):
        display.step(step)
        display.train_line(step, RECORD)
        (line,) = capsys.readouterr().out.splitlines()
        figures = "loss 2.3457  24.1k tokens/s  lr 4.00e-04  grad_norm 0.568"
        assert line == f"step {step}/10000  {figures}  {left} left"
    display.say("install .[gpu]")
    display.close()
    assert capsys.readouterr().out == "install .[gpu]\n"
    training.Display(10_000, 100, last_step=10_000, show=False).train_line(1_000, RECORD)  # of another rank
    assert not capsys.readouterr().out


def test_time_left_is_until_the_run_ends(capsys: pytest.CaptureFixture) -> None:
    """As by `train.stop_after_step`; the schedule's length is shown all the same."""
    training.Display(10_000, 100, last_step=1_100, show=True).train_line(1_000, RECORD)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step 1000/10000  ")
    assert line.endswith("  0:04:10 left")


def test_one_bar_of_training_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(training, "Console", lambda **_: Console(file=screen, force_terminal=True, width=120))
    display = training.Display(1_000_000, 100, last_step=1_000_000, show=True)
    display.step(150)
    display.train_line(200, RECORD)
    display.say("saved")
    display.close()
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue())
    assert "saved" in shown
    last = shown.replace("\r", "\n").split("step ")[-1]
    assert last.startswith("200/1000000 ")
    assert "loss 2.3457  24.1k tokens/s" in last
    assert "28d 22h left" in last  # 999,800 steps of 2.5 s
