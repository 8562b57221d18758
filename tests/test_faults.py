"""The short form of `make faults`: real kills on 1 and 2 ranks, damaged checkpoints, other ranks (see faults.py)."""

import json
import subprocess
import sys
from pathlib import Path

import fault_runs
import fault_signals
import faults
import pytest


def test_faults_leave_the_run_as_it_was(tmp_path: Path) -> None:
    trials = {"kills": 5, "layouts": 2, "saves": 16, "damage": 100, "signals": 5, "elastic": 1, "data": 6, "jobs": 2}
    short = [part for name, number in trials.items() for part in (f"--{name}", str(number))]
    short += ["--ranks", "1", "2", "--seed", "7"]
    places = ["--folder", str(tmp_path), "--out", str(tmp_path / "out.json")]
    done = subprocess.run(
        [sys.executable, faults.__file__, *short, *places], capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out.json").read_text())
    assert {name: summary[name]["trials"] for name in trials} == trials
    assert sum(summary[name].get("differ", 0) + summary[name].get("missed", 0) for name in trials) == 0
    assert summary["kills"]["places"].keys() >= {"1 ranks", "2 ranks"}
    layouts = summary["layouts"]["places"]
    assert all(layouts[world.name] == 1 for world in fault_runs.LAYOUTS[:2])
    assert layouts["resumed"] == 2, "a run began anew"
    assert all(summary[name]["places"]["resumed at an epoch's edge"] > 0 for name in ("kills", "elastic"))
    signals = summary["signals"]["places"]
    assert all(signals[place] == 1 for place in fault_signals.PLACES)
    assert signals["to another rank than 0"] > 0
    assert all(summary["saves"]["places"][f"fell into a {what}"] > 0 for what in ("flush", "prune", "replayed save"))
    assert len(summary["data"]["places"]) == 6, "each kind of spoilt shard"
    assert summary["damage"]["places"]["flip"] == trials["damage"]
    assert {"2 ranks agree and set it aside", "4 ranks agree and set it aside"} <= summary["damage"]["places"].keys()


def test_summaries_add_up(tmp_path: Path) -> None:
    """What the long form is put together with."""
    part = {"kills": {"trials": 2, "differ": 0, "failures": [], "places": {"1 ranks": 2}}}
    other = {
        "kills": {"trials": 3, "differ": 1, "failures": ["run 0"], "places": {"2 ranks": 3}},
        "saves": {"trials": 1},
    }
    for summary in (part, other):
        faults.write(tmp_path / "out.json", summary, {"torch": "2"}, append=True)
    added = json.loads((tmp_path / "out.json").read_text())
    assert added["kills"] == {"trials": 5, "differ": 1, "failures": ["run 0"], "places": {"1 ranks": 2, "2 ranks": 3}}
    assert added["saves"] == {"trials": 1}


def test_another_version_is_refused_before_hours_of_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults.write(tmp_path / "out.json", {}, {"torch": "2"}, append=False)
    places = ["--append", "--folder", str(tmp_path / "runs"), "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["faults.py", "--kills", "1", *places])
    with pytest.raises(ValueError, match="was made with other versions"):
        faults.main()
    assert not (tmp_path / "runs").exists(), "nothing was begun"
