"""The short form of `make faults`: real kills on 1 and 2 ranks, damaged checkpoints, other ranks (see faults.py)."""

import json
import subprocess
import sys
from pathlib import Path


def test_faults_leave_the_run_as_it_was(tmp_path: Path) -> None:
    script = Path(__file__).parent / "faults.py"
    short = ["--kills", "4", "--ranks", "1", "2", "--flips", "100", "--elastic", "1", "--signals", "5", "--seed", "7"]
    command = [
        sys.executable,
        str(script),
        *short,
        "--folder",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out.json").read_text())
    assert summary["kills"]["trials"] == 4
    assert summary["kills"]["differ"] == 0
    assert len(summary["kills"]["places"]) >= 2, "kills of one kind only"
    assert summary["damage"]["trials"] > 50
    assert summary["damage"]["missed"] == 0
    assert summary["signals"]["failed"] == 0, summary["signals"]["failures"]
    assert len(summary["signals"]["places"]) == 5
    assert summary["elastic"]["differ"] == 0
