"""Kill a preparation again and again, at random moments, and compare what it ends with byte for byte.

    python benchmarks/data_prep_kills.py [--kills 100]

One dataset after the other is made, each by as many runs as the kills let it take: SIGKILL to the whole process group, to
one worker, or to the command; with 1 to 3 workers, or as an array of 2 or 3 tasks; a quarter of them counted from the
command's start, the others from its first file. The first dataset is made undisturbed.
Result: benchmarks/results/data_prep_kills.json.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path

import orjson
import zstandard

from pretrain.bench_result import machine

RESULTS = Path(__file__).parent / "results" / "data_prep_kills.json"
MODEL = str(files("mistral_common") / "data" / "tokenizer.model.v1")
UNITS, DOCUMENTS = 24, 30


def write_corpus(root: Path) -> None:
    """SlimPajama's layout: files of different sizes, so that there is always something under way."""
    rng = random.Random(0)
    words = Path(orjson.__file__).parent.joinpath("__init__.pyi").read_text().split() + list("abcdefgh")
    for unit in range(UNITS):
        lines = []
        for n in range(DOCUMENTS * (1 + unit % 4)):
            subset = "RedPajamaGithub" if n % 9 == 0 else "RedPajamaC4"
            text = " ".join(rng.choices(words, k=rng.randrange(4000)))
            lines.append(orjson.dumps({"text": text, "meta": {"redpajama_set_name": subset}}))
        path = root / f"train/chunk{unit % 3}/example_train_{unit}.jsonl.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(zstandard.compress(b"\n".join(lines)))


def command(root: Path, out: Path, *more: str) -> list[str]:
    """A preparation by the reference, which is slow enough to be met in the middle of a file."""
    words = [
        "slimpajama",
        "--input",
        root,
        "--split",
        "train",
        "--tokenizer",
        MODEL,
        "--out",
        out,
        "--encoder",
        "reference",
    ]
    return [sys.executable, "-m", "data_prep", *map(str, words), *more]


def workers_of(pid: int) -> list[int]:
    """What the server below `pid` has forked; beside the server there is a tracker of resources, which does no work."""
    servers = [child for child, words in _children(pid) if "multiprocessing.forkserver" in words]
    return [worker for server in servers for worker, _ in _children(server)]


def _children(pid: int) -> list[tuple[int, str]]:
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True
    ).stdout
    return [(int(line.split()[0]), line) for line in listed.splitlines()]


def disturb(
    process: subprocess.Popen, victim: str, begun: Callable[[], bool], delay: float, rng: random.Random
) -> str | None:
    """Kill `delay` seconds after it has `begun`; gives who was killed, None where there was nothing to kill.

    The command is killed where there is no worker. A worker counts only where the command has noticed, by its status 2.
    """
    while not begun() and process.poll() is None:
        time.sleep(0.005)
    try:
        process.wait(delay)
        return None
    except subprocess.TimeoutExpired:
        pass
    workers = workers_of(process.pid)
    if victim == "worker" and not workers:
        victim = "command"
    if victim == "worker":
        try:
            os.kill(rng.choice(workers), signal.SIGKILL)
        except ProcessLookupError:
            return None
    elif victim == "group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    status = process.wait()
    return None if victim == "worker" and status != 2 else victim


def content(out: Path) -> dict[str, bytes]:
    """All files of a dataset."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def has_begun(out: Path, left: set[Path] | None) -> bool:
    """Whether a file is being written that was not `left` by an earlier run; None: it counts from the command's start."""
    return left is None or any(path not in left for path in out.rglob("*.tmp"))


def is_complete(out: Path) -> bool:
    """Whether the manifest is there, which is written last."""
    return (out / "manifest.json").exists()


def main() -> None:
    """Kill, restart, compare, write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, kills, moments, datasets, differ = random.Random(args.seed), Counter[str](), Counter[str](), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_corpus(root / "in")
        start = time.monotonic()
        subprocess.run(
            command(root / "in", root / "undisturbed", "--workers", "2"), check=True, stdout=subprocess.DEVNULL
        )
        whole = time.monotonic() - start
        expected, longest = content(root / "undisturbed"), whole  # the delay follows the speed of the machine
        assert len(expected) > 3 * UNITS
        while sum(kills.values()) < args.kills:
            out = root / f"disturbed-{datasets}"
            tasks = rng.choice((1, 1, 2, 3))
            while not is_complete(out):
                task = ["--task", f"{rng.randint(1, tasks)}/{tasks}"] if tasks > 1 else []
                run = command(root / "in", out, "--workers", str(rng.randint(1, 3)), *task)
                process = subprocess.Popen(
                    run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
                )
                victim = rng.choice(("group", "worker", "command"))
                before, left = len(list(out.glob("units/**/*.json"))), set(out.rglob("*.tmp"))
                from_the_start = rng.random() < 0.25
                begun = partial(has_begun, out, None if from_the_start else left)
                killed = disturb(process, victim, begun, rng.random() * longest, rng)
                done = len(list(out.glob("units/**/*.json")))
                if killed:
                    kills[killed] += 1
                    longest *= 1.1
                    half = bool(set(out.rglob("*.tmp")) - left)  # an earlier kill's may still lie there
                    moments[
                        "in the middle of a file" if half else "between files" if done > before else "before the first"
                    ] += 1
                elif done > before:  # else it had nothing to do, and says nothing of how long one takes
                    longest *= 0.7
                if tasks > 1:  # ends well only when all tasks are done
                    subprocess.run([sys.executable, "-m", "data_prep", "finish", str(out)], capture_output=True)
            datasets += 1
            differ += content(out) != expected
            print(f"{sum(kills.values()):4} kills, {datasets} datasets, {differ} differ", flush=True)
    result = {
        "kills": dict(sorted(kills.items())),
        "kills_in_all": sum(kills.values()),
        "moments": dict(sorted(moments.items())),
        "datasets": datasets,
        "datasets_that_differ": differ,
        "files_compared_a_dataset": len(expected),
        "seconds_of_an_undisturbed_run": round(whole, 1),
        "seed": args.seed,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    result |= machine()
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
