"""Everything that a GPU has to show, in under ten minutes, from a plain checkout: make bench-gpu.

    operations ─> the step, with a profile ─> micro-batch 16 in 40 GB ─> a killed run resumed ─> the peers ─> products,
    attention ─> four micro-steps ─> attention within documents ─> float8 ─> the plan's probe ─> the paper ─> a sweep

    python3 benchmarks/gpu.py [--seconds 580] [--out benchmarks/results]
    python3 benchmarks/gpu.py --device cpu --small        the same in miniature, on a CPU

Nothing is installed and nothing fetched: what is missing is named, and so is what there was no time for. Beside torch it needs
lightning, jsonargparse[signatures], rich and transformers, on PYTHONPATH if need be. Each part is a command of its own with a
share of the time. Results: OUT/gpu-CHIP-PART.json and .md, and OUT/gpu-CHIP.md with all of them.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent

OPTIONAL = (
    "triton",
    "transformers",
    "liger_kernel",
    "flash_attn",
    "xformers",
    "torchao",
    "litgpt",
    "torchtitan",
)

MICRO_BATCH = ["--train.micro_batch_size", "16"]

SMALL = [
    *("--model.hidden_size", "64", "--model.intermediate_size", "160", "--model.num_hidden_layers", "2"),
    *("--model.num_attention_heads", "4", "--model.num_key_value_heads", "2", "--model.vocab_size", "320"),
    *("--data.seq_len", "32", "--data.num_workers", "0", "--parallel.accelerator", "cpu"),
    *("--train.micro_batch_size", "2", "--train.global_batch_size", "2"),
    *("--parallel.precision", "fp32", "--parallel.compile", "false"),
]


@dataclass(frozen=True)
class Part:
    """What has a share of the time: a command of `pretrain bench`, but for those of `SCRIPTS` and resume."""

    name: str
    shows: str
    seconds: float
    """The most that it may take; what another part leaves over does not count."""
    options: list[str] = field(default_factory=list)
    small: list[str] = field(default_factory=list)
    """Added in the miniature; a later option overrides an earlier one."""
    budget: bool = False
    """Whether the command keeps to a budget by itself."""
    needs: str = ""
    """A package; without it, or without a GPU, the part is left out."""


SHORT = ["--steps", "2", "--warmup", "1"]

RECOMPUTE = ["--parallel.recompute", "mlp"]

ONE = ["--train.global_batch_size", "16", "--grad_accum_steps", "1", "--steps", "40"]
"""As the peers: clipping and AdamW fall on a single micro-step."""

AS_A_RUN = ["--train.global_batch_size", "64", "--grad_accum_steps", "4"]

TWO = ["--train.global_batch_size", "32", "--grad_accum_steps", "2"]
"""As in a run, where the gradient of the micro-steps before is there at the peak. The sweep sees to that by itself: it has the
configuration's own global batch, and times up to three of a step's micro-steps."""

FP8 = ["--parallel.precision", "fp8"]

QUICK = ["--steps", "3", "--warmup", "2"]
"""Of several micro-steps each."""

FEW = ["--rows", "micro-batch 2 eager,micro-batch 1 eager"]

FOUR = ["--train.global_batch_size", "8"]

SOME = ["--rows", "transformers (eager),litgpt,stand-in"]

ROWS = ("peers", "sweep")
"""Parts of which --rows takes some."""

PARTS = (
    Part("operations", "Operations against the reference, in value and gradient", 110),
    # A compilation of all 22 layers takes a minute or more, and each part makes its own.
    Part(
        "step", "TinyLlama-1.1B's step; on one H200 at least 72,000 tokens/s (56% M1)", 250, [*ONE, "--profile"], SHORT
    ),
    # An A100-40G has 39.4 GiB, and its context takes some; the limit holds for tensors.
    Part(
        "40gb",
        "micro-batch 16 within 40 GB",
        200,
        ["--memory_limit_gib", "38.8", *RECOMPUTE, *TWO, "--steps", "6"],
        SHORT,
    ),
    Part("resume", "A killed run goes on as the same run, full_shard on one rank", 110),
    Part("peers", "ours against every peer", 560, ["--peers"], [*SHORT, *SOME], True),
    Part("kernels", "The step's products by each library, and its attention by each kernel, by themselves", 60),
    Part("four", "the same step of four micro-steps, as far as a run's goes", 200, AS_A_RUN, SHORT),
    Part("documents", "What attention within documents costs, forward and backward", 150),
    Part("fp8", "the step with its layers' products in float8", 250, [*ONE, *FP8], needs="torchao"),
    Part("probe", "The plan of this chip, by a probe of a few steps", 200),
    Part("paper", "hours for 300B tokens", 270, ["--paper", *QUICK], [*SHORT, "--scale", "0.03"], True),
    Part("sweep", "the best settings", 560, ["--sweep", *QUICK], [*SHORT, *FEW, *FOUR], True),
)
"""Each takes at most what time is left: the later ones are best asked for by themselves, --parts peers."""


def main() -> int:
    """Run all parts; status 1 where one failed."""
    started = time.monotonic()  # the imports below take some of it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a miniature of everything")
    parser.add_argument("--seconds", type=float, default=580, help="for everything together")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--parts", default=",".join(part.name for part in PARTS))
    parser.add_argument(
        "--rows", help="only these rows of peers or sweep, by the beginning of their names; kept as PART-more"
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "tinyllama-1.1b.yaml")
    parser.add_argument("--peers_python", action="append", default=[], help="another environment to find peers in")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    try:
        import torch

        import pretrain.bench_step  # noqa: F401 (and with it all that a part imports)
    except ImportError as error:
        print(f"bench-gpu: error: {error}; put it on PYTHONPATH, or run make setup", file=sys.stderr)
        return 2
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "bench-gpu: error: no CUDA device here; --device cpu --small runs all of it in miniature", file=sys.stderr
        )
        return 2
    chip = torch.cuda.get_device_name(0) if args.device == "cuda" else "cpu"
    stem = args.out / f"gpu-{re.sub('[^a-z0-9]+', '-', chip.lower())}"
    absent = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    print(f"{chip}, torch {torch.__version__}; not installed: {', '.join(absent) or 'nothing'}", flush=True)
    failed, left = list[str](), list[str]()
    for name, good in _run(args, stem, started + args.seconds):
        failed += [name] if good is False else []
        left += [name] if good is None else []
        pages = [Path(f"{stem}-{part.name}{more}.md") for part in PARTS for more in ("", "-more")]
        texts = [page.read_text() for page in pages if page.exists()]  # those of earlier calls, too
        Path(f"{stem}.md").write_text("\n".join([f"Not installed: {', '.join(absent) or 'nothing'}.\n", *texts]))
    print(f"{stem}.md" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    if left:
        print(f"no time was left for {', '.join(left)}: ask for them by themselves, --parts {','.join(left)}")
    return 1 if failed else 0


def _run(args: argparse.Namespace, stem: Path, deadline: float) -> Iterator[tuple[str, bool | None]]:
    """The parts in their order, each within its own time and what is left of all: its name, whether all is well; None: it was not
    begun, and what an earlier call found stays.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    for part in (part for part in PARTS if part.name in args.parts.split(",")):
        seconds = min(part.seconds, deadline - time.monotonic())
        if seconds < 15:
            yield part.name, None
            continue
        print(f"== {part.name}: {part.shows} ({seconds:.0f} s)", flush=True)
        page = Path(f"{stem}-{part.name}{'-more' if args.rows and part.name in ROWS else ''}.md")
        for old in (page, page.with_suffix(".json")):
            old.unlink(missing_ok=True)
        if part.needs and (args.device == "cpu" or importlib.util.find_spec(part.needs) is None):
            missing = "it needs a GPU" if args.device == "cpu" else f"{part.needs} is not installed"
            page.write_text(f"# {part.name}: {part.shows}\n\nNot timed: {missing}.\n")
            yield part.name, True
            continue
        if part.name == "resume" or part.name in SCRIPTS:
            said, good = _resume(args, seconds) if part.name == "resume" else _script(args, part.name, seconds)
            page.write_text(f"# {part.shows}\n\n{said}\n")
        else:
            good = _bench(args, part, page.with_suffix(""), seconds)
        if not page.exists():
            page.write_text(f"# {part.name}: no result\n")
        yield part.name, good


