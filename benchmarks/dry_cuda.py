"""A Python program on GPUs that are not there: python benchmarks/dry_cuda.py -m pretrain bench --config configs/... [...]

    --ranks N --nodes M     (first) N ranks, each on a GPU of M nodes: what they would exchange by NCCL is written down,
                            counted, and must be the same on all of them, in the same order

It needs a build of PyTorch for CUDA (CONTRIBUTING.md has how to install one), gcc, and nm of the binutils. The program is
started under dry_cuda.c, a CUDA runtime of H200s that computes nothing: Inductor, Triton and ptxas compile for the chip, and
PyTorch's allocator, streams, hooks and FSDP2 run as they would, with gloo beside an NCCL that sends nothing, on tensors of
arbitrary content. What comes of it is peak memory, the kernels (TORCH_LOGS=output_code, with
TORCHINDUCTOR_BENCHMARK_KERNEL=1 their bytes), what the host needs for a step, what ranks would exchange, and whatever does
not run at all. Times and losses mean nothing; cuDNN is not there.
"""

import argparse
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")

NEEDED = re.compile(r"(__cuda|cuda|cublas|nccl|cu)[A-Z]\w*")
"""Names of the CUDA runtime's functions, cuBLAS's, NCCL's and the driver's."""


def build(folder: Path) -> Path:
    """Compile the runtime into `folder`, with a success for every function that PyTorch and Triton want and it has not."""
    torch, triton = (Path(find_spec(name).origin).parent for name in ("torch", "triton"))
    includes = [torch.parent / "nvidia" / "cu13" / "include", triton / "backends" / "nvidia" / "include"]
    compiler = ["gcc", *(f"-I{path}" for path in includes), "-w", "-O1", "-fPIC"]
    ours, rest, library = folder / "dry.o", folder / "rest.c", folder / "libcuda.so.1"
    subprocess.run([*compiler, "-c", SOURCE, "-o", ours], check=True)
    drivers = [(triton / "backends" / "nvidia" / name).read_text() for name in ("driver.c", "driver.py")]
    wanted = set(re.findall(r"\bcu[A-Z]\w+", "\n".join(drivers)))
    for binary in (torch / "lib").glob("*.so"):
        wanted.update(name for name in _symbols(binary, "-D", "--undefined-only") if NEEDED.fullmatch(name))
    missing = sorted(wanted - _symbols(ours, "--defined-only"))
    rest.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in missing))
    subprocess.run([*compiler, "-shared", ours, rest, "-o", library, "-ldl", "-lpthread"], check=True)
    (folder / "libcuda.so").symlink_to(library)
    return library


def _symbols(binary: Path, *options: str) -> set[str]:
    done = subprocess.run(["nm", "--format=just-symbols", *options, binary], capture_output=True, text=True, check=True)
    return {line.partition("@")[0] for line in done.stdout.splitlines()}


def main() -> int:
    """Build the runtime and run the program under it; returns its status, 1 where the ranks would not have met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, help="processes")
    parser.add_argument("--nodes", type=int, default=1, help="nodes that they are on, as they are told")
    own, program = split(sys.argv[1:])
    args = parser.parse_args(own)
    with tempfile.TemporaryDirectory(prefix="dry-cuda-") as name:
        folder = Path(name)
        environment = os.environ | {
            "LD_PRELOAD": str(build(folder)),
            "LD_LIBRARY_PATH": name,
            "TRITON_LIBCUDA_PATH": name,
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        command = [sys.executable, *program]
        if args.ranks == 1:
            return subprocess.run(command, env=environment).returncode
        status = run_ranks(command, environment, args.ranks, args.nodes, folder)
        return status or compare([(folder / f"nccl-{rank}").read_text().splitlines() for rank in range(args.ranks)])


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Our own options, which come first and begin with --, and what python is to run, whose options are not ours."""
    first = 0
    while first < len(words) and words[first].startswith("--"):
        first += 1 if "=" in words[first] else 2
    return words[:first], words[first:]


def run_ranks(command: list[str], environment: dict[str, str], ranks: int, nodes: int, folder: Path) -> int:
    """Start them as torchrun would and wait for all; the first status that is not 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    local = ranks // nodes
    common = environment | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(local), "DRY_DEVICES": str(local)}
    common |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "dry",
        "OMP_NUM_THREADS": "1",
    }
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank % local), "GROUP_RANK": str(rank // local)}
        own["DRY_NCCL"] = str(folder / f"nccl-{rank}")
        processes.append(subprocess.Popen(command, env=common | own))
    return next((status for status in [process.wait() for process in processes] if status), 0)


def compare(logs: list[list[str]]) -> int:
    """Print what was exchanged, by kind and number of ranks; 1 where one rank's order is not that of the first."""
    for rank, log in enumerate(logs):
        pairs = enumerate(zip_longest(logs[0], log))
        if differs := next(((number, *pair) for number, pair in pairs if pair[0] != pair[1]), None):
            print(f"collective {differs[0] + 1}: {differs[1]!r} on rank 0, {differs[2]!r} on rank {rank}")
            return 1
    print(f"{len(logs[0])} calls of NCCL, the same on {len(logs)} ranks")
    for kind, number in Counter(line.partition(":")[0] for line in logs[0]).most_common():
        print(f"  {number:>6} {kind}")
    return 0 if logs[0] else 1


if __name__ == "__main__":
    sys.exit(main())
