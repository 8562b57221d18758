"""What rank 0 shows of a run: a progress bar on a terminal; elsewhere a line for each record of metrics.

A log that cannot be written any more ends no run: `streams` sees to that.
"""

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text


class Display:
    """A bar with loss, tokens/s and time left; or, where nobody looks on, one line a call of `train_line`."""

    def __init__(self, max_steps: int, step: int, *, last_step: int, show: bool):
        """last_step: where this run ends, which may be before `max_steps`; the time left is until there."""
        self._console = Console(quiet=not show, highlight=False, soft_wrap=True)
        self._max_steps, self._last_step = max_steps, last_step
        self._bar: Progress | None = None
        if show and self._console.is_terminal:
            left = _TimeLeft()
            columns: tuple[ProgressColumn, ...] = (
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                left,
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("train", total=max_steps, completed=step, figures="", seconds_left=None)
            self._bar.start()

    def step(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def train_line(self, step: int, record: dict[str, float]) -> None:
        """Show a `train` record of the metrics."""
        figures = f"loss {record['loss']:.4f}  {_short(record['tokens_per_sec'])} tokens/s"
        seconds_left = (self._last_step - step) * record["step_time_s"]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures, seconds_left=seconds_left)
            return
        rest = f"lr {record['lr']:.2e}  grad_norm {record['grad_norm']:.3f}  {_duration(seconds_left)} left"
        self._console.print(f"step {step}/{self._max_steps}  {figures}  {rest}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, markup=False)  # "[gpu]" is no style

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()


class _TimeLeft(ProgressColumn):
    """Time left by the last line's step time; rich's own estimate would count a resume's start-up and validation."""

    def render(self, task: Task) -> Text:
        seconds = task.fields["seconds_left"]
        return Text("" if seconds is None else f"{_duration(seconds)} left")


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days}d {h:02d}h" if days else f"{h}:{m:02d}:{s:02d}"
