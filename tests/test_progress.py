"""What a user sees while it runs: a line a minute without a terminal, one bar with one."""

import io

import pytest
from rich.console import Console

from data_prep import progress
from data_prep.progress import Display


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


@pytest.mark.parametrize(("total_bytes", "left"), [(4_000_000_000, "9 min left"), (0, "9 min left")])
def test_a_line_a_minute(clock: Clock, capsys: pytest.CaptureFixture, total_bytes: int, left: str) -> None:
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
