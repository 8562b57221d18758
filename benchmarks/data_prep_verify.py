"""How fast `data-prep verify` reads, against sha256sum and against plain reading of the same files.

    python benchmarks/data_prep_verify.py [--gigabytes 3] [--rounds 3]

Shards of random ids below 32,000, each document 1,000 tokens with EOS at its end; all in the page cache, so that what is
measured is the checking and not the disk. The ways take turns. Result: benchmarks/results/data_prep_verify.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import numpy as np

from data_prep.shard import Manifest, ShardWriter
from data_prep.tokenizer import load
from pretrain.bench_result import machine

RESULTS = Path(__file__).parent / "results" / "data_prep_verify.json"
SHARD_TOKENS = 50_000_000


def make(root: Path, gigabytes: float) -> int:
    """Write the dataset; gives its bytes of tokens."""
    rng, shards = np.random.default_rng(0), []
    for n in range(max(1, round(gigabytes * 1e9 / 2 / SHARD_TOKENS))):
        ids = rng.integers(3, 32_000, SHARD_TOKENS, dtype=np.uint16)
        ids[999::1000] = 2
        with ShardWriter(root, f"shards/{n:05d}.npy", "uint16") as writer:
            writer.append(ids)
        shards.append(writer.shard(f"{n:05d}.jsonl.zst", documents=SHARD_TOKENS // 1000))
    tokenizer = load(str(files("mistral_common") / "data" / "tokenizer.model.v1"))
    tokenizer.save(root / "tokenizer", prepend_bos=False)
    Manifest("random", "train", tokenizer.info, True, False, tuple(shards)).save(root)
    return len(shards) * SHARD_TOKENS * 2


def read_plainly(files: list[Path]) -> None:
    """Read every byte, one file after the other."""
    for file in files:
        with open(file, "rb", buffering=0) as raw:
            while raw.read(8 << 20):
                pass


def main() -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        size = make(Path(temporary), args.gigabytes)
        shards = sorted(Path(temporary).glob("shards/*.npy"))
        cores = len(os.sched_getaffinity(0))
        names = [str(shard) for shard in shards]
        ways = {
            "plain reading": lambda: read_plainly(shards),
            "sha256sum, one process": lambda: run(["sha256sum", *names]),
            "sha256sum, one process a core": lambda: run(
                ["xargs", "-n", "1", "-P", str(cores), "sha256sum"], "\n".join(names)
            ),
            "data-prep verify": lambda: run([sys.executable, "-m", "data_prep", "verify", temporary]),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        read_plainly(shards)  # into the page cache
        load_before = os.getloadavg()[0]
        for _ in range(args.rounds):
            for way, do in ways.items():
                start = time.perf_counter()
                do()
                seconds[way].append(time.perf_counter() - start)
    speed = {way: size / statistics.median(taken) / 1e6 for way, taken in seconds.items()}
    result = {
        "bytes": size,
        "files": len(shards),
        "cores": cores,
        "load_of_the_machine_before_and_after": [load_before, os.getloadavg()[0]],
        "seconds": seconds,
        "megabytes_per_s": speed,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    result |= machine()
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(speed, indent=1))


def run(command: list[str], given: str | None = None) -> None:
    """Run a command, and fail when it does."""
    subprocess.run(command, input=given, text=True, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
