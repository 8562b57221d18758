"""Rows of `pretrain bench` that are timed in processes of their own: they end, whatever ends first."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import Process, tiny_config, until, write_config

from pretrain import bench_rows, processes


def gone(pid: int) -> bool:
    return processes.stat(pid)[:1] in ([], ["Z"])


def test_a_child_that_fails_hangs_or_dies_is_a_row(tmp_path: Path) -> None:
    def row(script: str, timeout_s: float | None = None) -> dict:
        return bench_rows.Child(["python3", "-c", script], tmp_path / "row.json", timeout_s).row()

    assert row("raise ValueError('no such peer')")["problem"] == "failed with status 1: ValueError: no such peer"
    refused = "import sys; sys.exit('pretrain bench: error: there is no such data\\n===')"
    assert row(refused)["problem"] == "refused: there is no such data"
    spent = "raise RuntimeError('CUDA out of memory. Tried to allocate 1 GiB')"
    assert row(spent)["problem"].startswith("does not fit: ")
    assert "killed" in row("import os; os.kill(os.getpid(), 9)")["problem"]
    assert row("import time; time.sleep(1000)", timeout_s=0.2)["problem"].startswith("not timed: stopped after")


def test_a_child_that_is_killed_takes_its_ranks_along(tmp_path: Path) -> None:
    """Each rank of torchrun's has a session of its own."""
    asleep = "import subprocess, sys, time; {}time.sleep(1000)"
    rank = f"rank = subprocess.Popen([sys.executable, '-c', {asleep.format('')!r}], start_new_session=True); "
    script = asleep.format(rank + f"open({str(tmp_path / 'rank')!r}, 'w').write(f'{{rank.pid}}\\n'); ")
    child = bench_rows.Child([sys.executable, "-c", script], tmp_path / "row.json", None)
    until(lambda: (tmp_path / "rank").exists() and (tmp_path / "rank").read_text() != "")
    pid = int((tmp_path / "rank").read_text())
    child.kill()
    until(lambda: gone(pid))


def test_a_child_and_its_ranks_die_with_who_started_them_even_by_sigkill(tmp_path: Path) -> None:
    """A rank does what `pretrain bench --row` does first of all."""
    rank = "import time; from pretrain import processes; processes.die_with_parent(); print('rank', flush=True); time.sleep(1000)"
    agent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}], start_new_session=True)"
    command = f"from pretrain import processes; processes.bound([sys.executable, '-c', {agent!r}])"
    bench = f"import subprocess, sys; {command}; subprocess.run({command.partition('; ')[2]}, start_new_session=True)"
    environment = {**os.environ, "PYTHONPATH": str(bench_rows.ROOT)}
    with subprocess.Popen([sys.executable, "-c", bench], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "rank\n"
        family = processes.descendants(process.pid)
        assert len(family) == 2
        process.kill()
        until(lambda: all(gone(pid) for pid in family))


@pytest.mark.parametrize("kind", [["--sweep"], ["--peers"], ["--paper", "--scale", "0.01"]], ids=lambda kind: kind[0])
def test_sigterm_leaves_no_process_and_no_folder(kind: list[str], tmp_path: Path) -> None:
    settings = write_config(tmp_path / "tiny.yaml", tiny_config(Path("/nowhere"), tmp_path / "run"))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    argv = ("bench", "--config", str(settings), *kind)
    process = Process(argv, {**os.environ, "TMPDIR": str(temporary)})

    def times_a_row(pid: int) -> bool:
        with suppress(OSError):
            return b"--row" in Path(f"/proc/{pid}/cmdline").read_bytes()
        return False

    until(lambda: any(map(times_a_row, processes.descendants(process.pid))))
    family = processes.descendants(process.pid)
    assert any(temporary.iterdir())
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143
    assert process.communicate()[1] == "pretrain bench: interrupted by SIGTERM\n"
    until(lambda: all(gone(pid) for pid in family))
    assert list(temporary.iterdir()) == []


def test_processes_take_turns(tmp_path: Path) -> None:
    """Each writes when it steps; steps never overlap, and the rest go on when one has no more."""
    script = (
        "import sys, time, torch; sys.path.insert(0, {root!r})\n"
        "from pretrain.bench_timing import Timer\n"
        "timer = Timer(torch.device('cpu'), in_turns=True)\n"
        "for step in timer.steps({steps}, timed=True):\n"
        "    with open({log!r}, 'a') as log: log.write('({name}')\n"
        "    with open({log!r}, 'a') as log: log.write('{name})')\n"
        "open({out!r}, 'w').write('{{\"problem\": null}}')\n"
    )
    log = tmp_path / "log"
    children = []
    for name, steps in (("a", 3), ("b", 1)):
        out = tmp_path / f"{name}.json"
        text = script.format(root=str(bench_rows.ROOT), steps=steps, log=str(log), name=name, out=str(out))
        children.append(bench_rows.Child([sys.executable, "-c", text], out, None, in_turns=True))
    bench_rows.take_turns(children)
    assert [child.row() for child in children] == [{"problem": None}] * 2
    assert log.read_text() == "(aa)(bb)(aa)(aa)"
