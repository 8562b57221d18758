"""How long the products and the attention of a training step take on this device, each by itself, in bf16.

    python benchmarks/kernels.py [--device cuda] [--config configs/tinyllama-1.1b.yaml] [--micro_batch_size 16]

Of each product forward, the gradient of its input, and that of its weight; on a GPU by cuBLAS, by cuBLASLt, which
TORCH_BLAS_PREFER_CUBLASLT=1 has a whole run use, and by cuBLAS where it may not add up the parts of a sum in bf16, as PyTorch
lets it by default (`torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction`); the last column is the error of the
weight's gradient, whose sums are the longest. The rows `q` and `k, v` are `q, k, v` by two products, and not in the sum.
Attention, forward and backward, by each of PyTorch's fused kernels that runs. On a GPU the calls are queued one behind the other
after a second of work, so that the chip is as warm, and its clocks are as low, as in a step. Times are medians; TFLOP/s count two
for a multiply-add, and half of attention, which is causal. The lines `a step` add up what a step of one micro-step takes, all
layers and the head: what is left of its time is not in these kernels.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend

from pretrain import config, ops
from pretrain.sections import ModelConfig

SDPA = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def milliseconds(work: Callable[[], object], device: torch.device, times: int) -> float:
    """The median of so many times, after three that warm up."""
    for _ in range(3):
        work()
    if device.type == "cpu":
        return statistics.median(_seconds(work) * 1000 for _ in range(times))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairwise(events))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def warm_up(device: torch.device) -> None:
    """A second of products."""
    x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    until = time.perf_counter() + 1
    while time.perf_counter() < until:
        for _ in range(10):
            x @ x
        torch.cuda.synchronize()


def products(model: ModelConfig, tokens: int, device: torch.device) -> list[tuple[str, int, int, int, float]]:
    """Name, tokens, width of the result, width of the input, and how often a step has it."""
    D, I, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers  # noqa: E741
    kv = 2 * model.num_key_value_heads * model.head_dim
    head = min(tokens, ops.logits_chunk(model.vocab_size, device.type, tokens * D if device.type == "cuda" else 0))
    return [
        ("q, k, v", tokens, D + kv, D, layers),
        ("q", tokens, D, D, 0),
        ("k, v", tokens, kv, D, 0),
        ("attention's output", tokens, D, D, layers),
        ("gate, up", tokens, 2 * I, D, layers),
        ("down", tokens, D, I, layers),
        ("head", head, model.vocab_size, D, tokens / head),
    ]


def time_products(model: ModelConfig, tokens: int, device: torch.device, times: int) -> None:
    """Print a table, and the sum, for each library."""
    ways = (
        (("cublas", True), ("cublaslt", True), ("cublas", False)) if device.type == "cuda" else (("the CPU's", True),)
    )
    for library, in_bf16 in ways:
        if device.type == "cuda":
            torch.backends.cuda.preferred_blas_library(library)
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = in_bf16
            warm_up(device)
        way = library if in_bf16 else f"{library}, parts of a sum in fp32"
        print(
            f"| {way} | forward | input's gradient | weight's gradient | its error |\n| --- | --- | --- | --- | --- |"
        )
        total = 0.0
        for name, N, out, width, often in products(model, tokens, device):
            x, y, w = (
                torch.randn(shape, device=device, dtype=torch.bfloat16)
                for shape in ((N, width), (N, out), (out, width))
            )
            cells = []
            for work in (lambda x=x, w=w: x @ w.T, lambda y=y, w=w: y @ w, lambda x=x, y=y: y.T @ x):
                ms = milliseconds(work, device, times)
                total += often * ms
                cells.append(f"{ms:.3f} ms, {2 * N * out * width / ms / 1e9:.0f} TFLOP/s")
            cells.append(f"{error_of(y.T @ x, y.T.float() @ x.float()):.2e}")
            print(f"| {name}, {N} x {width} to {out} | {' | '.join(cells)} |")
        print(f"\na step by {way}: {total:.1f} ms\n", flush=True)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True


def error_of(found: torch.Tensor, exact: torch.Tensor) -> float:
    """L2 norm of the difference over that of `exact`; rounding the result to bf16 alone makes about 1.7e-3."""
    return ((found.float() - exact).norm() / exact.norm()).item()


def time_attention(model: ModelConfig, B: int, T: int, device: torch.device, times: int) -> None:
    """Print a line for each kernel; one that does not run says why."""
    H, d = model.num_attention_heads, model.head_dim
    flops = 0.5 * 14 * B * H * T * T * d  # two products forward, five backward
    for kernel in SDPA if device.type == "cuda" else (SDPBackend.FLASH_ATTENTION,):
        name = kernel.name.removesuffix("_ATTENTION").lower()
        # As the model has them: (B, T, H, d) in memory.
        q, k, v = (
            torch.randn(B, T, heads, d, device=device, dtype=torch.bfloat16, requires_grad=True).transpose(1, 2)
            for heads in (H, model.num_key_value_heads, model.num_key_value_heads)
        )
        grad = torch.randn_like(q)

        def work(q=q, k=k, v=v, grad=grad, kernel=kernel) -> None:
            torch.autograd.grad(ops.attention(q, k, v, causal=True, kernel=kernel), (q, k, v), grad)

        try:
            ms = milliseconds(work, device, times)
        except RuntimeError as error:
            print(f"attention, {name}: does not run: {str(error).splitlines()[0]}")
            continue
        whole = model.num_hidden_layers * ms
        print(f"attention, {name}: {ms:.3f} ms, {flops / ms / 1e9:.0f} TFLOP/s; a step: {whole:.1f} ms", flush=True)


def main() -> int:
    """Time all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--config", type=Path, default=Path(__file__).parents[1] / "configs" / "tinyllama-1.1b.yaml")
    parser.add_argument("--micro_batch_size", type=int, default=16)
    parser.add_argument("--seq_len", type=int, help="tokens; else the configuration's")
    parser.add_argument("--times", type=int, default=20)
    args = parser.parse_args()
    settings, device = config.load(args.config), torch.device(args.device)
    torch.manual_seed(1)
    T = args.seq_len or settings.data.seq_len
    chip = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{chip}, torch {torch.__version__}: {args.micro_batch_size} x {T} tokens, median of {args.times}\n")
    time_products(settings.model, args.micro_batch_size * T, device, args.times)
    time_attention(settings.model, args.micro_batch_size, T, device, args.times)
    return 0


if __name__ == "__main__":
    sys.exit(main())
