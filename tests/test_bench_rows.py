"""Rows of `pretrain bench` that are timed in processes of their own: they end, whatever ends first."""

import sys
import time
from pathlib import Path

from pretrain import bench_rows, processes


def test_a_child_that_fails_hangs_or_dies_is_a_row(tmp_path: Path) -> None:
    def row(script: str, timeout_s: float | None = None) -> dict:
        return bench_rows.Child(["python3", "-c", script], tmp_path / "row.json", timeout_s).row()

    assert row("raise ValueError('no such peer')")["problem"] == "failed with status 1: ValueError: no such peer"
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
    while not (tmp_path / "rank").exists() or not (tmp_path / "rank").read_text():
        time.sleep(0.01)
    pid = int((tmp_path / "rank").read_text())
    child.kill()
    until = time.monotonic() + 60
    while processes.stat(pid)[:1] not in ([], ["Z"]) and time.monotonic() < until:
        time.sleep(0.01)
    assert processes.stat(pid)[:1] in ([], ["Z"])


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
