"""What metrics.jsonl tells of a run, read back.

    metrics.jsonl ── a line a record, only ever appended to ──> read() ──> History: the last record of each kind and step

A run that was killed may have left half a line; a run that was resumed wrote some steps twice, and the last ones count.
This is apart from `pretrain.metrics`, which writes the file, because reading needs neither torch nor Lightning.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from pretrain.reading import json_mapping

Record = dict[str, Any]

_NUMBER = (int, float, type(None))
_FIGURES = (
    "time loss grad_norm lr tokens tokens_per_sec tokens_per_sec_per_gpu mfu_m1_pct mfu_m3_pct peak_mem_gib skipped_steps "
    "tokens_per_step"
)
_TYPES: dict[str, Any] = {
    **dict.fromkeys(_FIGURES.split(), _NUMBER),
    **dict.fromkeys(("step", "max_steps", "parameters", "world_size"), int),
    **dict.fromkeys(("versions", "sources", "validation_sets", "losses"), dict),
    **dict.fromkeys(("steps", "step_losses", "grad_norms"), list),
    "kind": str,
    **dict.fromkeys(("problem", "init_from", "branched_from", "leave_out"), (str, type(None))),
}
"""Of the fields that a report reads."""
_NEEDED = {"validation": ("losses",), "steps": ("steps", "step_losses", "grad_norms")}
"""The fields without which a record of a kind is none."""


@dataclass(frozen=True)
class History:
    """A run so far. Steps are finished optimizer steps, and sorted."""

    starts: list[Record]
    """One a process start, in the order of the file; all but the first are restarts, at step 0 where nothing was saved."""
    train: list[Record]
    """One a line of metrics."""
    steps: list[tuple[int, float | None, float | None]]
    """Step, loss and gradient norm of all steps of which they are known: also of those between lines of metrics."""
    validation: list[Record]
    stop: Record | None
    """How the last process ended; None: it has not, or was killed."""
    torn_lines: int
    """Lines that are no record: a process was killed while it wrote them, or something else wrote them."""
    saved: int | None = None
    """The last step that was saved, or that was gone on from; None: none."""
    unsaved: str | None = None
    """Why the last save failed; None: it did not."""

    @property
    def last_step(self) -> int:
        """The last step with any record (steps)."""
        records = [*self.starts[-1:], *self.train, *self.validation]
        return max([step for step, *_ in self.steps[-1:]] + [record["step"] for record in records])

    @property
    def resumes(self) -> list[int]:
        """The steps after which the run was taken up again."""
        return [record["step"] for record in self.starts[1:] if record["step"]]

    @property
    def branch_step(self) -> int | None:
        """The step of another run's checkpoint that this one begins at (steps); None: it is no branch."""
        origin = self.about.get("branched_from")
        return next(start["step"] for start in self.starts if start.get("branched_from") == origin) if origin else None

    @property
    def about(self) -> Record:
        """The newest start record, which describes model, data and device; empty if the file has none."""
        return self.starts[-1] if self.starts else {}

    @property
    def sources(self) -> dict[str, Record]:
        """What the start says of each source and each of `validation.sets`, by name; also what only validation records have."""
        described = {**self.about.get("sources", {}), **self.about.get("validation_sets", {})}
        validated = [name for record in self.validation for name in record["losses"]]
        return {**described, **{name: {} for name in validated if name not in described}}

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a figure, float64 both; NaN where a record has none. Loss and gradient norm are each step's, all
        others the lines' of metrics.
        """
        if name in ("loss", "grad_norm"):
            place = 1 if name == "loss" else 2
            return _columns([(step[0], step[place]) for step in self.steps])
        return _columns([(record["step"], record.get(name)) for record in self.train])

    def validation_series(self, source: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and validation losses of one source (nats a token), where it has one."""
        return _columns([(r["step"], r["losses"][source]) for r in self.validation if source in r["losses"]])

    def typical(self, name: str) -> float | None:
        """Median of a figure over the train records; without the first, which holds the warming up, if there are more."""
        values = self.series(name)[1]
        values = values[1:] if len(values) > 1 else values
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else None

    @property
    def status(self) -> str:
        """How far the run is, in words."""
        of = f" of {self.about['max_steps']:,}" if "max_steps" in self.about else ""
        unsaved = "" if self.unsaved is None else f"; NOT saved since step {self.saved or 0:,}: {self.unsaved}"
        if self.stop is None:
            return f"step {self.last_step:,}{of}; no end is recorded: it is running, or was killed{unsaved}"
        reason = self.stop.get("reason")
        ended = "finished" if reason == "finished" else f"stopped by {reason}"
        return f"step {self.last_step:,}{of}; {ended}{unsaved}"

    def _last_bits(self, name: str) -> float | None:
        """A source's newest validation loss in bits a byte; None where it is not known."""
        newest = next((record for record in reversed(self.validation) if name in record["losses"]), {})
        bits = newest.get("bits_per_byte")
        return bits.get(name) if isinstance(bits, dict) else None

    def source_lines(self) -> list["SourceLine"]:
        """One a source, then one a set, in the order of the configuration."""
        lines = []
        for name, about in self.sources.items():
            steps, losses = self.validation_series(name)
            begins = self.branch_step or 0
            before = float(losses[0]) if len(steps) and steps[0] == begins else None
            after = float(losses[-1]) if len(steps) and steps[-1] > begins else None
            entropy = about.get("unigram_entropy")
            below = None if after is None or entropy is None else after < entropy
            bits = None if after is None else self._last_bits(name)
            figures = (about.get("train_tokens"), about.get("share"), before, after, entropy, below, bits)
            lines.append(SourceLine(name, *figures))
        return lines


