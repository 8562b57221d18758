"""Every script in benchmarks/ that no other test runs, in miniature: it ends well and writes its result."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "checkpoint": "--models demo --rounds 1",
    "data_prep_kills": "--kills 3",
    "data_prep_scale": "--megabytes 4 --files 60 --rounds 1",
    "data_prep_speed": "--megabytes 2 --rounds 1",
    "data_prep_verify": "--gigabytes 0.1 --rounds 1",
    "intra_document": "--rounds 1 --seq_len 64 --micro_batch_size 2",
    "kernels": "--device cpu --config configs/demo.yaml --micro_batch_size 1 --seq_len 32 --times 1",
    "loader": "--rounds 1 --steps 1",
    "operations": "--device cpu",
    "plan_fit": "",
    "watchdog": "--limits 20 --times 1 --deaths 1 --steps 200 --quiet_limit_s 60",
}
"""The options of a miniature."""
ELSEWHERE = {"gpu", "dry_cuda"}
"""Run by test_bench_gpu.py and test_dry_cuda.py."""
MODULES = {"data_prep_corpus", "data_prep_peers"}
"""Of data_prep_speed.py and data_prep_scale.py."""
PRINTED_ONLY = {"kernels", "operations", "plan_fit"}
LIMITS_OF_TIME = {"checkpoint", "data_prep_scale", "loader", "watchdog"}
"""Their `main` says status 1 for a limit that is missed, which a busy machine does."""


def test_every_script_has_its_miniature() -> None:
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts == {*SCRIPTS, *ELSEWHERE, *MODULES}


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_miniature_ends_well_and_writes_its_result(tmp_path: Path, name: str) -> None:
    """In a copy of the folder, for a script writes beside itself."""
    shutil.copytree(
        ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__")
    )
    results = tmp_path / "benchmarks/results"
    results.mkdir()
    for folder in ("configs", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"benchmarks/{name}.py", *SCRIPTS[name].split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1700)
    said = f"{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    assert done.returncode in ((0, 1) if name in LIMITS_OF_TIME else (0,)), said
    assert done.stdout, said
    assert "Traceback" not in done.stderr, said
    written = {path.name: path.read_text() for path in results.iterdir()}
    if name in PRINTED_ONLY:
        assert not written
        return
    assert {file.partition(".")[0].removesuffix("_cpu").removesuffix("_cuda") for file in written} == {name}, said
    (result,) = (json.loads(text) for file, text in written.items() if file.endswith(".json"))
    assert result
    if name == "watchdog":  # whatever the time it took
        assert all(hang["named"] == hang["all_ended_non_zero"] == hang["of"] for hang in result["hangs"].values()), said
        assert result["deaths"]["named"] == result["deaths"]["of"] == 1, said
        assert (result["quiet"]["alarms"], result["quiet"]["statuses"]) == (0, [0, 0]), said
    if name == "data_prep_scale":
        assert all(result[part]["cria"] for part in ("linear", "checks", "small_files")), said
    if name == "data_prep_kills":
        assert result["kills_in_all"] >= 3, said
        assert result["datasets"] >= 1, said
