"""Documents to tokens: data-prep against the usual way, datatrove and litdata, on the same files, cores and tokenizer.

    python benchmarks/data_prep_speed.py [--megabytes 250] [--rounds 3] [--peers_python /path/to/python]

Every way is a fresh command, timed from its start to its end: imports, workers, reading, encoding, writing. What the
start alone takes, over a few documents, is measured too: over a trillion tokens it is nothing. They take
turns, so that a machine whose speed drifts slows all; the figure is the median over the rounds. The tokenizer is a real
one of 32,000 pieces with byte fallback. Peers that the Python of --peers_python does not have are named as missing.
Results: benchmarks/results/data_prep_speed.json and .md.
"""

import argparse
import ctypes
import hashlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import data_prep_corpus
import numpy as np

from data_prep.shard import Manifest
from data_prep.tokenizer import load
from pretrain.versions import own_version

CRIA = own_version()
"""What is measured, as it was when it began."""
RESULTS = Path(__file__).parent / "results"
PEERS = Path(__file__).with_name("data_prep_peers.py")
COMMANDS = {"prose": ("slimpajama", "jsonl.zst"), "code": ("starcoder", "parquet")}
HOLDOUT = "1e-12"


def ours(kind: str, work: Path, out: Path, workers: int) -> list[str]:
    """The command of data-prep over a corpus."""
    extra = ["--holdout", HOLDOUT] if kind == "code" else []
    command = [sys.executable, "-m", "data_prep", COMMANDS[kind][0], "--input", work / kind, "--split", "train", *extra]
    return [str(part) for part in (*command, "--tokenizer", work / "tokenizer", "--out", out, "--workers", workers)]


class Taken(NamedTuple):
    """What a command took."""

    seconds: float
    """From its start to its end."""
    cpu_s: float
    """Of all its processes: what others do on the machine does not lengthen it much."""
    printed: str


def measure_anew(command: list[str], out: Path) -> Taken:
    """Run a command that writes to `out`, where nothing is left of an earlier one."""
    shutil.rmtree(out, ignore_errors=True)
    if "-m" not in command:
        out.mkdir(parents=True)
    return measure(command)


def measure(command: list[str]) -> Taken:
    """Run a command; after adopt_orphans."""
    os.sync()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    start, cpu = time.perf_counter(), _cpu_of_children()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - start
    _wait_for_orphans()
    cpu = _cpu_of_children() - cpu
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return Taken(seconds, cpu, done.stdout)


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def adopt_orphans() -> None:
    """Become the parent of processes whose own is gone: without it nobody counts what servers of workers take."""
    adopt = 36  # PR_SET_CHILD_SUBREAPER
    if ctypes.CDLL(None, use_errno=True).prctl(adopt, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "orphans can't be adopted, so their CPU time would not be seen")


def _wait_for_orphans(most_s: float = 10.0) -> None:
    deadline = time.monotonic() + most_s
    while time.monotonic() < deadline:
        try:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(0.01)
        except ChildProcessError:
            return


def has(python: str, module: str) -> str | None:
    """The version of a package in another Python, None when it is not installed there."""
    code = f"from importlib.metadata import version; import {module}; print(version('{module}'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.split()[-1] if done.returncode == 0 else None


def same_tokens(ours_out: Path, usual_out: Path) -> bool:
    """Whether data-prep's shards hold, file by file, the very tokens of the usual way."""
    manifest = Manifest.load(ours_out)
    for shard in manifest.shards:
        theirs = np.fromfile(usual_out / f"{Path(shard.source_file).name}.bin", dtype=np.uint16)
        if not np.array_equal(np.load(ours_out / shard.path), theirs):
            return False
    return bool(manifest.shards)


def command_of(way: str, kind: str, work: Path, out: Path, args: argparse.Namespace) -> list[str]:
    """What to run."""
    if way == "cria":
        return ours(kind, work, out, args.workers)
    python = sys.executable if way == "usual" else args.peers_python
    return [python, str(PEERS), way, str(work / kind), str(work / "tokenizer"), str(out), str(args.workers)]


def compare(kind: str, work: Path, args: argparse.Namespace, peers: dict[str, str | None], before: dict) -> dict:
    """All ways over one corpus, in turns; before it each over a few documents, which is what starting takes.

    `before` are the figures of earlier rounds, which these are added to.
    """
    outs = {way: work / "out" / kind / way for way in ("cria", "usual", *(p for p, v in peers.items() if v))}
    few = data_prep_corpus.few(work)
    load_before = os.getloadavg()[0]
    start = {way: [measure_anew(command_of(way, kind, few, out, args), out)] for way, out in outs.items()}
    taken: dict[str, list[Taken]] = {way: [] for way in outs}
    tokens: dict[str, int] = {}
    for n in range(args.rounds):
        for way, out in outs.items():
            if n and way in peers and args.peers_once:
                continue
            one = measure_anew(command_of(way, kind, work, out, args), out)
            taken[way].append(one)
            printed = one.printed.splitlines()
            tokens[way] = Manifest.load(out).tokens if way == "cria" else json.loads(printed[-1])["tokens"]
            rate = tokens[way] / one.seconds / 1e6
            print(f"{kind:5} {way:9} {one.seconds:7.2f} s  {one.cpu_s:7.2f} CPU s  {rate:6.2f}M tokens/s", flush=True)
    assert same_tokens(outs["cria"], outs["usual"]), "data-prep and the usual way made different tokens"
    assert before.get("tokens", tokens) == tokens, "the earlier rounds had another corpus"
    figures: dict = {"tokens": tokens, "tokens_equal_to_the_usual_way": True}
    for name, all_ways in (("", taken), ("_of_the_start", start)):
        for what in ("seconds", "cpu_s"):
            old = before.get(what + name, {})
            figures[what + name] = {
                way: old.get(way, []) + [getattr(one, what) for one in ones] for way, ones in all_ways.items()
            }
    loads = [load_before, os.getloadavg()[0]]
    figures["load_of_the_machine_before_and_after"] = [*before.get("load_of_the_machine_before_and_after", []), loads]
    return figures | ratios(figures)