@dataclass(frozen=True)
class SourceLine:
    """What there is to say of a source, or of a set that is only validated on; None: not known, or there is none."""

    name: str
    train_tokens: int | None
    """Prepared for training (tokens)."""
    share: float | None
    """Of every step's sequences, in [0, 1]."""
    loss_before: float | None
    """Validation loss before the run's first step, of a branch before its own (nats a token)."""
    loss_after: float | None
    """The newest validation loss after it (nats a token)."""
    unigram_entropy: float | None
    """Of its validation tokens: what knowing their frequencies alone would reach (nats a token)."""
    below_entropy: bool | None
    """Whether `loss_after` is lower."""
    bits_per_byte: float | None = None
    """`loss_after` in bits a byte of text, which does not depend on the tokenizer."""


def read(run_dir: Path) -> History:
    """Read RUN_DIR/metrics.jsonl.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has no record yet.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{run_dir} has no metrics.jsonl; name the folder of a run (run_dir in its configuration)"
        )
    starts: list[Record] = []
    by_step: dict[str, dict[int, Record]] = {"train": {}, "validation": {}}
    of_steps: dict[int, tuple[float | None, float | None]] = {}
    stop, torn = None, 0
    saved, unsaved = None, None
    for line in path.read_bytes().splitlines():
        record = _parse(line)
        if record is None:
            torn += 1
        elif record["kind"] == "start":
            starts.append(record)
            stop, saved, unsaved = None, record["step"] or None, None
            # What a killed run had logged beyond the checkpoint that this one goes on from is not part of it.
            for of in (*by_step.values(), cast(dict[int, Any], of_steps)):
                for step in [step for step in of if step > record["step"] or record["step"] == 0]:
                    del of[step]
        elif record["kind"] == "stop":
            stop = record
        elif record["kind"] == "save":
            unsaved = record.get("problem")
            saved = record["step"] if unsaved is None else saved
        elif record["kind"] == "steps":
            of_steps.update(zip(record["steps"], zip(record["step_losses"], record["grad_norms"])))
        elif record["kind"] in by_step:
            by_step[record["kind"]][record["step"]] = record
    train, validation = ([records[step] for step in sorted(records)] for records in by_step.values())
    of_steps |= {record["step"]: (record.get("loss"), record.get("grad_norm")) for record in train}  # in full
    steps = [(step, *of_steps[step]) for step in sorted(of_steps)]
    if not starts and not steps and not validation:
        raise ValueError(f"{path} has no record yet; wait for the first one")
    return History(starts, train, steps, validation, stop, torn, saved, unsaved)


def _parse(line: bytes) -> Record | None:
    """A record, or None for half a one, or one of another shape."""
    try:
        record = json_mapping(line)
    except ValueError:
        return None
    needed = {"kind", "step", *_NEEDED.get(str(record.get("kind")), ())}
    return record if needed <= record.keys() and all(_fits(*field) for field in record.items()) else None


def _fits(name: str, value: Any) -> bool:
    """Whether a field is of the type that `pretrain.logbook` writes."""
    if not isinstance(value, _TYPES.get(name, object)):
        return False
    if name in _NEEDED["steps"]:
        return all(isinstance(number, int if name == "steps" else _NUMBER) for number in value)
    if name == "losses":
        return all(isinstance(loss, _NUMBER) for loss in value.values())
    if name in ("sources", "validation_sets"):
        figures = ("train_tokens", "share", "unigram_entropy", "bytes_per_token")
        return all(
            isinstance(about, dict) and all(isinstance(about.get(figure), _NUMBER) for figure in figures)
            for about in value.values()
        )
    return True


def _columns(pairs: list[tuple[int, float | None]]) -> tuple[np.ndarray, np.ndarray]:
    steps = np.array([step for step, _ in pairs], dtype=np.float64)
    return steps, np.array([math.nan if value is None else value for _, value in pairs], dtype=np.float64)


def short(number: float) -> str:
    """A count as people say it: 950, 12.3k, 4.2M, 3T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
