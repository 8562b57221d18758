"""The launch script on a real SLURM of two nodes: warned, timed out, cancelled, moved, crashing; always the same run."""

import os
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm
from conftest import LONGER, records, trajectory
from slurm_runs import ROOT, Job

from pretrain import checkpoint

pytestmark = pytest.mark.skipif(not slurm.available(), reason="needs root and slurmctld, slurmd, slurm-client, munge")


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    try:
        with slurm.Slurm(folder, first_job=4001) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def nothing_left(cluster: slurm.Slurm) -> Iterator[None]:
    """What a failed test has left in the queue would disturb the next one."""
    yield
    cluster.run("scancel", "--full", "-u", "root", check=False)


def test_requeued_by_a_signal_a_lost_node_and_the_time_limit_it_is_the_same_run(
    cluster: slurm.Slurm, datasets: Path, two_ranks: list[tuple], tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path)
    # A start has 80 s for its first steps, before it stops for the job's time.
    job.submit(datasets, "--train.stop_margin_s", "20", options=("--time=2", "--signal=URG@0"))
    job.until_step(restart=0, steps=10)
    cluster.run("scancel", "--signal=USR1", job.number)

    job.until_step(restart=1, steps=10)
    cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    job.until_requeued()
    cluster.run("scontrol", "update", "nodename=node2", "state=idle")

    job.until_step(restart=2, steps=10)
    job.sleep_until_the_end(margin_s=20)
    assert job.until_over() == "COMPLETED", job.logs()
    stops = job.stops()
    assert stops[0] == "SIGUSR1", job.logs()
    assert stops[-2:] == ["the end of the job's time", "finished"], job.logs()
    resumed = job.resumed()
    assert (resumed[0], resumed[-1]) == ("SIGUSR1", "the end of the job's time"), resumed
    assert trajectory(job.run_dir) == two_ranks
    assert "restart 3: 2 tasks on node[1-2]" in (tmp_path / "job.log").read_text()
    ranks = [(tmp_path / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1)]
    assert "stopped by SIGUSR1" in ranks[0]
    assert "Traceback" not in ranks[1]


def test_a_cancelled_job_has_saved_and_stays_cancelled(
    cluster: slurm.Slurm, datasets: Path, two_ranks: list[tuple], tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path)
    job.submit(datasets)
    job.until_step(restart=0, steps=10)
    cluster.run("scancel", job.number)
    assert job.until_over() == "CANCELLED", job.logs()
    last = max(records(job.run_dir, "train"))
    assert last < LONGER["train"]["max_steps"]
    assert checkpoint.committed(job.run_dir)[0][0] == last, "a step was lost"
    assert "restart 1" not in (tmp_path / "job.log").read_text()
    job.submit(datasets)
    assert job.until_over() == "COMPLETED", job.logs()
    assert job.resumed() in (["SIGTERM"], ["SIGUSR1"]), "SLURM's own, or the script's, whichever came first"
    assert trajectory(job.run_dir) == two_ranks


@pytest.mark.long
def test_a_job_that_always_crashes_is_not_started_for_ever(
    cluster: slurm.Slurm, datasets: Path, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path)
    bug = {
        "train": {"max_steps": 50, "micro_batch_size": 4, "max_restarts": 1, "max_skipped_steps": 2},
        "optim": {"max_lr": 1e30, "warmup_steps": 1},
    }
    job.submit(datasets, **bug)
    assert job.until_over() == "FAILED"
    lines = (tmp_path / "job.log").read_text()
    # The first update, which spoils the weights, is saved; nothing comes after it.
    assert [n for n in range(6) if f"restart {n}:" in lines] == [0, 1, 2, 3], job.logs()
    said = "1 restarts have saved nothing beyond 1 updates (train.max_restarts 1)"
    assert (tmp_path / "logs" / "rank-0.log").read_text().count(said) == 1


