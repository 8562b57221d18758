"""A Python program on a GPU that is not there: python benchmarks/dry_cuda.py -m pretrain bench --config configs/... [...]

It needs a build of PyTorch for CUDA (CONTRIBUTING.md has how to install one), gcc, and nm of the binutils. The program is
started under dry_cuda.c, a CUDA runtime of one H200 that computes nothing: Inductor, Triton and ptxas compile for the chip, and
PyTorch's allocator, streams, hooks and collectives on one rank run as they would, on tensors of arbitrary content. What comes
of it is peak memory, the kernels (TORCH_LOGS=output_code, with TORCHINDUCTOR_BENCHMARK_KERNEL=1 their bytes), what the host
needs for a step, and whatever does not run at all. Times and losses mean nothing; cuDNN is not there.
"""

import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
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
    """Build the runtime and run the program under it; returns its status."""
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
        return subprocess.run([sys.executable, *sys.argv[1:]], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
