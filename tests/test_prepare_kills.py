"""Kills cost data preparation time and nothing else; no worker outlives the lock; two runs share no folder."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import until
from test_prepare import assert_same_bytes, corpus, options, undisturbed  # noqa: F401  corpus, undisturbed: fixtures
from test_sources import line, write_jsonl
from test_tokenizer import LLAMA_MODEL, library_texts

from data_prep.folder import UnitRecord
from data_prep.lock import locked, only_run
from data_prep.prepare import FinishOptions, finish, run
from data_prep.workers import prepare_units

FILES = 6
"""What the kills meet."""


def is_alive(pid: int) -> bool:
    """Whether there is such a process; one that has ended and waits for its parent to ask is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    """The processes whose parent is `pid`."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            if int(stat.rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(entry))
    return found


def descendants(pid: int) -> list[int]:
    """The processes below `pid`."""
    return [one for child in children(pid) for one in (child, *descendants(child))]


def workers_of(pid: int) -> list[int]:
    """What the server of `pid` has forked; beside the server there is a tracker of resources, which does no work."""
    servers = []
    for child in children(pid):
        try:
            if b"multiprocessing.forkserver" in Path(f"/proc/{child}/cmdline").read_bytes():
                servers.append(child)
        except OSError:
            continue
    return [worker for server in servers for worker in children(server)]


def write_long_files(root: Path, files: int, share: float) -> Path:
    """Files that take the reference about `share` times 0.6 s each."""
    rng = random.Random(0)
    paragraphs = "".join(library_texts()).split("\n\n")
    for n in range(files):
        drawn = "\n\n".join(rng.sample(paragraphs, int(len(paragraphs) * share)))
        texts = [drawn[at : at + 20_000] for at in range(0, len(drawn), 20_000)]
        write_jsonl(root / f"train/chunk1/{n}.jsonl.zst", *map(line, texts))
    return root


@pytest.fixture(scope="module")
def long_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_long_files(tmp_path_factory.mktemp("long"), FILES, 0.5)


def test_kills_at_random_moments_change_nothing(long_files: Path, tmp_path: Path) -> None:
    """The long form is benchmarks/data_prep_kills.py; this one kills the group, the command or a worker five times."""
    rng, out = random.Random(7), tmp_path / "out"
    run(options(long_files, tmp_path / "undisturbed"))
    command = [sys.executable, "-m", "data_prep", "slimpajama", "--input", str(long_files), "--split", "train"]
    command += ["--tokenizer", str(LLAMA_MODEL), "--out", str(out), "--encoder", "reference", "--workers", "2"]
    within_a_file, wanted = Counter[str](), {"group": 1, "worker": 2, "command": 2}
    for victim in itertools.chain(*[wanted] * 10):
        if within_a_file[victim] == wanted[victim]:
            continue
        for shard in sorted(out.rglob("shards/**/*.npy"))[FILES // 2 :]:
            shard.unlink()  # so that there is always something to do
        before = set(out.rglob("*.tmp"))
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        while process.poll() is None and not set(out.rglob("shards/**/*.tmp")) - before:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.2)
        with suppress(ProcessLookupError):  # all stand still while we look
            os.killpg(process.pid, signal.SIGSTOP)
        below, workers = descendants(process.pid), workers_of(process.pid)
        within = process.poll() is None and set(out.rglob("shards/**/*.tmp")) - before
        if within and victim == "worker":
            os.kill(rng.choice(workers), signal.SIGKILL)
        elif within and victim == "command":
            process.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT if within and victim != "group" else signal.SIGKILL)
        _, said = process.communicate(timeout=300)  # ends only when all below have closed the pipe too
        if not within:  # it was done, or between two files
            (out / "manifest.json").unlink(missing_ok=True)
            continue
        within_a_file[victim] += 1
        if victim == "worker":
            assert process.returncode == 2
            assert "error: a worker process was killed, perhaps for want of memory: run the same command again" in said
        else:
            assert process.returncode == -signal.SIGKILL
        until(lambda: not any(map(is_alive, below)))  # noqa: B023  it is called here
        assert not (out / "manifest.json").exists()
    assert within_a_file == wanted
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert_same_bytes(out, tmp_path / "undisturbed", but="units/")  # they say what encoded them


def test_no_worker_outlives_the_lock(long_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends the work between two files lets the workers end before another run may begin."""
    out, held, workers = tmp_path / "out", [], []
    (tmp_path / "in/train/chunk1").mkdir(parents=True)
    for path in long_files.rglob("*.zst"):
        (tmp_path / "in/train/chunk1" / path.name).symlink_to(path)
    noise = random.Random(0)
    left_out = [line(noise.randbytes(50_000).hex(), "RedPajamaGithub") for _ in range(40)]  # so it is begun first
    write_jsonl(tmp_path / "in/train/chunk1/bad.jsonl.zst", *left_out, b"{")
    assert len(left_out) * 50_000 > max(path.stat().st_size for path in long_files.rglob("*.zst"))

    def watched(*args: object) -> Iterator[UnitRecord]:
        try:
            yield from prepare_units(*args)
        finally:
            try:
                with only_run(out, 1, 1):
                    held.append(False)
            except ValueError:
                held.append(True)

    class Noted(ProcessPoolExecutor):
        def shutdown(self, *args: bool, **more: bool) -> None:
            deadline = time.monotonic() + 60
            while not any(out.rglob("*.tmp")) and time.monotonic() < deadline:  # a worker may be between two files
                time.sleep(0.001)
            workers.extend(self._processes)
            super().shutdown(*args, **more)

    monkeypatch.setattr("data_prep.prepare.prepare_units", watched)
    monkeypatch.setattr("data_prep.workers.ProcessPoolExecutor", Noted)
    with pytest.raises(ValueError, match=r"1 of \d+ documents are bad"):
        run(options(tmp_path / "in", out, workers=2, encoder="reference"))
    living, staged = [pid for pid in workers if is_alive(pid)], list(out.rglob("*.tmp"))
    assert (len(workers), living, staged, held) == (2, [], [], [True])


@pytest.mark.parametrize("tasks", [2, 7])
def test_any_number_of_tasks_joins_to_the_same(
    corpus: Path,  # noqa: F811
    undisturbed: Path,  # noqa: F811
    tmp_path: Path,
    tasks: int,
) -> None:
    out = tmp_path / "out"
    order = random.Random(tasks).sample(range(1, tasks + 1), tasks)
    for task in order[:-1]:
        assert run(options(corpus, out, task=f"{task}/{tasks}", encoder="reference")) is None
    if order[-1] <= 6:
        with pytest.raises(ValueError, match=r"of 6 input files are not done: train/chunk[12]/example_train_\d"):
            finish(FinishOptions(directory=str(out)))
    run(options(corpus, out, task=f"{order[-1]}/{tasks}"))
    finish(FinishOptions(directory=str(out)))
    assert_same_bytes(out, undisturbed, but="units/")  # they say what encoded them
    for task in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(ValueError, match="is not K/N with 1 <= K <= N"):
            run(options(corpus, out, task=task))


def test_two_runs_in_one_folder_are_refused(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    with only_run(out, 1, 2):
        for task in ("1/1", "1/2", "1/3", "2/3"):
            with pytest.raises(ValueError, match="another data-prep is at work in"):
                run(options(corpus, out, task=task))
        with only_run(out, 2, 2):
            pass
        with pytest.raises(ValueError, match="another data-prep is at work"), only_run(out, 1, 1):
            pass
    with only_run(out, 1, 1), pytest.raises(ValueError, match="another data-prep"), only_run(out, 1, 2):
        pass
    with locked(out / "lock"):
        pass
