"""The array job on a real SLURM: the parts join to the bytes of a single run, whatever was cancelled on the way."""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm
from test_prepare import assert_same_bytes, corpus, options, undisturbed  # noqa: F401  corpus, undisturbed: fixtures
from test_prepare_kills import write_long_files
from test_tokenizer import LLAMA_MODEL

from data_prep.__main__ import main
from data_prep.prepare import run

pytestmark = pytest.mark.skipif(not slurm.available(), reason="needs root and slurmctld, slurmd, slurm-client, munge")
LAUNCH = Path(__file__).parents[1] / "launch"


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    try:
        with slurm.Slurm(folder, job_requeue=0) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def submit(
    cluster: slurm.Slurm,
    corpus: Path,  # noqa: F811
    out: Path,
    logs: Path,
    *more: str,
    array: str = "1-3",
    export: str = "",
    encoder: str = "auto",
) -> str:
    """Submit an array, of three tasks."""
    arguments = ["slimpajama", "--input", corpus, "--split", "train", "--tokenizer", LLAMA_MODEL, "--out", out]
    arguments += ["--encoder", encoder]
    where = [*more, f"--array={array}", "--cpus-per-task=1", "--mem-per-cpu=100M", f"--output={logs}/%a.log"]
    path = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    environment = f"--export=ALL,PATH={path}{export}"
    script = [*where, "launch/prepare.sbatch", *arguments]
    done = cluster.run("sbatch", "--parsable", environment, *script, cwd=LAUNCH.parent)
    return done.stdout.strip()


def test_an_array_makes_the_bytes_of_a_single_run(
    cluster: slurm.Slurm,
    corpus: Path,  # noqa: F811
    undisturbed: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "out"
    job = submit(cluster, corpus, out, tmp_path, "--hold")
    cluster.run("scancel", f"{job}_2")
    cluster.run("scontrol", "release", job)
    states = cluster.wait(job)
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.log")}
    assert (states[f"{job}_1"], states[f"{job}_3"]) == ("COMPLETED", "COMPLETED"), logs
    assert "2.log" not in logs
    assert not (out / "manifest.json").exists()
    assert main(["finish", str(out)]) == 2
    missing = capsys.readouterr().err
    assert "2 of 6 input files are not done: train/chunk1/example_train_2.jsonl.zst, train/chunk2/" in missing
    wrong = submit(cluster, corpus, out, tmp_path, array="2")
    assert cluster.wait(wrong) == {f"{wrong}_2": "FAILED"}
    said = (
        "1 tasks from 2 to 2 are not all of 1-N; say how many there are in all: sbatch --array=... --export=ALL,TASKS=N"
    )
    assert said in (tmp_path / "2.log").read_text()
    again = submit(cluster, corpus, out, tmp_path, array="2", export=",TASKS=3")
    assert cluster.wait(again) == {f"{again}_2": "COMPLETED"}
    assert "task 2 of 3 is done" in (tmp_path / "2.log").read_text()
    assert main(["finish", str(out)]) == 0
    assert_same_bytes(out, undisturbed)


def test_a_task_at_work_is_requeued_or_cancelled_and_goes_on(cluster: slurm.Slurm, tmp_path: Path) -> None:
    """On a cluster that requeues only who asks for it. Its log goes on too, and what it had done is not done again."""
    out, files = tmp_path / "out", 12
    write_long_files(tmp_path / "in", files, 1.0)
    run(options(tmp_path / "in", tmp_path / "undisturbed"))
    job = submit(cluster, tmp_path / "in", out, tmp_path, "--hold", array="1-2", encoder="reference")

    def wait_for_a_record(task: int) -> None:
        records = [out / f"units/train/chunk1/{n}.jsonl.zst.json" for n in range(task - 1, files, 2)]
        cluster.until(lambda: any(path.exists() for path in records), pause_s=0.02)

    cluster.run("scontrol", "release", f"{job}_1")
    wait_for_a_record(1)
    cluster.run("scontrol", "requeue", f"{job}_1")
    cluster.run("scontrol", "release", f"{job}_2")
    wait_for_a_record(2)
    cluster.run("scancel", f"{job}_2")
    cluster.until(lambda: (cluster.hurry(f"{job}_1"), cluster.state(job)[f"{job}_1"])[1] == "COMPLETED", 300)
    assert cluster.wait(job) == {f"{job}_1": "COMPLETED", f"{job}_2": "CANCELLED"}
    again = submit(cluster, tmp_path / "in", out, tmp_path, array="2", export=",TASKS=2", encoder="reference")
    assert cluster.wait(again) == {f"{again}_2": "COMPLETED"}
    for task in (1, 2):
        log = (tmp_path / f"{task}.log").read_text()
        assert log.count("encoding with sentencepiece, as asked") == 2, log
        (done,) = re.findall(r"(\d) of 6 input files done now", log)
        assert 1 <= int(done) < 6
    assert main(["finish", str(out)]) == 0
    assert_same_bytes(out, tmp_path / "undisturbed", but="units/")  # they say what encoded them


def test_a_single_job_is_told_to_be_an_array(cluster: slurm.Slurm, tmp_path: Path) -> None:
    log = tmp_path / "log"
    small = ["--cpus-per-task=1", "--mem-per-cpu=100M", f"--output={log}"]
    job = cluster.run("sbatch", "--parsable", *small, "launch/prepare.sbatch", "slimpajama", cwd=LAUNCH.parent)
    job = job.stdout.strip()
    assert cluster.wait(job) == {job: "FAILED"}
    assert "submit it with --array=1-N" in log.read_text()
    assert os.access(LAUNCH / "prepare.sbatch", os.R_OK)