def test_a_node_that_ends_two_starts_in_a_row_is_left_out_and_it_is_the_same_run(
    cluster: slurm.Slurm, datasets: Path, two_ranks: list[tuple], tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path)
    job.submit(datasets, options=("--nodes=1", "--ntasks-per-node=2"), environment={"EXCLUDE_BAD": "1"})
    for restart in (0, 1):
        job.until_step(restart, steps=10)
        os.kill(job.ranks()[1], signal.SIGKILL)
    assert job.until_over() == "COMPLETED", job.logs()
    log = (tmp_path / "job.log").read_text()
    starts = re.findall(r"restart (\d): 2 tasks on (node\d)", log)
    assert starts == [("0", "node1"), ("1", "node1"), ("2", "node2")], log
    assert f"node1 ended two starts in a row and is left out; scontrol update jobid={job.number} excnodelist= " in log
    assert re.search(r"rank \d on node1 is gone", (job.run_dir / "crash-report.txt").read_text())
    assert trajectory(job.run_dir) == two_ranks


SCONTROL = shutil.which("scontrol", path=f"{os.environ['PATH']}:/usr/sbin")
STUB = """#!/usr/bin/env bash
echo "rank $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE on node $GROUP_RANK" \\
  "at $MASTER_ADDR:$MASTER_PORT, $OMP_NUM_THREADS threads, warned $CRIA_WARNING_S s before $SLURM_JOB_END_TIME:" "$@"
[ $((${SLURM_RESTART_COUNT:-0} + ${CRIA_RESTARTS:-0})) -ge 1 ] || exit 75
"""
"""In Python's place: says what it was told, and wants to be started once more."""


def run_stub(
    cluster: slurm.Slurm,
    folder: Path,
    scontrol: bool | str,
    *options: str,
    stub: str = STUB,
    first: str = "",
    date: str | None = None,
    config: tuple[str, ...] = ("--config", "a b.yaml"),
    run_dir: str = "runs/%a",
) -> list[str]:
    """Run the script around the stub until nothing is queued any more; gives the lines of its ranks or agents, sorted.

    scontrol: SLURM's own (True), none (False), or a script in its place. date: a script in the place of date. first: what
    launch/env.sh does besides.
    """
    instead = {True: {}, False: {"scontrol": "#!/bin/sh\nexit 127\n"}}.get(scontrol, {"scontrol": scontrol})
    programs = {"python": stub} | instead | ({"date": date} if date else {})
    (folder / "bin").mkdir()
    for name, text in programs.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    shutil.copytree(ROOT / "launch", folder / "launch")
    with open(folder / "launch" / "env.sh", "a") as env:
        env.write(first)
    small = ["--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=1000", "--time=5"]
    small += [
        "--signal=URG@0"
    ]  # no warning: SLURM sends it up to a minute early, and these five minutes are within its 300 s
    path = f"{folder}/bin:{cluster.environment['PATH']}"
    command = [
        "sbatch",
        "--parsable",
        "--nodes=2",
        *small,
        *options,
        f"--export=ALL,PATH={path}",
        "launch/slurm.sbatch",
    ]
    cluster.run(*command, *config, "--run_dir", run_dir, cwd=folder)
    deadline = time.monotonic() + 800
    while queued := cluster.run("squeue", "-h", "-o", "%i %T").stdout:
        for line in queued.splitlines():
            cluster.hurry(line.split()[0])
        assert time.monotonic() < deadline, queued
        time.sleep(0.1)
    return sorted(line for path in folder.glob("logs/*/*.log") for line in path.read_text().splitlines())


@pytest.mark.parametrize(("kills", "ended", "starts"), [(99, True, 1), (1, False, 1), (1, True, 2)])
def test_a_requeue_that_is_killed_while_it_asks_submits_no_second_job(
    cluster: slurm.Slurm, tmp_path: Path, kills: int, ended: bool, starts: int
) -> None:
    """SLURM ends a job that it requeues, and with it the program that asked; or at the job's end, before it was heard. A user who
    cancels it then is obeyed.
    """
    count = f'{tmp_path}/asked; [ "$(wc -l <{tmp_path}/asked)" -gt {kills} ]'
    asked = f'#!/bin/sh\n[ "$1" != requeue ] || {{ echo >>{count} || kill -TERM $$; }}\nexec {SCONTROL} "$@"\n'
    hour = 3600 if ended else 0  # further on by the clock, once it has asked
    clock = f'#!/bin/sh\n[ "$1" = +%s ] && [ -e {tmp_path}/asked ] || exec /bin/date "$@"\necho $(($(/bin/date +%s) + {hour}))\n'
    lines = run_stub(cluster, tmp_path, asked, date=clock)
    assert len(lines) == 2 * starts, "starts of two ranks"
    (log,) = tmp_path.glob("pretrain-*.log")
    assert ("restart 1:" in log.read_text()) == (starts == 2)


