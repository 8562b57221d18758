"""What the tests share: one thread a process, tiny datasets in the real format, and a way to start real processes."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; child processes inherit it

import gc
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
import yaml
from processes import Process

from data_prep.shard import Manifest, ShardWriter, token_dtype
from data_prep.tokenizer import load

torch.set_num_threads(1)

VOCAB_SIZE = 300


SLOWEST = (
    "test_launch_slurm",
    "test_readme",
    "test_launch",
    "test_bench_gpu",
    "test_faults",
    "test_watchdog",
    "test_parallel",
    "test_verify_resume",
    "test_resume",
    "test_trainer",
    "test_learns",
    "test_build",
    "test_bench",
    "test_bench_peers",
    "test_bench_sweep",
    "test_ops_triton",
)
"""Files of tests that take longest, or wait (for a time limit, a hang): they begin first, beside others that compute."""


def pytest_configure(config: pytest.Config) -> None:
    """Tests marked gpu run when they are asked for (-m gpu, make test-gpu); then there must be one."""
    if config.option.markexpr.strip() == "gpu" and not torch.cuda.is_available():
        raise pytest.UsageError("the tests marked gpu need a CUDA device, and PyTorch sees none on this machine")


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    """What a failed test has started would slow the next ones. A run in this process, or nohup, has left signals ignored."""
    stops = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in stops} | {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)
    }
    yield
    processes.kill_what_is_left()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first."""
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))


def pytest_collection_finish() -> None:
    """What was imported until now stays; looking for garbage in it takes much of the time of short tests."""
    gc.freeze()


def write_dataset(
    folder: Path,
    tokens: int,
    seed: int,
    tokenizer: str = "a",
    shards: int = 3,
    vocab_size: int = VOCAB_SIZE,
    **policy: bool,
) -> Path:
    """A dataset of random tokens with some order in them (each token tends to follow its predecessor), in `shards` shards."""
    rng = np.random.default_rng(seed)
    ids = (np.cumsum(rng.integers(0, 3, tokens)) + rng.integers(0, 2, tokens) * 7) % VOCAB_SIZE
    written = []
    for number, part in enumerate(np.array_split(ids, shards)):
        with ShardWriter(folder, f"shards/part-{number}.npy", token_dtype(VOCAB_SIZE)) as writer:
            writer.append(part)
        written.append(writer.shard(source_file=f"part-{number}.txt", documents=1))
    (folder / "tokenizer").mkdir(exist_ok=True)
    vocab = {str(token): token for token in range(vocab_size)}
    # As text, so that the fingerprint, and with it the order of the data, is the same with every version of tokenizers.
    words = {"type": "WordLevel", "vocab": vocab, "unk_token": str(ord(tokenizer))}
    content = {"version": "1.0", "added_tokens": [], "model": words}
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"bos_token": "1", "eos_token": "2"}')
    info = load(folder / "tokenizer").info
    policy = {"append_eos": True, "prepend_bos": False, **policy}
    Manifest("synthetic", "train", info, shards=tuple(written), **policy).save(folder)
    return folder


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, a and b, with a training and a validation split each: DIR/a/train, DIR/a/validation, ..."""
    folder = tmp_path_factory.mktemp("datasets")
    for seed, name in enumerate("ab"):
        write_dataset(folder / name / "train", 20_000 + 5_000 * seed, seed)
        write_dataset(folder / name / "validation", 1_000, 10 + seed)
    return folder


TINY_MODEL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def tiny_config(datasets: Path, run_dir: Path, **sections: object) -> dict:
    """A complete configuration that trains in seconds; `sections` are merged into it, one level deep."""
    tree: dict = {
        "run_dir": str(run_dir),
        "logger": "none",
        "model": TINY_MODEL,
        "data": {
            "seq_len": 32,
            "num_workers": 0,
            "sources": [
                {"name": n, "weight": w, "train": f"{datasets}/{n}/train", "validation": f"{datasets}/{n}/validation"}
                for n, w in (("a", 7), ("b", 3))
            ],
        },
        "train": {"max_steps": 20, "global_batch_size": 8, "micro_batch_size": 2, "log_every": 1},
        "optim": {"max_lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 4},
        "validation": {"every_steps": 10, "max_sequences": 7},
        "checkpoint": {"every_steps": 5, "keep_last": 0},
        "parallel": {"accelerator": "cpu", "precision": "fp32", "compile": False},
    }
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    return tree


def write_config(path: Path, tree: dict) -> Path:
    """Write a configuration as YAML and return its path."""
    path.write_text(yaml.safe_dump(tree))
    return path


def pretrain(
    *argv: object, ranks: int = 1, torchrun: bool = False, check: bool = True, **options
) -> subprocess.CompletedProcess:
    """Run `pretrain ARGV`: one process of its own a rank (see processes.py), or from the ground up by `torchrun`."""
    words = tuple(map(str, argv))
    if torchrun:
        start = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
        command = [sys.executable, "-m", *start, "pretrain", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
    else:
        done = processes.run(words, ranks, **options)
    if check and done.returncode:
        raise AssertionError(f"pretrain {' '.join(words)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def records(run_dir: Path, kind: str) -> dict[int, dict]:
    whole, _, _ = (run_dir / "metrics.jsonl").read_text().rpartition("\n")  # behind it a line that is being written
    lines = [json.loads(line) for line in whole.splitlines()]
    return {line["step"]: line for line in lines if line["kind"] == kind}


def trajectory(run_dir: Path) -> list[tuple]:
    """What must not change: exact floats of every step, and of every validation."""
    steps = [
        (step, r["data_hash"], r["loss"], r["grad_norm"], r["lr"])
        for step, r in sorted(records(run_dir, "train").items())
    ]
    return steps + [(step, r["losses"]) for step, r in sorted(records(run_dir, "validation").items())]


@pytest.fixture(scope="session")
def straight(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps on one rank, never disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    pretrain("train", "--config", write_config(folder / "c.yaml", tiny_config(datasets, folder / "run")))
    return folder / "run"


LONGER: dict = {
    "train": {"max_steps": 120, "micro_batch_size": 4},
    "validation": {"every_steps": 50},
    "checkpoint": {"every_steps": 30, "keep_last": 2},
    "parallel": {"strategy": "full_shard"},  # auto would take another one on two nodes than on one
}
"""Sections of a run that can be disturbed several times."""


@pytest.fixture(scope="session")
def two_ranks(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """The trajectory of LONGER on two ranks, never disturbed."""
    folder = tmp_path_factory.mktemp("two-ranks")
    pretrain(
        "train", "--config", write_config(folder / "c.yaml", tiny_config(datasets, folder / "run", **LONGER)), ranks=2
    )
    return trajectory(folder / "run")


def start(config_file: Path, *overrides: str) -> Process:
    """Begin to train, in a process group of its own."""
    return Process(("train", "--config", str(config_file), *overrides), dict(os.environ), merged=True)


def until(holds: Callable[[], object]) -> None:
    """Wait for what must come about."""
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.02)


def wait_for(run_dir: Path, step: int, process: Process | subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if (run_dir / "metrics.jsonl").exists() and step in records(run_dir, "train"):
            return
        time.sleep(0.02)
    process.kill()  # it may hang
    raise AssertionError(f"step {step} was not reached:\n{process.communicate(timeout=60)}")
