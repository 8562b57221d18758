"""The loader: sequences a second from the page cache, against TinyLlama's, and what 1T tokens cost.

    python benchmarks/loader.py [--tinyllama CHECKOUT] [--rounds 21]

Both read the same tokens (two sources, 7:3) in one process through the very path that training takes, sequences of 2,049
tokens in micro-batches of 8: ours through `train_loader`, TinyLlama's through its packed_dataset.py and a plain DataLoader,
as its pretrain/tinyllama.py does. They take turns; the figures are medians. Ours also hashes every sequence. Once more ours with
2 threads that read ahead, which share one interpreter: what it costs to have the batches ready before they are asked for.

Then 62,500 sparse shards of 16M tokens each, about as many as SlimPajama has, are opened in a process of its own: time and
memory to the first micro-batch of step 1,000,000, and the rate of the next steps, in which nearly every sequence lies in a file
that is opened for it. The result goes to benchmarks/results/loader.json.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from data_prep.shard import Manifest, Shard, ShardWriter, TokenizerInfo
from pretrain import data
from pretrain.bench_result import machine
from pretrain.sections import DataConfig, SourceConfig

RESULTS = Path(__file__).parent / "results" / "loader.json"
SEQ_LEN, MICRO_BATCH, GLOBAL_BATCH, VOCAB = 2048, 8, 1024, 32000
TARGET = 50_000
FILES, BLOCKS = 8, {"a": 2048, "b": 878}
"""Files of each source, and sequences of 2,049 tokens in each of them."""
TOKENIZER = TokenizerInfo("sha256:" + "a" * 64, "sentencepiece", VOCAB, 1, 2)


def write_tokens(folder: Path) -> None:
    """The same random tokens as our shards and as TinyLlama's packed files."""
    rng = np.random.default_rng(1)
    for name, blocks in BLOCKS.items():
        shards = []
        for number in range(FILES):
            tokens = rng.integers(0, VOCAB, blocks * (SEQ_LEN + 1)).astype(np.uint16)
            with ShardWriter(folder / name, f"shards/{number}.npy", "uint16") as writer:
                writer.append(tokens)
            shards.append(writer.shard(source_file=f"{number}.txt", documents=1))
            header = b"LITPKDS" + (1).to_bytes(8, "little") + bytes([8]) + len(tokens).to_bytes(8, "little")
            (folder / f"{name}_{number}.bin").write_bytes(header + tokens.tobytes())
        manifest = Manifest("synthetic", "train", TOKENIZER, shards=tuple(shards), append_eos=True, prepend_bos=False)
        manifest.save(folder / name)


def micro_batches(folder: Path) -> data.MicroBatches:
    """What training on the sources of `folder` opens."""
    entries = [SourceConfig(name, str(folder / name), weight) for name, weight in (("a", 7.0), ("b", 3.0))]
    config = DataConfig(seq_len=SEQ_LEN, sources=entries)
    sources = data.open_sources(config, VOCAB)
    mixture = data.make_mixture(sources, config, 1, GLOBAL_BATCH)
    return data.MicroBatches(sources, mixture, SEQ_LEN, MICRO_BATCH, rank=0, world_size=1)


def ours(folder: Path, threads: int = 0) -> Callable[[int], Iterator[torch.Tensor]]:
    """Sequences from training's own loader, from a step on that the last call did not reach."""
    batches, first = micro_batches(folder), 1

    def read(steps: int) -> Iterator[torch.Tensor]:
        nonlocal first
        loader = data.train_loader(batches, range(first, first + steps), threads, torch.device("cpu"))
        first += steps
        return (batch for batch, _ in loader)

    return read