def test_the_script_maps_slurms_variables_and_requeues_each_task_of_an_array(
    cluster: slurm.Slurm, tmp_path: Path
) -> None:
    begun = time.time()
    lines = run_stub(cluster, tmp_path, True, "--array=3,7")
    assert len(lines) == 8, "two tasks of two ranks, twice"
    for task in (3, 7):
        ports = {line.split(":")[1].split(",")[0] for line in lines if line.endswith(f"--run_dir runs/{task}")}
        assert len(ports) == 2, "what still holds the first does not hold up the restart"
        assert all(12000 <= int(port) < 32000 for port in ports)
    assert len({line.split(":")[1].split(",")[0] for line in lines}) == 4, "ports do not collide"
    assert sum(line.startswith("rank 0 of 2, 0 of 1 on node 0 at ") for line in lines) == 4
    assert sum(line.startswith("rank 1 of 2, 0 of 1 on node 1 at ") for line in lines) == 4
    now = time.time()
    for line in lines:
        assert ", 1 threads, warned 300 s before " in line
        assert "-m pretrain train --config a b.yaml --run_dir runs/" in line
        assert begun + 299 <= int(line.split("before ")[1].split(":")[0]) <= now + 301
    assert all("the job is requeued" in log.read_text() for log in tmp_path.glob("pretrain-*.log"))


def test_without_scontrol_the_job_submits_the_next_one(cluster: slurm.Slurm, tmp_path: Path) -> None:
    more = "export RESUBMIT_WITH='--output=again-%j.log --comment=mine'\n"
    # What the job has from the one that it was submitted from, and a file of an older job of its number.
    more += 'older=logs/slurm-$SLURM_JOB_ID/begun-$SLURM_JOB_ID\nif [ -z "${CRIA_RESTARTS:-}" ]; then\n'
    more += 'mkdir -p "${older%/*}"; touch "$older"; export CRIA_TRAINED=1 CRIA_JOB=another\nfi\n'
    stub = STUB.replace('"$@"\n', '"$@" "trained ${CRIA_TRAINED:-0} by $CRIA_JOB"\ntouch "$CRIA_BEGUN"\n')
    lines = run_stub(cluster, tmp_path, False, first=more, stub=stub)
    assert len(lines) == 4, "two ranks, twice"
    job = min(path.name for path in tmp_path.glob("logs/slurm-*")).removeprefix("slurm-")
    said = Counter(line.partition(" --config ")[2] for line in lines)
    words = "a b.yaml --run_dir runs/%a trained"
    assert said == {f"{words} 0 by {job}": 2, f"{words} 1 by {job}": 2}
    assert len(list(tmp_path.glob("logs/slurm-*"))) == 2, "two jobs"
    assert [len(list(tmp_path.glob(f"{name}-*.log"))) for name in ("pretrain", "again")] == [1, 1], "with his options"


def test_another_command_runs_once_whatever_becomes_of_it(cluster: slurm.Slurm, tmp_path: Path) -> None:
    """And --config=FILE is the file as it was at first, as --config FILE is."""
    stub = '#!/bin/sh\necho "$@: $(cat "$5")"\n[ "$SLURM_RESTART_COUNT" ] || exit 1\n'
    (tmp_path / "a b.yaml").write_text("as submitted\n")
    first = "export COMMAND=doctor SRUN_OPTIONS='--label --comment=mine'\n"
    lines = run_stub(cluster, tmp_path, True, stub=stub, first=first, config=("--config=a b.yaml",))
    (kept,) = (path.relative_to(tmp_path) for path in tmp_path.glob("logs/*/config-*.yaml"))
    said = [f"{rank}: -m pretrain doctor --config {kept} --run_dir runs/%a: as submitted" for rank in (0, 1)]
    assert lines == said, "two ranks, once, and srun was given --label"


