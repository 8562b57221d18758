"""What does size cost? Twice the input, 60,000 small files, and a manifest of 60,000 shards.

    python benchmarks/data_prep_scale.py [--work DIR with the corpus of data_prep_speed.py] [--parts linear checks]

A quarter, half and all of the files are prepared: the time on top of the start must double. Then what it costs to
encode some documents by the reference too. Then many short documents in 16 files and in 60,000: what these add is the cost
of a file. Result: benchmarks/results/data_prep_scale.json; parts not asked for stay in it, each with the version that it
measured. Status 1 where twice the input takes more than 2.2 times the CPU time.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from unittest.mock import patch

import data_prep_corpus
import zstandard
from data_prep_speed import Taken, adopt_orphans, measure, measure_anew

from data_prep.encoder import Encoder
from data_prep.prepare import StarCoderOptions
from data_prep.prepare import run as prepare_here
from data_prep.shard import TokenDataset
from data_prep.tokenizer import load
from pretrain.bench_result import CRIA, machine

RESULTS = Path(__file__).parent / "results" / "data_prep_scale.json"
LIMIT = 2.2
"""Times the CPU time that twice the input may take, beyond that of the start."""
MODEL = str(files("mistral_common") / "data" / "tokenizer.model.v1")


def prepare(command: str, source: Path, out: Path, *more: str) -> Taken:
    """What a fresh command takes."""
    return measure_anew(words(command, source, out, *more), out)


def words(command: str, source: Path, out: Path, *more: str) -> list[str]:
    """The command line."""
    arguments = ["--input", source, "--split", "train", "--tokenizer", MODEL, "--out", out, *more]
    return [sys.executable, "-m", "data_prep", command, *map(str, arguments)]


def linear(work: Path, root: Path, args: argparse.Namespace) -> dict:
    """What 0, 1, 2 and 4 quarters of the code take; 0 is some documents, which is the start. No text is there twice."""
    files = sorted((work / "code" / "python").iterdir())
    for quarters in (1, 2, 4):
        target = root / str(quarters) / "python"
        target.mkdir(parents=True)
        for file in files[: len(files) * quarters // 4]:
            os.link(file, target / file.name)
    sources = {0: data_prep_corpus.few(work) / "code", **{quarters: root / str(quarters) for quarters in (1, 2, 4)}}
    taken: dict[int, list[Taken]] = {times: [] for times in sorted(sources)}
    for _ in range(args.rounds):
        for times in taken:
            taken[times].append(prepare("starcoder", sources[times], root / "out", "--holdout", "1e-12"))
    result: dict = {"bytes_of_text": data_prep_corpus.make(work, args.megabytes)["code"]}
    for what in ("seconds", "cpu_s"):
        figures = {times: [getattr(one, what) for one in ones] for times, ones in taken.items()}
        median = {times: statistics.median(values) for times, values in figures.items()}
        more = {times: median[times] - median[0] for times in (1, 2, 4)}
        result[what] = figures
        result[f"twice_the_input_takes_times_by_{what}"] = {"1 to 2": more[2] / more[1], "2 to 4": more[4] / more[2]}
    return result


def checks(work: Path, root: Path, args: argparse.Namespace) -> dict:
    """What it costs to encode some documents of the code by the reference too, as `--check_every` has it by default.

    Measured with one document in 100, in one process, as a share of its CPU time: a few documents would tell nothing.
    """
    target, every = root / "in" / "python", 100
    target.mkdir(parents=True)
    for file in sorted((work / "code" / "python").iterdir())[:4]:
        os.link(file, target / file.name)
    in_checks, check = [], Encoder.check

    def timed(encoder: Encoder, text: str) -> None:
        start = time.process_time()
        check(encoder, text)
        in_checks.append(time.process_time() - start)

    folders = {"input": str(root / "in"), "out": str(root / "out"), "tokenizer": MODEL}
    options = StarCoderOptions(**folders, split="train", holdout=1e-12, workers=1, check_every=every)
    start = time.process_time()
    with patch.object(Encoder, "check", timed):
        prepare_here(options)
    cpu_s = time.process_time() - start
    rest = cpu_s - sum(in_checks)
    return {
        "documents_checked": len(in_checks),
        "cpu_s_of_the_checks": sum(in_checks),
        "cpu_s_of_the_rest": rest,
        "check_every": StarCoderOptions.check_every,
        "added_pct": 100 * sum(in_checks) / rest * every / StarCoderOptions.check_every,
    }


def in_result(taken: Taken) -> dict[str, float]:
    """What goes into the result."""
    return {"seconds": taken.seconds, "cpu_s": taken.cpu_s}


def small_files(work: Path, root: Path, args: argparse.Namespace) -> dict:
    """One text in many files against the same text in 16 files."""
    count = args.files
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
    restart = measure(words("slimpajama", root / "many", root / "many-out"))
    start = time.perf_counter()
    dataset = TokenDataset(root / "many-out")
    opening = time.perf_counter() - start
    assert len(dataset.manifest.shards) == count
    return {
        "files": count,
        "in_16_files": in_result(few),
        "in_many_files": in_result(many),
        "added_s": many.seconds - few.seconds,
        "run_again_with_nothing_to_do": in_result(restart),
        "open_the_manifest_s": opening,
    }


PARTS = {"linear": linear, "checks": checks, "small_files": small_files}


def main() -> int:
    """Measure and write down; status 1 where the limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder with the corpus, or for it; default: a temporary one")
    parser.add_argument("--megabytes", type=float, default=250.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=int, default=60_000)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    args = parser.parse_args()
    adopt_orphans()
    result = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory(dir=args.work) as temporary:
        work = args.work or Path(temporary)
        data_prep_corpus.make(work, args.megabytes)
        load(MODEL).save(work / "tokenizer", prepend_bos=False)
        result["cores"] = len(os.sched_getaffinity(0))
        for part in args.parts:
            load_before = os.getloadavg()[0]
            result[part] = PARTS[part](work, Path(temporary) / part, args)
            result[part] |= {"load_of_the_machine_before": load_before, "cria": CRIA}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    result |= machine()
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    ratios = result["linear"]["twice_the_input_takes_times_by_cpu_s"] if "linear" in args.parts else {}
    exceeded = {sizes: ratio for sizes, ratio in ratios.items() if ratio > LIMIT}
    for sizes, ratio in exceeded.items():
        print(f"from {sizes} parts of the input it takes {ratio:.2f} times the CPU time, more than {LIMIT}")
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