def theirs(folder: Path, checkout: Path) -> Callable[[int], Iterator[torch.Tensor]]:
    """Sequences from TinyLlama's, with its settings; it goes on where it was."""
    spec = importlib.util.spec_from_file_location("packed_dataset", checkout / "lit_gpt" / "packed_dataset.py")
    assert spec is not None
    assert spec.loader is not None
    packed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packed)
    names = {name: sorted(str(path) for path in folder.glob(f"{name}_*.bin")) for name in BLOCKS}
    datasets = [
        packed.PackedDataset(names[name], FILES, SEQ_LEN + 1, seed=1, shuffle=True, wrap=True) for name in BLOCKS
    ]
    combined = packed.CombinedDataset(datasets, seed=1, weights=[0.7, 0.3])
    batches = iter(DataLoader(combined, batch_size=MICRO_BATCH, shuffle=False))
    return lambda steps: (next(batches) for _ in range(steps * GLOBAL_BATCH // MICRO_BATCH))


def measure(read: Callable[[int], Iterator[torch.Tensor]], steps: int) -> dict[str, float]:
    """Read so many steps; sequences a second of wall and of CPU time."""
    wall, cpu, count = time.perf_counter(), time.process_time(), 0
    for batch in read(steps):
        assert batch.shape == (MICRO_BATCH, SEQ_LEN + 1)
        assert batch.dtype == torch.int64
        count += len(batch)
    assert count == steps * GLOBAL_BATCH
    return {"wall": count / (time.perf_counter() - wall), "cpu": count / (time.process_time() - cpu)}


def write_sparse(folder: Path, tokens: int) -> None:
    """Shards of 16M tokens without content, and manifests over them, 7:3."""
    size = 16 * 10**6
    for name, share in (("a", 0.7), ("b", 0.3)):
        shards = []
        for number in range(round(tokens * share / size)):
            path = folder / name / "shards" / f"{number}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.truncate(path, 128 + 2 * size)
            checksum = f"sha256:{number:064x}"
            shards.append(Shard(f"shards/{number}.npy", "uint16", 128, size, checksum, f"{number}.txt", 1, {}))
        manifest = Manifest("synthetic", "train", TOKENIZER, shards=tuple(shards), append_eos=True, prepend_bos=False)
        manifest.save(folder / name)


def first_batch(folder: Path, step: int) -> dict[str, float]:
    """In a process of its own: seconds and additional memory, at its peak, from nothing to a step's first micro-batch.

    As a restart comes to it: it asks whether a shard was written since all were found good. sequences_per_sec: of the steps after
    it, by CPU time.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, that of the imports, is forgotten
    before, started = _memory_mb("VmRSS"), time.perf_counter()
    batches = micro_batches(folder)
    for source in batches.sources:
        source.train.signature(of_these_files=True)
    batch, _ = next(data.train_loader(batches, [step], 0, torch.device("cpu")))
    seconds, peak = time.perf_counter() - started, _memory_mb("VmHWM")
    tokens = sum(source.train.num_tokens for source in batches.sources)

    def next_steps(steps: int) -> Iterator[torch.Tensor]:
        return (
            batch for batch, _ in data.train_loader(batches, range(step + 1, step + 1 + steps), 0, torch.device("cpu"))
        )

    rate = measure(next_steps, 8)["cpu"]
    rows = {"rows": len(batch), "files": sum(len(source.train.manifest.shards) for source in batches.sources)}
    return {"tokens": tokens, "step": step, "seconds": seconds, "mb": peak - before, "sequences_per_sec": rate, **rows}


def _memory_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def scale(folder: Path, tokens: int, step: int) -> dict[str, float]:
    """`first_batch` over so many tokens."""
    write_sparse(folder, tokens)
    command = [sys.executable, __file__, "--first_batch", str(folder), str(step)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> int:
    """Measure, print, write; status 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tinyllama", type=Path, help="a checkout of TinyLlama; without it ours is measured alone")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--steps", type=int, default=8, help="steps of 1,024 sequences in a round")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--first_batch", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.first_batch:
        print(json.dumps(first_batch(Path(args.first_batch[0]), int(args.first_batch[1]))))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tokens(folder)
        readers = {"cria": ours(folder), "cria, 2 threads": ours(folder, 2)}
        if args.tinyllama is not None:
            readers["tinyllama"] = theirs(folder, args.tinyllama)
        rates: dict[str, list[dict[str, float]]] = {name: [] for name in readers}
        for number in range(args.rounds + 1):
            for name, read in readers.items():
                rate = measure(read, args.steps)
                if number:  # the first warms up
                    rates[name].append(rate)
        trillion = scale(folder / "1T", 10**12, 1_000_000)
        small = scale(folder / "10B", 10**10, 1)
    median = {name: {k: statistics.median(r[k] for r in rs) for k in ("wall", "cpu")} for name, rs in rates.items()}
    result = {"sequences_per_sec": median, "rounds": rates, "first_batch": [trillion, small], **machine()}
    if "tinyllama" in median:
        pairs = zip(rates["cria"], rates["tinyllama"])
        result["times_tinyllama"] = statistics.median(a["cpu"] / b["cpu"] for a, b in pairs)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return show(result)


def show(result: dict) -> int:
    """Print the figures beside their targets."""
    for name, rate in result["sequences_per_sec"].items():
        print(f"{name:15} {rate['wall']:9,.0f} sequences/s, {rate['cpu']:9,.0f} a second of CPU time")
    if "times_tinyllama" in result:
        print(f"cria is {result['times_tinyllama']:.2f} times TinyLlama's (CPU time)")
    else:
        print("tinyllama  missing: name a checkout with --tinyllama")
    for facts in result["first_batch"]:
        print(
            f"{facts['tokens']:.0e} tokens in {facts['files']:,} files, step {facts['step']:,}: first batch in "
            f"{facts['seconds']:.3f} s, {facts['mb']:.0f} MB; then {facts['sequences_per_sec']:,.0f} sequences/s"
        )
    trillion = result["first_batch"][0]
    met = result["sequences_per_sec"]["cria"]["cpu"] >= TARGET and trillion["seconds"] < 1 and trillion["mb"] < 100
    print(f"targets ({TARGET:,} sequences/s on one core, 1 s, 100 MB): {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
