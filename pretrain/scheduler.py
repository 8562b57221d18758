"""Life under a scheduler: when to stop, with which status, and when not to start again.

    SIGTERM, SIGUSR1 ─────────────────────┐
    the end of the job's time comes near ─┼─> Stop.asked() on each rank ─> the ranks agree (trainer) ─> save ─> REQUEUE
    the launcher is gone ─────────────────┘
    SIGINT (Ctrl-C) ─> the same, but a person meant it: 130

    failed, started again ─> check_restarts: a new checkpoint since the last time? ─> go on, or refuse after some times without

`launch/slurm.sbatch` requeues its job after REQUEUE, LATER and a crash, and never after 0, 2 (refused) or 130. It tells the run:

    CRIA_FAILURES   failures of this job so far, without preemptions      failures
    CRIA_VAIN       starts in a row that came to nothing                  last_start_in_vain
    CRIA_TRAINED    1: a start of this job has trained                    check_restarts
    CRIA_JOB        the same in all starts of a job and its successors    job
    CRIA_RESTARTS   how often it has submitted itself (no scontrol)       restarts
    CRIA_CHAIN      1: the tasks of the array are links of one run        repeated
    CRIA_WARNING_S  from its warning to the end (seconds)                 Stop.warnings
    CRIA_CONFIG     the file that --config named before it was copied     train

and has it answer in files: CRIA_BEGUN, made when training begins (note_training); CRIA_SUSPECT, the host to blame
(hosts.suspect).
"""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from data_prep.shard import write_atomically
from pretrain.reading import json_mapping

REQUEUE = 75
"""Exit status of a run that was stopped, has saved, and is to be started again (EX_TEMPFAIL of sysexits.h)."""
LATER = 69
"""Exit status of a start that may do better later (EX_UNAVAILABLE): no step was done, what was trained last could not be saved,
or, at a restart, a machine, the data or a file system was away."""
RECORD = "restarts.json"
OUT_OF_TIME, ORPHANED, UNSAVED, TAKEN = 90, 91, 92, 93
"""Why a run stops, where it is no signal, whose numbers are lower: the end of the job's time, the death of torchrun's agent,
saves that fail, another job that has the run's folder. The ranks agree on the largest: what leaves less to be done comes last.
"""
KILL_WAIT_S = 30
"""SLURM's KillWait, unless a site sets another: SIGKILL comes so long after the SIGTERM of scancel or a preemption (seconds)."""
SAVES = 2.0
"""So many times the longest of the last saves is kept free before the end of the job's time: one being written, and the last."""

_STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals after which a run saves and is to be started again; the last is what a lost terminal sends."""


_PATIENCE = """
Ctrl-C: the step is finished and saved; once more leaves without, and what was trained since the last save is lost
"""


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


class Stop:
    """Notes what asks this process to stop. Made first of all, so that nothing is lost while the run starts."""

    def __init__(self) -> None:
        self.reason = 0
        """What the ranks agreed on: a signal's number, OUT_OF_TIME, ORPHANED, UNSAVED or TAKEN; 0 while they go on."""
        self.save_now = False
        """Whether the ranks agreed to save after this step, whatever its number."""
        self.signalled = 0
        """The number of the signal that this rank got, or 0."""
        self._started = time.time()
        # Start-up, the first validation and the first step, which compiles, are unlike all later ones.
        self._intervals = -3
        self._asked_before = time.monotonic()
        self._longest_s = 0.0
        self._at_first_s: float | None = None
        """What was left of the job's time when training began (seconds); None: not known yet, or no end."""
        self._warned: set[str] = set()
        self._agent = torchrun_agent()
        for number in _STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._received)

    def listen_to_ctrl_c(self) -> None:
        """From now on SIGINT too stops the run after its step; a second one ends the process without another save."""
        signal.signal(signal.SIGINT, self._received)

    def over(self) -> None:
        """The run has saved: a signal that comes while Python ends must not turn its status into the signal's."""
        for number in _STOPS:
            signal.signal(number, signal.SIG_IGN)

    def _received(self, number: int, frame: FrameType | None) -> None:
        self.signalled = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, _leave_at_once)
            if os.environ.get("RANK", "0") == "0":
                with suppress(OSError):  # nobody reads it any more
                    os.write(2, _PATIENCE.encode())  # print may be what was interrupted

    def asked(self, save_s: float, max_hours: float, margin_s: float) -> int:
        """Why this rank would stop now, or 0. Called between steps; the ranks take the largest answer.

        save_s: the longest of the last saves (seconds); max_hours: see `train.max_hours`; margin_s: see `train.stop_margin_s`.
        At most half of what was left when training began is kept free: a job always gets on, whatever the last save took.
        """
        now = time.monotonic()
        self._intervals += 1
        if self._intervals > 0:  # a step, and what lay between two steps: a validation, say
            self._longest_s = max(self._longest_s, now - self._asked_before)
        self._asked_before = now
        if self.signalled:
            return self.signalled
        if self._agent is not None and os.getppid() != self._agent:
            return ORPHANED
        left_s = self.left_s(max_hours)
        if left_s is None:
            return 0
        if self._at_first_s is None:
            self._at_first_s = left_s
        return OUT_OF_TIME if left_s < min(self.needed_s(save_s, margin_s), self._at_first_s / 2) else 0

    def needed_s(self, save_s: float, margin_s: float) -> float:
        """Seconds from now until the run has certainly saved and left: a step, SAVES saves, and the margin."""
        return self._longest_s + SAVES * save_s + margin_s

    def left_s(self, max_hours: float) -> float | None:
        """Seconds until the job ends: by the scheduler's word, or `max_hours` after the start; None: unknown."""
        ends = []
        with suppress(ValueError):  # not known: "", or "Unknown"
            ends.append(float(os.environ.get("SLURM_JOB_END_TIME", "")))
        ends += [self._started + 3600 * max_hours] if max_hours else []
        return min(ends) - time.time() if ends else None

    def warnings(self, save_s: float, margin_s: float) -> list[str]:
        """Lines, each once: where the job's time, the scheduler's warning or its patience is too short to save in.

        save_s: the longest of the last saves, 0 before the first (seconds); margin_s: see `train.stop_margin_s`.
        """
        needed_s, said = self.needed_s(save_s, margin_s), {}
        if self._at_first_s is not None and needed_s > self._at_first_s / 2:
            said["job"] = (
                f"the job had {self._at_first_s:.0f} s left when training began; a step, {SAVES:.0f} saves and the margin take "
                f"{needed_s:.0f} s, and no more than half is kept free: give it more time (sbatch --time)"
            )
        warning_s, needed_s = float(os.environ.get("CRIA_WARNING_S") or "inf"), self.needed_s(save_s, 0)
        if save_s and warning_s < needed_s:
            said["warning"] = (
                f"sbatch's --signal warns {warning_s:.0f} s before the end, and a step and {SAVES:.0f} saves take {needed_s:.0f} "
                f"s: give --signal=USR1@{60 * (int(needed_s) // 60 + 2)}"
            )
        if "SLURM_JOB_ID" in os.environ and save_s > KILL_WAIT_S - 5:  # for the step and the exit
            said["KillWait"] = (
                f"a save takes {save_s:.0f} s, and SLURM kills {KILL_WAIT_S} s (KillWait's default) after the SIGTERM of scancel "
                "or a preemption: stop the run by scancel --signal=USR1, and have the partition's GraceTime longer than that"
            )
        new = [line for name, line in said.items() if name not in self._warned]
        self._warned |= said.keys()
        return new

    @property
    def why(self) -> str:
        """The reason in a word, e.g. SIGTERM."""
        words = {
            OUT_OF_TIME: "the end of the job's time",
            ORPHANED: "the death of torchrun's agent",
            UNSAVED: "saves that fail",
        }
        return words.get(self.reason) or signal.Signals(self.reason).name

    def status(self, steps: int) -> int:
        """The exit status of a process that made `steps` steps: 2 for TAKEN, 130 for Ctrl-C, LATER if none, else REQUEUE."""
        if self.reason == TAKEN:
            return 2
        if self.reason == signal.SIGINT:
            return 128 + signal.SIGINT
        return LATER if steps == 0 else REQUEUE


def torchrun_agent() -> int | None:
    """The process of torchrun's agent, where that has started this one: a parent that must not go, as a shell may."""
    return os.getppid() if "TORCHELASTIC_USE_AGENT_STORE" in os.environ else None


