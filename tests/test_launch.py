"""Life under a scheduler: time limits, restarts that get nowhere, torchrun's agents dying, the same W&B run."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import LONGER, pretrain, records, tiny_config, trajectory, wait_for, write_config
from processes import free_port

from pretrain import checkpoint, cli, metrics, parallel, ranks, run_folder, scheduler
from pretrain.__main__ import main

ROOT = Path(__file__).parents[1]
KEY = "5ec2e7" * 6 + "5ec2"


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> scheduler.Stop:
    """One that no scheduler has told anything yet."""
    for name in ("SLURM_JOB_END_TIME", "CRIA_WARNING_S", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    return scheduler.Stop()


def test_a_run_stops_while_there_is_time_to_save(stop: scheduler.Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stop.asked(save_s=1e6, max_hours=0, margin_s=1e6) == 0, "without a limit there is time"
    begun = time.time()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(begun + 5000))
    assert stop.asked(save_s=0, max_hours=0, margin_s=0) == 0
    monkeypatch.setattr(time, "time", lambda: begun + 4000)
    assert stop.asked(save_s=100, max_hours=0, margin_s=700) == 0
    assert stop.asked(save_s=100, max_hours=0, margin_s=850) == scheduler.OUT_OF_TIME
    assert stop.asked(save_s=200, max_hours=0, margin_s=700) == scheduler.OUT_OF_TIME, "the save counts twice"
    hours = 4400 / 3600
    assert stop.asked(save_s=0, max_hours=hours, margin_s=450) == scheduler.OUT_OF_TIME, "the earlier limit counts"
    assert stop.asked(save_s=0, max_hours=hours, margin_s=350) == 0


def test_the_longest_step_is_kept_free_and_the_first_intervals_say_nothing(
    stop: scheduler.Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, clock = time.time(), time.monotonic()
    end = begun + 100_000
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(end))

    def asked(interval_s: float, left_s: float) -> int:
        nonlocal clock
        clock += interval_s
        monkeypatch.setattr(scheduler, "time", SimpleNamespace(time=lambda: end - left_s, monotonic=lambda: clock))
        return stop.asked(save_s=100, max_hours=0, margin_s=60)

    assert asked(1000, left_s=100_000) == 0, "the first validation"
    assert asked(1000, left_s=261) == 0, "the step that compiles"
    assert asked(1000, left_s=261) == 0
    assert asked(300, left_s=561) == 0
    assert asked(0, left_s=559) == scheduler.OUT_OF_TIME, "300 s earlier"
    assert asked(10, left_s=559) == scheduler.OUT_OF_TIME, "the longest, not the last"
    assert asked(10, left_s=561) == 0


def test_a_job_gets_on_even_after_a_save_that_took_longer_than_it_has(
    stop: scheduler.Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = time.time()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(begun + 1000))
    monkeypatch.setattr(time, "time", lambda: begun)
    assert stop.warnings(save_s=1e6, margin_s=60) == [], "nothing is known yet"
    assert stop.asked(save_s=3000, max_hours=0, margin_s=60) == 0
    (line,) = stop.warnings(save_s=3000, margin_s=60)
    assert "had 1000 s left" in line
    assert "take 6060 s" in line
    assert stop.warnings(save_s=3000, margin_s=60) == [], "said once"
    monkeypatch.setattr(time, "time", lambda: begun + 499)
    assert stop.asked(save_s=3000, max_hours=0, margin_s=60) == 0
    monkeypatch.setattr(time, "time", lambda: begun + 501)
    assert stop.asked(save_s=3000, max_hours=0, margin_s=60) == scheduler.OUT_OF_TIME
    assert stop.asked(save_s=100, max_hours=0, margin_s=60) == 0, "half is the most, not the least"


def test_a_warning_shorter_than_a_save_is_named_once(stop: scheduler.Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRIA_WARNING_S", "300")
    assert stop.warnings(save_s=0, margin_s=60) == [], "nothing was measured yet"
    assert stop.warnings(save_s=149, margin_s=60) == []
    (line,) = stop.warnings(save_s=200, margin_s=60)
    assert "warns 300 s before the end" in line
    assert "take 400 s" in line
    assert "--signal=USR1@480" in line
    assert stop.warnings(save_s=200, margin_s=60) == []


def test_a_save_longer_than_the_grace_of_slurm_is_named_once(
    stop: scheduler.Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert stop.warnings(save_s=26, margin_s=60) == [], "nobody sends SIGKILL"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert stop.warnings(save_s=25, margin_s=60) == []
    (line,) = stop.warnings(save_s=26, margin_s=60)
    assert "a save takes 26 s" in line
    assert "scancel --signal=USR1" in line
    assert stop.warnings(save_s=26, margin_s=60) == []


def test_ctrl_c_alone_is_not_started_again(stop: scheduler.Stop) -> None:
    for reason in (signal.SIGTERM, signal.SIGUSR1, scheduler.OUT_OF_TIME, scheduler.ORPHANED):
        stop.reason = reason
        assert stop.status(steps=1) == scheduler.REQUEUE == 75
    stop.reason = signal.SIGINT
    assert stop.status(steps=1) == 130


def test_a_second_ctrl_c_interrupts_at_once(stop: scheduler.Stop) -> None:
    stop.listen_to_ctrl_c()
    signal.raise_signal(signal.SIGINT)
    assert stop.signalled == signal.SIGINT
    with pytest.raises(SystemExit, match="130"):
        signal.raise_signal(signal.SIGINT)


def test_restarts_without_a_new_checkpoint_come_to_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(restart: int, newest: int) -> None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        for rank in ("1", "0", "2"):  # whoever comes first
            monkeypatch.setenv("RANK", rank)
            scheduler.check_restarts(tmp_path / "run", newest, limit=2)

    start(0, newest=0)
    assert not (tmp_path / "run").exists(), "a start by hand leaves nothing behind where there is no run yet"
    scheduler.note_start(tmp_path / "run", 0)
    start(1, newest=0)
    start(2, newest=0)
    with pytest.raises(ValueError, match=r"2 restarts have saved nothing beyond 0 updates \(train.max_restarts 2\)"):
        start(3, newest=0)
    start(3, newest=10)
    for restart in (4, 5):
        start(restart, newest=10)
    with pytest.raises(ValueError, match="beyond 10 updates"):
        start(6, newest=10)
    start(0, newest=10)  # by hand, and refused because another job has the folder
    with pytest.raises(ValueError, match="beyond 10 updates"):
        start(6, newest=10)
    start(0, newest=10)  # by hand
    scheduler.note_start(tmp_path / "run", 10)
    start(1, newest=10)
    for restart in range(2, 22):
        start(restart, newest=restart * 10)


def test_links_of_a_chain_that_get_nowhere_come_to_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them is a restart for SLURM; launch/slurm.sbatch counts their failures together."""
    monkeypatch.setenv("CRIA_CHAIN", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")

    def link(task: int, failed: int) -> None:
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        monkeypatch.setenv("CRIA_FAILURES", str(failed))
        scheduler.check_restarts(tmp_path / "run", 10, limit=2)
        scheduler.note_start(tmp_path / "run", 10)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / scheduler.RECORD).write_text('{"updates": 10, "restart": 7}')  # an earlier job's
    for task, failed in ((1, 0), (2, 0), (3, 1), (4, 2)):
        link(task, failed)
    with pytest.raises(ValueError, match="2 restarts have saved nothing beyond 10 updates"):
        link(5, 3)
    link(1, 0)  # another chain