def _bench(args: argparse.Namespace, part: Part, out: Path, seconds: float) -> bool:
    command = [sys.executable, "-m", "pretrain", "bench", "--config", str(args.config), *MICRO_BATCH]
    command += [*part.options, *(SMALL + part.small if args.small else []), "--out", str(out)]
    if part.budget:
        aside = 10 if args.small else 40  # for its imports, the device's context, and to write the result
        command += ["--budget_s", f"{seconds - aside:.0f}"]
    if args.rows and part.name in ROWS:
        command += ["--rows", args.rows]
    if part.name == "peers":
        command += [option for python in args.peers_python for option in ("--peers_python", python)]
    process = subprocess.Popen(command, cwd=ROOT, env=_environment())
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it ends its own processes, which would hold the GPU
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    process.kill()
    print(f"{part.name}: stopped after {seconds:.0f} s", flush=True)
    return False


def _script(args: argparse.Namespace, name: str, seconds: float) -> tuple[str, bool]:
    """A part that is a command of its own: what it said, and whether all is well."""
    text, status = _output(SCRIPTS[name](args), seconds)
    return text if name != "kernels" else text.replace("```", ""), status == 0  # its tables stand as they are


def _operations(args: argparse.Namespace) -> list[str]:
    """Each operation in a small model (odd shapes are `make test-gpu`'s)."""
    return [str(ROOT / "benchmarks" / "operations.py"), "--device", args.device]