def restarts() -> int:
    """How often the scheduler has started this job again by itself."""
    counters = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "CRIA_RESTARTS")
    return sum(int(os.environ.get(name) or 0) for name in counters)


def repeated() -> bool:
    """Whether a scheduler repeats a command that has been started before: a restart, or a later job of a chain."""
    task, first = (os.environ.get(f"SLURM_ARRAY_TASK_{name}") or "0" for name in ("ID", "MIN"))
    return restarts() > 0 or (bool(os.environ.get("CRIA_CHAIN")) and int(task) > int(first))


def last_start_in_vain() -> bool:
    """Whether launch/slurm.sbatch knows that the job's last start came to nothing."""
    return int(os.environ.get("CRIA_VAIN") or 0) > 0


def note_training() -> None:
    """Tell launch/slurm.sbatch that this start has come as far as to train: if it fails now, that is a failure of the run."""
    marker = os.environ.get("CRIA_BEGUN")
    if marker and os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            Path(marker).touch()


def job() -> str:
    """What all starts of one job have in common, also of a job that submits its next one; "" where nobody says."""
    names = ("CRIA_JOB", "SLURM_ARRAY_JOB_ID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def failures() -> int:
    """How often this job has failed so far: as launch/slurm.sbatch counts, or every restart where nobody tells them apart.

    A preemption or a lost node is nobody's failure.
    """
    counted = os.environ.get("CRIA_FAILURES")
    return int(counted) if counted else restarts()


def check_restarts(run_dir: Path, updates: int, limit: int) -> None:
    """Hold a job that fails again and again and gets nowhere; called by all ranks, before they join.

    restarts.json says at which failure there last was a new checkpoint; a start by hand begins anew (`note_start`), and so does
    the first link of a chain, but not the others.
    updates: of the weights, as the newest checkpoint has them (steps that are skipped get nowhere); limit: see
    `train.max_restarts`.

    Raises:
        ValueError: after the last `limit` failures, the same for all ranks, no restart made a checkpoint with more of them.
        OSError: launch/slurm.sbatch knows that this job has trained, and the run's folder is not there.
    """
    if os.environ.get("CRIA_TRAINED") and not run_dir.exists():
        raise OSError(f"{run_dir} is not there, and this job has trained in it: is its file system away?")
    if not failures():
        return
    seen = _recorded(run_dir)
    # Another newest one is progress, an earlier one too: the run was sent back, and went on from there.
    without_progress = failures() - seen["restart"] if updates == seen["updates"] else 0
    if without_progress > limit:
        raise ValueError(
            f"{without_progress - 1} restarts have saved nothing beyond {updates} updates (train.max_restarts {limit}), and "
            "this one is not tried; mend what the logs say, then submit the job anew"
        )
    if without_progress == 0 and os.environ.get("RANK", "0") == "0":
        _record(run_dir, updates)


def note_start(run_dir: Path, updates: int) -> None:
    """A start before which nothing has failed, as one by hand, begins to count anew.

    Called by who holds the run's lock, so that a job that is refused changes nothing.
    """
    if not failures():
        _record(run_dir, updates)


def note_saved(run_dir: Path) -> None:
    """The run has a checkpoint: where there is none any more, it was lost. Called by who holds the run's lock."""
    seen = _recorded(run_dir)
    if not seen["saved"]:
        write_atomically(run_dir / RECORD, json.dumps({**seen, "saved": 1}).encode() + b"\n")


def has_saved(run_dir: Path) -> bool:
    """Whether the run has ever had a checkpoint."""
    return bool(_recorded(run_dir)["saved"])


def _record(run_dir: Path, updates: int) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    record = {**_recorded(run_dir), "updates": updates, "restart": failures()}
    write_atomically(run_dir / RECORD, json.dumps(record).encode() + b"\n")


def _recorded(run_dir: Path) -> dict[str, int]:
    """What restarts.json says."""
    seen = {"updates": 0, "restart": 0, "saved": 0}
    with suppress(OSError, ValueError):  # what a lost node left torn says nothing
        seen |= json_mapping((run_dir / RECORD).read_bytes())
    return seen