def test_the_end_of_the_time_and_a_restart_in_vain_as_commands(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit that leaves time for nothing: no step, status 75, and after some restarts a refusal with status 2."""
    tree = tiny_config(datasets, tmp_path / "run", train={"max_hours": 1e-6, "max_restarts": 1})
    command = ["train", "--config", str(write_config(tmp_path / "c.yaml", tree))]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(command) == scheduler.LATER
    assert "stopped by the end of the job's time after step 0" in capsys.readouterr().out
    assert not checkpoint.committed(tmp_path / "run")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with pytest.raises(SystemExit) as refused:
        main(command)
    assert refused.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 restarts have saved nothing beyond 0 updates" in line


def agents(config_file: Path, logs: Path) -> list[subprocess.Popen]:
    """The same line on two nodes: two agents on this host, one rank each; the first holds the meeting place."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    here = {"NNODES": "2", "HEAD": f"localhost:{free_port()}", "NPROC_PER_NODE": "1", "LOGS": str(logs), "PATH": path}
    command = [ROOT / "launch" / "torchrun.sh", "--config", config_file]
    output = open(logs.with_suffix(".txt"), "ab")  # noqa: SIM115
    started = []
    for _ in range(2):
        started.append(
            subprocess.Popen(command, env={**os.environ, **here}, stdout=output, stderr=output, start_new_session=True)
        )
    output.close()
    return started


@pytest.mark.parametrize("gpus", [None, 0])
def test_torchrun_without_a_gpu_says_what_to_set(tmp_path: Path, gpus: int | None) -> None:
    """No nvidia-smi, or one that finds nothing."""
    if gpus is not None:
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "NPROC_PER_NODE"}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    done = subprocess.run([ROOT / "launch" / "torchrun.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "nvidia-smi lists no GPU" in line
    assert "NPROC_PER_NODE=N" in line


@pytest.mark.parametrize("users", [{}, {"MASTER_ADDR": "users", "CRIA_WARNING_S": "900"}])
def test_a_job_that_is_submitted_again_inherits_only_what_the_user_had_set(users: dict[str, str]) -> None:
    script = (Path(__file__).parent.parent / "launch" / "slurm.sbatch").read_text()
    lines = script[script.index("own=(") :].splitlines()[:2]
    told = "export MASTER_ADDR=here LOGS=l CRIA_WARNING_S=3 SLURM_JOB_END_TIME=9"
    told = "\n".join([*lines, told, 'env "${own[@]}" env'])
    done = subprocess.run(
        ["bash", "-uc", told], env={"PATH": os.environ["PATH"], **users}, capture_output=True, text=True
    )
    names = {line.split("=")[0] for line in done.stdout.splitlines()}
    assert "PATH" in names, done.stderr
    assert names & {"MASTER_ADDR", "LOGS", "CRIA_WARNING_S", "SLURM_JOB_END_TIME"} == users.keys()


@pytest.mark.long
def test_an_agent_that_dies_takes_nothing_with_it(datasets: Path, two_ranks: list[tuple], tmp_path: Path) -> None:
    """Killed alone, its rank and the others save; killed with its rank, the others leave; the next start goes on."""
    config_file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run", **LONGER))
    run_dir = tmp_path / "run"

    first, second = agents(config_file, tmp_path / "logs")
    wait_for(run_dir, 5, first)
    second.kill()
    second.wait()
    assert first.wait(300) in (scheduler.REQUEUE, 1), (tmp_path / "logs.txt").read_text()  # 1: the other held the store
    saved = max(records(run_dir, "train"))
    assert 5 <= saved < 120
    assert checkpoint.committed(run_dir)[0][0] == saved, "a step was lost"
    assert records(run_dir, "stop")[saved]["reason"] == "the death of torchrun's agent"

    first, second = agents(config_file, tmp_path / "logs")
    wait_for(run_dir, saved + 5, first)
    worker = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
    second.kill()
    os.kill(int(worker[0]), signal.SIGKILL)
    second.wait()
    assert first.wait(300) not in (0, scheduler.REQUEUE)

    first, second = agents(config_file, tmp_path / "logs")
    assert (first.wait(300), second.wait(300)) == (0, 0), (tmp_path / "logs.txt").read_text()
    assert trajectory(run_dir) == two_ranks
    assert len(list((tmp_path / "logs").rglob("stdout.log"))) >= 6, "a log a rank"


@pytest.mark.long
def test_usr1_and_ctrl_c_reach_the_ranks_and_the_agents_status_tells(datasets: Path, tmp_path: Path) -> None:
    tree = tiny_config(datasets, tmp_path / "run", train={"max_steps": 4000}, checkpoint={"every_steps": 0})
    config_file = write_config(tmp_path / "c.yaml", tree)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "NPROC_PER_NODE": "2", "LOGS": str(tmp_path / "logs"), "PATH": path}
    listening = ["env", "--default-signal=INT"]  # whoever runs the tests in the background ignores it
    command = [*listening, ROOT / "launch" / "torchrun.sh", "--config", config_file]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    wait_for(tmp_path / "run", 5, process)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == scheduler.REQUEUE, output
    assert "stopped by SIGUSR1 after step" in output
    assert "Traceback" not in output
    assert checkpoint.committed(tmp_path / "run")[0][0] == max(records(tmp_path / "run", "train"))

    process = subprocess.Popen(command, env=environment, **pipes)
    wait_for(tmp_path / "run", max(records(tmp_path / "run", "train")) + 5, process)
    process.send_signal(signal.SIGINT)  # a terminal's Ctrl-C comes to the agent alone
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 130, output
    assert "stopped by SIGINT after step" in output
    assert "Traceback" not in output


def test_the_same_wandb_run_after_a_restart_and_no_key_anywhere(datasets: Path, tmp_path: Path) -> None:
    tree = tiny_config(datasets, tmp_path / "run", train={"max_steps": 2}, optim={"warmup_steps": 1}, logger="wandb")
    config_file = write_config(tmp_path / "c.yaml", tree)
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_API_KEY": KEY, "WANDB_X_SERVICE_WAIT": "300"}
    environment |= {
        "WANDB_CONFIG_DIR": str(tmp_path / "w"),
        "WANDB_CACHE_DIR": str(tmp_path / "w"),
        "WANDB_PROJECT": "herd",
    }
    said = pretrain("train", "--config", config_file, env=environment)
    number = (tmp_path / "run" / "wandb-id.txt").read_text().splitlines()[0]
    again = pretrain("train", "--config", config_file, "--train.max_steps", 3, env=environment)
    folders = list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{number}"))
    assert len(folders) == 2, "two parts of one run"
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2
    for folder in folders:
        (kept,) = (path.read_bytes() for path in folder.glob("*.wandb"))
        for known in (b"herd", b"optim.max_lr", b"parameters", b"train/loss"):
            assert known in kept
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 10
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in said.stdout + said.stderr + again.stdout + again.stderr


def test_wandb_without_a_key_is_one_line(datasets: Path, tmp_path: Path) -> None:
    config_file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run", logger="wandb"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)}
    environment |= {"WANDB_X_SERVICE_WAIT": "300"}
    done = pretrain("train", "--config", config_file, check=False, env=environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("pretrain train: error: ")]
    for words in ("WANDB_API_KEY", "WANDB_MODE=offline", "--logger tensorboard"):
        assert words in line


def test_wandb_ends_before_the_ranks_leave_and_not_as_a_success_after_an_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    class WandbLogger:
        experiment = SimpleNamespace(finish=lambda: called.append("finish"))

        def finalize(self, status: str) -> None:
            called.append(status)

    monkeypatch.setattr(metrics, "start_wandb", lambda run_dir, loggers: None)
    fabric: Any = SimpleNamespace(is_global_zero=True, loggers=[WandbLogger()])
    metrics.MetricsLog(tmp_path, fabric).close()
    assert called == ["success", "finish"]

    def crash() -> None:
        with ExitStack() as at_end:
            at_end.callback(metrics.MetricsLog(tmp_path, fabric).close)
            raise KeyError

    with pytest.raises(KeyError):
        crash()
    assert called[2:] == ["success"]


def test_a_folder_that_is_seen_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = tmp_path / "run"
    monkeypatch.setattr(run_folder.time, "sleep", lambda s: (late.mkdir(), (late / ".lock").write_text("mark")))
    assert run_folder._sees(late, "mark")
    monkeypatch.setattr(run_folder, "_SHARED_S", 0.0)
    assert not run_folder._sees(late, "another")


def test_tasks_of_slurm_without_their_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "16")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    settings: Any = None
    with pytest.raises(ValueError, match=r"16 tasks and WORLD_SIZE is not set"):
        parallel.launch(settings, settings, [])


@pytest.mark.parametrize(("rank", "why"), [(0, "1/2 clients joined"), (1, "Connection refused")])
def test_a_rank_that_is_alone_says_so_in_one_line(
    rank: int,
    why: str,
    datasets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The other node never came: not an hour of silence, but a line with the address and the numbers."""
    monkeypatch.setattr(ranks, "JOIN_TIMEOUT", timedelta(seconds=3))
    monkeypatch.setattr(cli, "PATIENCE_S", 0.0)
    port = free_port()
    alone = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "RANK": rank, "LOCAL_RANK": 0, "GROUP_RANK": rank}
    for name, value in {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, str(value))
    config_file = write_config(tmp_path / "c.yaml", tiny_config(datasets, tmp_path / "run"))
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(config_file)])
    assert ended.value.code == 2
    said = capfd.readouterr().err
    (line,) = [line for line in said.splitlines() if "pretrain train: error" in line]
    assert f"2 ranks were to meet at 127.0.0.1:{port} within" in line
    assert why in line
    assert rank == 0 or said.splitlines() == [line], "nor PyTorch's stack"
