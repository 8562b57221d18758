"""Everything that a GPU has to show, in under ten minutes, from a plain checkout: make bench-gpu.

    operations correct ─> the step, with a profile ─> micro-batch 16 in 40 GB ─> the peers ─> a sweep ─> the paper's table

    python3 benchmarks/gpu.py [--seconds 590] [--out benchmarks/results]
    python3 benchmarks/gpu.py --device cpu --small        the same in miniature, on a CPU

Nothing is installed and nothing fetched: what is missing is named, and so is what there was no time for. Each part is a command
of its own with a share of the time. Results: OUT/gpu-CHIP-PART.json and .md, and OUT/gpu-CHIP.md with all of them.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent

NEEDED = (
    "torch",
    "lightning",
    "jsonargparse",
    "docstring_parser",
    "typeshed_client",
    "numpy",
    "yaml",
    "rich",
    "safetensors",
)
NEEDED += ("tokenizers", "huggingface_hub", "packaging")
"""Modules that `pretrain bench` imports."""

OPTIONAL = (
    "pytest",
    "triton",
    "transformers",
    "liger_kernel",
    "flash_attn",
    "xformers",
    "torchao",
    "litgpt",
    "torchtitan",
)

FULL = ["--train.micro_batch_size", "16", "--train.global_batch_size", "16"]

SMALL = [
    *("--model.hidden_size", "64", "--model.intermediate_size", "160", "--model.num_hidden_layers", "2"),
    *("--model.num_attention_heads", "4", "--model.num_key_value_heads", "2", "--model.vocab_size", "320"),
    *("--data.seq_len", "32", "--data.num_workers", "0", "--parallel.accelerator", "cpu"),
    *("--train.micro_batch_size", "2", "--train.global_batch_size", "2"),
    *("--parallel.precision", "fp32", "--parallel.compile", "false"),
]


@dataclass(frozen=True)
class Part:
    """One command of `pretrain bench`."""

    name: str
    shows: str
    seconds: float
    """The most that it may take; what another part leaves over does not count."""
    options: list[str] = field(default_factory=list)
    small: list[str] = field(default_factory=list)
    """Added in the miniature; a later option overrides an earlier one."""
    budget: bool = False
    """Whether the command keeps to a budget by itself."""


SHORT = ["--steps", "2", "--warmup", "1"]

PARTS = (
    Part("step", "TinyLlama-1.1B's step; on one H200 at least 72,000 tokens/s (56% M1)", 120, ["--profile"], SHORT),
    Part("40gb", "micro-batch 16 within 40 GB", 75, ["--memory_limit_gib", "40", "--steps", "8"], SHORT),
    Part(
        "peers",
        "ours against every peer",
        280,
        ["--peers"],
        [*SHORT, "--rows", "transformers (eager),litgpt,stand-in"],
        True,
    ),
    Part("sweep", "the best settings", 120, ["--sweep", "--steps", "6", "--warmup", "3"], SHORT, True),
    Part(
        "paper",
        "hours for 300B tokens",
        150,
        ["--paper", "--steps", "6", "--warmup", "3"],
        [*SHORT, "--scale", "0.03"],
        True,
    ),
)


def main() -> int:
    """Run all parts; status 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a miniature of everything")
    parser.add_argument("--seconds", type=float, default=590, help="for everything together")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--parts", default=",".join(["operations", *(part.name for part in PARTS)]))
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "tinyllama-1.1b.yaml")
    parser.add_argument("--peers_python", action="append", default=[], help="another environment to find peers in")
    args = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"bench-gpu: error: not importable: {', '.join(missing)}; put them on PYTHONPATH, or run make setup",
            file=sys.stderr,
        )
        return 2
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "bench-gpu: error: no CUDA device here; --device cpu --small runs all of it in miniature", file=sys.stderr
        )
        return 2
    chip = torch.cuda.get_device_name(0) if args.device == "cuda" else "cpu"
    stem = args.out / f"gpu-{re.sub('[^a-z0-9]+', '-', chip.lower())}"
    absent = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    print(f"{chip}, torch {torch.__version__}; not installed: {', '.join(absent) or 'nothing'}", flush=True)
    pages, failed = _run(args, stem, time.monotonic() + args.seconds)
    Path(f"{stem}.md").write_text(f"Not installed: {', '.join(absent) or 'nothing'}.\n\n" + "\n".join(pages))
    print(f"{stem}.md" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _run(args: argparse.Namespace, stem: Path, deadline: float) -> tuple[list[str], list[str]]:
    """The parts in their order, each within its own time and what is left of all; their pages, and which failed."""
    pages, failed = [], []
    args.out.mkdir(parents=True, exist_ok=True)
    if "operations" in args.parts.split(","):
        said, status = _operations(args, min(90.0, deadline - time.monotonic()))
        pages.append(f"# Operations against the reference, in value and gradient\n\n{said}\n")
        failed += ["operations"] if status else []
    for part in (part for part in PARTS if part.name in args.parts.split(",")):
        seconds = min(part.seconds, deadline - time.monotonic())
        out = Path(f"{stem}-{part.name}")
        for old in (out.with_name(f"{out.name}.json"), out.with_name(f"{out.name}.md")):
            old.unlink(missing_ok=True)
        print(f"== {part.name}: {part.shows} ({seconds:.0f} s)", flush=True)
        if seconds < 15:
            pages.append(f"# {part.name}: not begun, no time left\n")
            continue
        if not _bench(args, part, out, seconds):
            failed.append(part.name)
        page = out.with_name(f"{out.name}.md")
        pages.append(page.read_text() if page.exists() else f"# {part.name}: no result\n")
    return pages, failed


def _bench(args: argparse.Namespace, part: Part, out: Path, seconds: float) -> bool:
    command = [
        sys.executable,
        "-m",
        "pretrain",
        "bench",
        "--config",
        str(args.config),
        *FULL,
        "--grad_accum_steps",
        "1",
    ]
    command += [*part.options, *(part.small + SMALL if args.small else []), "--out", str(out)]
    if part.budget:
        command += ["--budget_s", f"{seconds - 10:.0f}"]  # it has to write its result as well
    if part.name == "peers":
        command += [option for python in args.peers_python for option in ("--peers_python", python)]
    try:
        return subprocess.run(command, cwd=ROOT, env=_environment(), timeout=seconds).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"{part.name}: stopped after {seconds:.0f} s", flush=True)
        return False


def _operations(args: argparse.Namespace, seconds: float) -> tuple[str, int]:
    """`pytest -m gpu`; without pytest, a few training steps with each backend against the reference's."""
    print(f"== operations ({seconds:.0f} s)", flush=True)
    if args.device == "cpu" or importlib.util.find_spec("pytest") is None or importlib.util.find_spec("xdist") is None:
        command = [sys.executable, str(ROOT / "benchmarks" / "operations.py"), "--device", args.device]
    else:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-q", str(ROOT / "tests")]
    try:
        done = subprocess.run(command, cwd=ROOT, env=_environment(), timeout=seconds, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s", 1
    print(done.stdout[-3000:], done.stderr[-2000:], flush=True)
    return f"```\n{done.stdout[-4000:].strip()}\n```", done.returncode


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


if __name__ == "__main__":
    sys.exit(main())