def test_torchrun_has_one_agent_a_node(cluster: slurm.Slurm, tmp_path: Path) -> None:
    stub = '#!/bin/sh\necho "$SLURM_NODEID: $@"\n'
    first = "export LAUNCHER=torchrun COMMAND=bench\n"
    lines = run_stub(cluster, tmp_path, True, "--ntasks-per-node=2", stub=stub, first=first)
    (logs,) = (path.relative_to(tmp_path) for path in tmp_path.glob("logs/slurm-*"))
    agent = r"launch/agent\.py --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=[\w.-]+:\d{5} --rdzv-id=\d+ "
    words = agent + rf"--log-dir={logs} .*-m pretrain bench --config a b\.yaml --run_dir runs/%a"
    assert [re.fullmatch(rf"{node}: {words}", line) is not None for node, line in enumerate(lines)] == [True] * 2, lines
    assert len({line.split(" ", 1)[1] for line in lines}) == 1, "the agents meet"


@pytest.mark.parametrize("scontrol", [True, False])
def test_a_job_that_cannot_even_start_is_not_started_for_ever(
    cluster: slurm.Slurm, tmp_path: Path, scontrol: bool
) -> None:
    nine = '[ "${SLURM_RESTART_COUNT:-}" ] || CRIA_VAIN=${CRIA_VAIN:-9} CRIA_RESTARTS=${CRIA_RESTARTS:-0}\n'
    lines = run_stub(cluster, tmp_path, scontrol, stub="#!/bin/sh\necho no torch here\nexit 1\n", first=nine)
    assert lines.count("no torch here") == 2 * 4, "two ranks, and four times after nine"
    said = "".join(log.read_text() for log in tmp_path.glob("pretrain-*.log"))
    assert said.count("13 starts in a row came to nothing: the job is not requeued") == 1
    assert ("it starts in 7200 s" in said) == scontrol


def test_only_failures_are_counted_and_the_configuration_stays_that_of_the_first_start(
    cluster: slurm.Slurm, tmp_path: Path
) -> None:
    """No nodes, a crash, a file system that is away, a stop, two in vain, the end; and somebody writes his next configuration.

    All in a job that was submitted from within another one, whose environment SLURM gives it at each start.
    """
    another = "export CRIA_TRAINED=1 CRIA_JOB=3 CRIA_FAILURES=9 CRIA_VAIN=9\n"
    stub = """#!/usr/bin/env bash
echo "$CRIA_FAILURES failures, trained ${CRIA_TRAINED:-0}, job $((CRIA_JOB - SLURM_JOB_ID)), $(cat "$5")"
echo "for the next run" >"a b.yaml"
case ${SLURM_RESTART_COUNT:-0} in
0 | 4) exit 1 ;;
1) touch "$CRIA_BEGUN" && exit 1 ;;
2 | 5) exit 69 ;;
3) exit 75 ;;
esac
"""
    (tmp_path / "a b.yaml").write_text("as submitted\n")
    lines = run_stub(cluster, tmp_path, True, stub=stub, first=another)
    before, after = (f"{n} failures, trained {n}, job 0, as submitted" for n in (0, 1))
    assert lines == [before] * 4 + [after] * 10
    (log,) = tmp_path.glob("pretrain-*.log")
    assert log.read_text().count("it starts in 60 s") == 1, "after the second start that came to nothing"


