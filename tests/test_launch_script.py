"""Parts of launch/slurm.sbatch by themselves, which need no SLURM."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("before", "asked", "updates"), [("node7", "1", 1), ("node8", "1", 0), ("node7", "", 0)])
def test_what_was_left_out_before_stays_so(tmp_path: Path, before: str, asked: str, updates: int) -> None:
    """By a controller that is busy at first."""
    script = (ROOT / "launch" / "slurm.sbatch").read_text()
    (leave_out,) = re.findall(r"^leave_out\(\).*?^}", script, re.MULTILINE | re.DOTALL)
    (tmp_path / "named-5").write_text(f"{before}\n")
    (tmp_path / "suspect-5").write_text("node7\n")
    script = f"""set -uo pipefail; logs={tmp_path} job=5 CRIA_SUSPECT={tmp_path}/suspect-5 EXCLUDE_BAD={asked}
sleep() {{ :; }}
scontrol() {{
  case $1 in
  show) [ -e {tmp_path}/asked ] && echo "  ReqNodeList=(null) ExcNodeList=bad[1-3],node9"; touch {tmp_path}/asked ;;
  update) echo "$*" >>{tmp_path}/updates ;;
  esac
}}
{leave_out}
leave_out"""
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False).stdout
    log = tmp_path / "updates"
    assert (log.read_text() if log.exists() else "") == "update jobid=5 excnodelist=bad[1-3],node9,node7\n" * updates
    assert said.count("excnodelist=bad[1-3],node9 takes it back") == updates
    assert (tmp_path / "named-5").read_text() == "node7\n"


def test_the_pauses_between_starts_that_come_to_nothing_are_ten_hours() -> None:
    """The script's own arithmetic, by bash; a job is not started again after the last."""
    script = (ROOT / "launch" / "slurm.sbatch").read_text()
    (pause,) = re.findall(r"^pause=.*", script, re.MULTILINE)
    (enough,) = re.findall(r"^ENOUGH=(\d+)", script, re.MULTILINE)
    loop = f"for ((CRIA_VAIN = 1; CRIA_VAIN < {enough}; CRIA_VAIN++)); do\n{pause}\necho $pause\ndone"
    said = subprocess.run(["bash", "-c", loop], capture_output=True, text=True, check=True).stdout
    pauses = list(map(int, said.split()))
    assert pauses[:5] == [0, 60, 120, 240, 480]
    assert 10 * 3600 <= sum(pauses) < 11 * 3600
