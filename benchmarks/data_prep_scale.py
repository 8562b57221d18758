"""What does size cost? Twice the input, 60,000 small files, and a manifest of 60,000 shards.

    python benchmarks/data_prep_scale.py [--work DIR with the corpus of data_prep_speed.py]

A quarter, half and all of the files are prepared: the time on top of the start must double. Then many short documents in
16 files and in 60,000: what these add is the cost of a file. Result: benchmarks/results/data_prep_scale.json.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import data_prep_corpus
import zstandard

from data_prep.shard import TokenDataset
from data_prep.tokenizer import load

RESULTS = Path(__file__).parent / "results" / "data_prep_scale.json"
MODEL = str(files("mistral_common") / "data" / "tokenizer.model.v1")


class Taken(NamedTuple):
    """What a command took."""

    seconds: float
    """From its start to its end."""
    cpu_s: float
    """Of all its processes; what others do on the machine does not lengthen it much."""


def prepare(command: str, source: Path, out: Path, *more: str) -> Taken:
    """What a fresh command takes."""
    shutil.rmtree(out, ignore_errors=True)
    words = [command, "--input", str(source), "--split", "train", "--tokenizer", MODEL, "--out", str(out), *more]
    return run(words)


def run(words: list[str]) -> Taken:
    """Run data-prep."""
    start, cpu = time.perf_counter(), _cpu_of_children()
    subprocess.run([sys.executable, "-m", "data_prep", *words], check=True, stdout=subprocess.DEVNULL)
    return Taken(time.perf_counter() - start, _cpu_of_children() - cpu)


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def linear(work: Path, root: Path, rounds: int) -> dict:
    """What 0, 1, 2 and 4 quarters of the code take; 0 is some documents, which is the start. No text is there twice."""
    files = sorted((work / "code" / "python").iterdir())
    for quarters in (1, 2, 4):
        target = root / str(quarters) / "python"
        target.mkdir(parents=True)
        for file in files[: len(files) * quarters // 4]:
            os.link(file, target / file.name)
    sources = {0: data_prep_corpus.few(work) / "code", **{quarters: root / str(quarters) for quarters in (1, 2, 4)}}
    taken: dict[int, list[Taken]] = {times: [] for times in sorted(sources)}
    for _ in range(rounds):
        for times in taken:
            taken[times].append(prepare("starcoder", sources[times], root / "out", "--holdout", "1e-12"))
    result: dict = {}
    for what in ("seconds", "cpu_s"):
        figures = {times: [getattr(one, what) for one in ones] for times, ones in taken.items()}
        median = {times: statistics.median(values) for times, values in figures.items()}
        work = {times: median[times] - median[0] for times in (1, 2, 4)}
        result[what] = figures
        result[f"twice_the_input_takes_times_by_{what}"] = {"1 to 2": work[2] / work[1], "2 to 4": work[4] / work[2]}
    return result


def small_files(root: Path, count: int) -> dict:
    """One text in `count` files against the same text in 16 files."""
    line = (
        b'{"text": "%d: a short document, of which there are many.", "meta": {"redpajama_set_name": "RedPajamaC4"}}\n'
    )
    lines = [line % n for n in range(10 * count)]
    for name, number in (("few", 16), ("many", count)):
        for n in range(number):
            path = root / name / "train" / f"chunk{n % 10}" / f"example_train_{n}.jsonl.zst"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(zstandard.compress(b"".join(lines[n::number])))
    few, many = (prepare("slimpajama", root / name, root / f"{name}-out") for name in ("few", "many"))
    again = [
        "slimpajama",
        "--input",
        root / "many",
        "--split",
        "train",
        "--tokenizer",
        MODEL,
        "--out",
        root / "many-out",
    ]
    restart = run([str(word) for word in again])
    start = time.perf_counter()
    dataset = TokenDataset(root / "many-out")
    opening = time.perf_counter() - start
    assert len(dataset.manifest.shards) == count
    return {
        "files": count,
        "in_16_files": few._asdict(),
        "in_many_files": many._asdict(),
        "added_s": many.seconds - few.seconds,
        "run_again_with_nothing_to_do": restart._asdict(),
        "open_the_manifest_s": opening,
    }


def main() -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder with the corpus, or for it; default: a temporary one")
    parser.add_argument("--megabytes", type=float, default=250.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=int, default=60_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as temporary:
        work = args.work or Path(temporary)
        data_prep_corpus.make(work, args.megabytes)
        load(MODEL).save(work / "tokenizer", prepend_bos=False)
        result = {
            "cores": len(os.sched_getaffinity(0)),
            "linear": linear(work, Path(temporary) / "linear", args.rounds),
            "small_files": small_files(Path(temporary) / "small", args.files),
        }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