def test_failures_that_cannot_be_counted_are_paused_and_a_configuration_that_is_gone_is_named(
    cluster: slurm.Slurm, tmp_path: Path
) -> None:
    """As where the file system of the logs is full, or purged of what is old."""
    stub = """#!/usr/bin/env bash
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || { echo "$5" && exit 2; }
mkdir -p "$(dirname "$CRIA_BEGUN")/failures-$SLURM_JOB_ID.new"
rm -f "$5"
touch "$CRIA_BEGUN" && exit 1
"""
    (tmp_path / "a b.yaml").write_text("as submitted\n")
    lines = run_stub(cluster, tmp_path, True, stub=stub)
    assert lines == ["a b.yaml"] * 2
    (log,) = tmp_path.glob("pretrain-*.log")
    said = log.read_text()
    assert "failures are not counted: two hours' pause" in said
    assert "it starts in 7200 s" in said
    assert "is gone: this start takes a b.yaml as it is now" in said


@pytest.mark.parametrize(
    ("run_dir", "counts"),
    [("run", {"1": [0], "2": [1], "3": [2], "": [3]}), ("run/%a", {"1": [0], "2": [0], "3": [0], "": [1] * 3})],
)
def test_links_of_a_chain_count_their_failures_together_and_runs_of_an_array_each_its_own(
    cluster: slurm.Slurm, tmp_path: Path, run_dir: str, counts: dict[str, list[int]]
) -> None:
    """On a site without scontrol, where a job submits the next one if no link comes after it."""
    enough = "$CRIA_FAILURES" if "%a" in run_dir else "$CRIA_FAILURES >= 3"
    stub = f"""#!/usr/bin/env bash
echo "$SLURM_ARRAY_TASK_ID: $CRIA_FAILURES"
((! ({enough}))) || exit 2
[ "$RANK" != 0 ] || touch "$CRIA_BEGUN"
exit 1
"""
    lines = run_stub(cluster, tmp_path, False, "--array=1-3%1", stub=stub, run_dir=run_dir)
    assert lines == sorted(f"{task}: {count}" for task, its in counts.items() for count in its for _ in range(2))


@pytest.mark.long
def test_the_warning_that_the_script_asks_for_comes_from_slurm_to_the_ranks(
    cluster: slurm.Slurm, tmp_path: Path
) -> None:
    """Within a minute: the five that the job has are less than the script's 300 s."""
    stub = """#!/usr/bin/env bash
echo "start ${SLURM_RESTART_COUNT:-0}"
[ "${SLURM_RESTART_COUNT:-}" ] || { trap 'echo warned; exit 75' USR1; for ((i = 0; i < 1200; i++)); do sleep 0.1; done; }
"""
    lines = run_stub(cluster, tmp_path, True, "--signal=USR1@300", stub=stub)
    said = Counter(line for line in lines if line in ("start 0", "start 1", "warned"))  # bash speaks of the signal, too
    assert said == {"start 0": 2, "warned": 2, "start 1": 2}


@pytest.mark.long
def test_ranks_that_outlast_the_jobs_time_do_not_end_the_run(cluster: slurm.Slurm, tmp_path: Path) -> None:
    """SLURM kills them, and the script a moment later."""
    stub = """#!/usr/bin/env bash
echo "start ${SLURM_RESTART_COUNT:-0}"
[ "${SLURM_RESTART_COUNT:-}" ] || { trap '' USR1 TERM; while :; do sleep 1; done; }
"""
    lines = run_stub(cluster, tmp_path, True, "--time=1", stub=stub)
    assert [line for line in lines if line.startswith("start")] == ["start 0"] * 2 + ["start 1"] * 2


def test_nodes_that_are_not_free_are_given_back(cluster: slurm.Slurm, tmp_path: Path) -> None:
    """As where a failed node has left a job less than it was given; here another step holds them."""
    hold = "srun --ntasks=2 sh -c 'touch held-$SLURM_PROCID; exec sleep 600' &"
    held = "while [ ! -e held-0 ] || [ ! -e held-1 ]; do sleep 0.1; done"
    first = f'STEP_WAIT_S=2\n[ "${{SLURM_RESTART_COUNT:-}}" ] || {{ {hold} {held}; }}\n'
    lines = run_stub(cluster, tmp_path, True, first=first)
    assert len(lines) == 2, "two ranks, once"
    (log,) = tmp_path.glob("pretrain-*.log")
    assert "Requested nodes are busy" in log.read_text()
    assert "restart 1: 2 tasks" in log.read_text()