def _kernels(args: argparse.Namespace) -> list[str]:
    """Where a step's time would go if it were nothing else."""
    command = [str(ROOT / "benchmarks" / "kernels.py"), "--device", args.device, "--config", str(args.config)]
    return command + (["--micro_batch_size", "1", "--seq_len", "16", "--times", "1"] if args.small else [])


def _documents(args: argparse.Namespace) -> list[str]:
    small = [
        "--config",
        str(ROOT / "configs" / "demo.yaml"),
        "--rounds",
        "1",
        "--seq_len",
        "32",
        "--micro_batch_size",
        "1",
    ]
    command = [
        str(ROOT / "benchmarks" / "intra_document.py"),
        "--out",
        str(args.out / f"intra_document_{args.device}.json"),
    ]
    return command + (small if args.small else ["--config", str(args.config), "--rounds", "9"])


def _probe(args: argparse.Namespace) -> list[str]:
    config = ROOT / "configs" / "demo.yaml" if args.small else args.config
    return ["-m", "pretrain", "plan", "--config", str(config), "--probe"]


SCRIPTS = {"operations": _operations, "kernels": _kernels, "documents": _documents, "probe": _probe}
"""Parts that are no `pretrain bench`: their command."""


def _resume(args: argparse.Namespace, seconds: float) -> tuple[str, bool]:
    """A small model on random tokens, through NCCL and FSDP2 on one rank: trained, saved in the background, killed, resumed."""
    from pretrain import bench_step, config

    small = [*SMALL, "--parallel.accelerator", args.device, "--parallel.strategy", "full_shard"]
    if args.device == "cuda":
        small += ["--parallel.precision", "bf16"]
    with tempfile.TemporaryDirectory(prefix="cria-resume-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        settings = config.parse(["--config", str(args.config), *small, "--run_dir", str(folder / "run")])
        config.write(bench_step.with_random_data(settings, folder / "data"), folder / "c.yaml")
        command = ["-m", "pretrain", "verify-resume", "--config", str(folder / "c.yaml")]
        command += ["--steps", "8", "--kills", "1", "--out", str(folder / "out")]
        text, status = _output(command, seconds)
        for output in sorted((folder / "out").glob("*/output.txt")) if status else ():  # else the folder takes it along
            text += f"\n{output.parent.name}:\n```\n{output.read_text()[-3000:]}\n```"
    return text, status == 0


def _output(command: list[str], seconds: float) -> tuple[str, int]:
    """What a Python process says within its time, as a block of the page; and its status."""
    seconds = max(1.0, seconds)
    from pretrain import processes

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=_environment(), **pipes)
    try:
        out, errors = child.communicate(timeout=seconds)
        said, status = out[-4000:].strip(), child.returncode
        said += f"\n{errors[-3000:].strip()}" if status or not said else ""
    except subprocess.TimeoutExpired:
        processes.kill([*processes.descendants(child.pid), child.pid])  # what it started would hold the GPU
        out, errors = child.communicate()
        said, status = "\n".join([out[-3000:], errors[-3000:], f"stopped after {seconds:.0f} s"]).strip(), 1
    print(said, flush=True)
    return f"```\n{said}\n```", status


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


if __name__ == "__main__":
    sys.exit(main())