def ratios(figures: dict) -> dict:
    """How many times as fast data-prep is, by time and by CPU time, with and without the start."""
    found: dict = {}
    for what in ("seconds", "cpu_s"):
        begin = medians(figures[f"{what}_of_the_start"])
        median = medians(figures[what])
        others = [way for way in median if way != "cria"]
        work = median["cria"] - begin["cria"]
        found[f"times_as_fast_by_{what}"] = {way: median[way] / median["cria"] for way in others}
        found[f"times_as_fast_by_{what}_without_the_start"] = {way: (median[way] - begin[way]) / work for way in others}
    return found


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """The median of each way."""
    return {way: statistics.median(ones) for way, ones in times.items()}


def machine(args: argparse.Namespace, peers: dict[str, str | None]) -> dict:
    """What the figures were measured on and with."""
    names = ("gigatoken", "sentencepiece", "orjson", "pyarrow", "zstandard", "numpy", "tokenizers")
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "machine": {"cpu": model, "cores": os.cpu_count(), "workers": args.workers, "platform": platform.platform()},
        "versions": {
            "cria": CRIA,
            "python": platform.python_version(),
            **{name: version(name) for name in names},
            **peers,
        },
    }


def table(result: dict) -> str:
    """The figures as Markdown."""
    lines = [
        "| corpus | way | start to end | of it start | CPU time | of it start | speed-up of data-prep: wall time "
        "| without start | CPU time | without start |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    names = ("seconds", "seconds_without_the_start", "cpu_s", "cpu_s_without_the_start")
    for kind, figures in result["corpora"].items():
        for way in figures["tokens"]:
            whole = ("seconds", "cpu_s", "seconds_of_the_start", "cpu_s_of_the_start")
            seconds, cpu, start, cpu_start = (medians(figures[what])[way] for what in whole)
            found = [figures[f"times_as_fast_by_{name}"].get(way) for name in names]
            columns = f"{seconds:.1f} s | {start:.1f} s | {cpu:.1f} s | {cpu_start:.1f} s"
            times = " | ".join(f"{ratio:.1f}" if ratio else "" for ratio in found)
            lines.append(f"| {kind} | {way} | {columns} | {times} |")
    missing = [peer for peer, found in result["versions"].items() if found is None]
    note = f"\nNot installed, so not measured: {', '.join(missing)}.\n" if missing else ""
    m = result["machine"]
    corpora = ", ".join(f"{result['corpus'][kind] / 1e6:.0f} MB of {kind}" for kind in result["corpora"])
    rounds = {way: len(times) for figures in result["corpora"].values() for way, times in figures["seconds"].items()}
    each = ", ".join(f"{way} {count}" for way, count in rounds.items())
    return (
        f"{m['cpu']}, {m['workers']} workers; {corpora}. Medians over the rounds: {each} (--peers_once measures datatrove and "
        "litdata once). The tokens of data-prep and of the usual way are equal.\n\n" + "\n".join(lines) + "\n" + note
    )


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=250.0, help="text of each kind at most; there may be less")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, help="folder for corpus and output, kept; default: a temporary one")
    parser.add_argument("--peers_python", default=sys.executable, help="a Python that has datatrove and litdata")
    parser.add_argument("--peers_once", action="store_true", help="measure the peers in the first round only")
    parser.add_argument("--kinds", nargs="+", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="data_prep_speed", help="of the result's files")
    parser.add_argument("--add", action="store_true", help="add to the rounds that are in the result already")
    args = parser.parse_args()
    adopt_orphans()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        sizes = data_prep_corpus.make(work, args.megabytes)
        load(str(files("mistral_common") / "data" / "tokenizer.model.v1")).save(work / "tokenizer", prepend_bos=False)
        peers = {peer: has(args.peers_python, peer) for peer in ("datatrove", "litdata")}
        file = args.results / f"{args.name}.json"
        before = json.loads(file.read_text()) if args.add and file.is_file() else {}
        result = {**machine(args, peers), "corpus": sizes, "corpora": before.get("corpora", {})}
        result["manifest_sha256"] = before.get("manifest_sha256", {})
        for kind in args.kinds:
            result["corpora"][kind] = compare(kind, work, args, peers, result["corpora"].get(kind, {}))
            manifest = (work / "out" / kind / "cria" / "manifest.json").read_bytes()
            result["manifest_sha256"][kind] = hashlib.sha256(manifest).hexdigest()
    args.results.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(result))
    print("\n" + table(result))


if __name__ == "__main__":
    main()
