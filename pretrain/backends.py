"""Which library computes which operation, and why.

    OpsConfig + Situation (chip, type, head size, compiled?) ─> decide ─> Choices, one an operation ─> make ─> Operations
                                                                  └─ what is asked for and cannot be had: ValueError

Pure up to `make`, so that every chip's choices can be looked at on any machine. Sources of the rules: the libraries'
documentation, and measurements of this model (compiled PyTorch is faster than hand-fused kernels between the products).
"""

import importlib.util
import logging
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.version import Version
from torch.nn.attention import SDPBackend

from pretrain import kernels, ops
from pretrain.hosts import suspect, this_host
from pretrain.ops import Chosen, Operations
from pretrain.sections import ModelConfig, OpsConfig

PACKAGES = {"flash_attn": "flash-attn", "xformers": "xformers", "liger": "liger-kernel", "torchao": "torchao"}
"""Name of a backend -> of its package."""

MODULES = {"flash_attn": "flash_attn", "xformers": "xformers", "liger": "liger_kernel", "torchao": "torchao"}

INSTALL = {
    "flash_attn": "pip install -c constraints.txt --no-build-isolation '.[flash-attn]' (it compiles: needs nvcc)",
    "xformers": "pip install xformers (a version made for this torch)",
    "liger": "pip install -c constraints.txt '.[gpu]'",
    "torchao": "pip install -c constraints.txt '.[gpu]'",
}
"""How to get a library; the remedy in an error."""


@dataclass(frozen=True)
class Situation:
    """What a choice depends on, besides what was asked for."""

    capability: tuple[int, int] | None
    """Compute capability of the GPU, e.g. (8, 0) for an A100, (9, 0) for H100 and H200; None: the CPU."""
    dtype: torch.dtype
    """Type of queries, keys, values and the residual stream."""
    head_dim: int
    """Features of a head."""
    compiled: bool = False
    """Whether torch.compile is on."""
    documents: bool = False
    """Whether attention stays within documents, and positions start anew in each."""
    float8: bool = False
    """Whether the linear layers compute in float8."""
    deterministic: bool = False
    """Whether every run is to give the same bits."""


def installed(backend: str) -> str | None:
    """The version of a backend's package, or None where it cannot be imported."""
    if importlib.util.find_spec(MODULES[backend]) is None:
        return None
    try:
        return version(PACKAGES[backend])
    except PackageNotFoundError:
        return "0+unknown"


@lru_cache
def unloadable(backend: str) -> str | None:
    """Why a library that is installed cannot be used all the same: it was compiled for another PyTorch or CUDA."""
    logging.getLogger("xformers").setLevel(logging.ERROR)  # it says so too, in six lines
    try:
        module = importlib.import_module(MODULES[backend])
    except (ImportError, OSError) as error:
        problem = str(error).splitlines()[0]
    else:
        if getattr(module, "_has_cpp_library", True):  # xformers can be imported without
            return None
        problem = "its compiled part cannot be loaded"
    return (
        f"{PACKAGES[backend]} {installed(backend)} was not compiled for PyTorch {torch.__version__} ({problem}): "
        + INSTALL[backend]
    )


def obstacle(operation: str, backend: str, situation: Situation) -> str | None:
    """Why `backend` cannot do `operation` here, with the remedy; None where it can."""
    if backend == "torch":
        return None
    if situation.capability is None:
        there = ""
        if backend in PACKAGES and installed(backend) is None:
            there = f"; on a GPU it needs {PACKAGES[backend]} as well: {INSTALL[backend]}"
        return f"it needs a CUDA device, and this runs on the CPU: set model.ops.{operation} to auto or torch{there}"
    if backend == "torch_flash":
        masked = "it takes no mask, which data.intra_document needs: use torch" if situation.documents else None
        return masked or _flash_attention(situation, "")
    found = installed(backend)
    if found is None:
        return f"{PACKAGES[backend]} is not installed: {INSTALL[backend]}"
    if situation.capability < (8, 0):
        return f"it needs compute capability 8.0 or later, and this GPU has {'.'.join(map(str, situation.capability))}"
    rule = _RULES.get((operation, backend))
    return (rule(situation, found) if rule is not None else None) or unloadable(backend)


def _flash_attention(s: Situation, found: str) -> str | None:
    if s.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16, not in {_name(s.dtype)}: set parallel.precision to bf16"
    if s.head_dim % 8 or s.head_dim > 256:
        return f"it takes heads of up to 256 features, a multiple of 8; this model has {s.head_dim}"
    return _documents_on_the_host(s, found)


def _documents_on_the_host(s: Situation, found: str) -> str | None:
    if s.documents and s.compiled:
        return "with data.intra_document it needs the documents' lengths on the host, which breaks a compiled graph: use torch"
    return None


def _xformers_attention(s: Situation, found: str) -> str | None:
    if s.deterministic and s.compiled:
        return "its deterministic kernel cannot be compiled: use torch, or parallel.compile false"
    return _documents_on_the_host(s, found)


def _flash_rope(s: Situation, found: str) -> str | None:
    return "its table has one position for all sequences: not with data.intra_document" if s.documents else None


def _xformers_swiglu(s: Situation, found: str) -> str | None:
    if Version(found) >= Version("0.0.34"):
        return f"xformers {found} has no fused SwiGLU any more; the last that has is 0.0.33.post2 (for torch 2.9)"
    if s.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16, not in {_name(s.dtype)}: set parallel.precision to bf16"
    return "it multiplies by itself, not in float8: set parallel.precision to bf16" if s.float8 else None


def _cross_entropy(s: Situation, found: str) -> str | None:
    return (
        "its wrapper reads a value back from the device, which breaks a compiled graph: use torch, or parallel.compile false"
        if s.compiled
        else None
    )


_RULES: dict[tuple[str, str], Callable[[Situation, str], str | None]] = {
    ("attention", "flash_attn"): _flash_attention,
    ("attention", "xformers"): _xformers_attention,
    ("rope", "flash_attn"): _flash_rope,
    ("swiglu", "xformers"): _xformers_swiglu,
    ("cross_entropy", "flash_attn"): _cross_entropy,
    ("cross_entropy", "liger"): _cross_entropy,
}


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype, str(dtype))


def decide(config: OpsConfig, situation: Situation) -> tuple[Chosen, ...]:
    """One choice for each operation of `config`.

    Raises:
        ValueError: something was asked for by name that cannot be had here; all such things, with their remedies.
    """
    choices, problems = [], []
    for operation in ("attention", "rope", "swiglu", "rms_norm", "cross_entropy"):
        asked = getattr(config, operation)
        if asked == "auto":
            backend, why = _fastest(operation, situation)
        else:
            backend, why = asked, f"model.ops.{operation} asks for it"
            if problem := obstacle(operation, backend, situation):
                problems.append(f"model.ops.{operation} is {backend}: {problem}")
        kernel = "PyTorch" if backend in ("torch", "torch_flash") else f"{PACKAGES[backend]} {installed(backend)}"
        choices.append(Chosen(operation, backend, kernel, why))
    if problems:
        raise ValueError("; ".join(problems))
    return tuple(choices)


FUSED = {"rope": ("liger", "flash_attn"), "swiglu": ("liger", "xformers"), "rms_norm": ("liger",)}
"""Libraries with a fused kernel for the operation, the preferred one first."""


def _fastest(operation: str, s: Situation) -> tuple[str, str]:
    """What auto takes, and why."""
    if s.capability is None:
        return "torch", "the only one on a CPU"
    if operation == "attention":
        if s.documents and not s.compiled:
            return _first_of(operation, ("flash_attn", "xformers"), s, "skips other documents without compilation")
        if s.documents:
            return "torch", "flex_attention, compiled, skips other documents"
        return "torch", "its fused attention is the fastest on this chip"
    if operation == "cross_entropy":
        return "torch", "chunked: never all logits, no wait for the device"
    if s.compiled:
        return "torch", "compiled, it is faster than hand-fused kernels"
    return _first_of(operation, FUSED[operation], s, "fused, where nothing is compiled")


def _first_of(operation: str, candidates: tuple[str, ...], s: Situation, why: str) -> tuple[str, str]:
    problems = {backend: obstacle(operation, backend, s) for backend in candidates}
    for backend, problem in problems.items():
        if problem is None:
            return backend, why
    return "torch", "; ".join(f"not {backend}: {problem}" for backend, problem in problems.items())


_MADE: dict[tuple[str, str], dict[str, Callable[..., Any]]] = {
    ("attention", "flash_attn"): {
        "attention": kernels.flash_attention,
        "document_mask": kernels.flash_document_mask,
    },
    ("attention", "xformers"): {
        "attention": kernels.xformers_attention,
        "document_mask": kernels.xformers_document_mask,
    },
    ("rope", "flash_attn"): {"rope": kernels.flash_rope},
    ("rope", "liger"): {"rope": kernels.liger_rope},
    ("swiglu", "xformers"): {"swiglu": kernels.xformers_swiglu},
    ("swiglu", "liger"): {"swiglu": kernels.liger_swiglu},
    ("rms_norm", "liger"): {"rms_norm": kernels.liger_rms_norm},
    ("cross_entropy", "flash_attn"): {"cross_entropy": kernels.flash_cross_entropy},
    ("cross_entropy", "liger"): {"cross_entropy": kernels.liger_cross_entropy},
}


def make(choices: tuple[Chosen, ...], situation: Situation, shape: ModelConfig) -> Operations:
    """The functions for `choices`; on a GPU, with an attention that was seen to work there.

    Raises:
        ValueError: the attention that was asked for, or each of PyTorch's fused ones, fails on this GPU.
    """
    functions: dict[str, Callable[..., Any]] = {}
    named = []
    for choice in choices:
        functions |= _MADE.get((choice.operation, choice.backend), {})
        if choice.operation == "attention" and choice.backend in ("torch", "torch_flash"):
            bound, choice = _torch_attention(choice, situation, shape)
            functions |= bound
        elif choice.operation == "attention":
            if choice.backend == "xformers":
                functions["attention"] = partial(kernels.xformers_attention, causal_mask=kernels.xformers_causal_mask())
            if problem := _refusal(functions["attention"], functions["document_mask"], situation, shape):
                raise ValueError(f"model.ops.attention is {choice.backend}: {problem}; use torch")
        named.append(choice)
    return Operations(**functions, choices=tuple(named))  # type: ignore[arg-type]


def _torch_attention(choice: Chosen, s: Situation, shape: ModelConfig) -> tuple[dict[str, Callable[..., Any]], Chosen]:
    """Bound to the one kernel, the fastest that was seen to work here."""
    if s.capability is None:
        return {}, replace(choice, kernel="SDPA of the CPU" + (", block-diagonal mask" if s.documents else ""))
    if s.documents and s.compiled:
        return {"attention": ops.flex, "document_mask": ops.flex_document_mask}, replace(
            choice, kernel="flex_attention"
        )
    refused: list[str] = []
    flash_alone = choice.backend == "torch_flash"
    for kernel in (SDPBackend.FLASH_ATTENTION,) if flash_alone else sdpa_order(s, torch.backends.cudnn.version() or 0):
        attention = partial(ops.attention, kernel=kernel)
        problem = _refusal(attention, ops.document_mask, s, shape)
        if problem is None:
            name = f"SDPA {kernel.name.removesuffix('_ATTENTION').lower()}"
            why = choice.why + "".join(f"; {text}" for text in refused)
            return {"attention": attention}, replace(choice, kernel=name, why=why)
        refused.append(f"not {kernel.name.removesuffix('_ATTENTION').lower()}: {problem}")
    raise ValueError(
        f"PyTorch has no {'flash' if flash_alone else 'fused'} attention for heads of {s.head_dim} features in {_name(s.dtype)} "
        f"on this GPU: {'; '.join(refused)}"
    )


_CUDNN_SOUND = 91501
"""cuDNN 9.15.1. Before it, the backward of its attention reads out of bounds at lengths that are no multiple of 128 (pytorch
issue 169849); PyTorch's own order of preference has the same limit."""


def sdpa_order(s: Situation, cudnn_version: int) -> tuple[SDPBackend, ...]:
    """PyTorch's fused kernels to try, the fastest first. Its unfused one, which holds all T x T scores, is never one of them."""
    cudnn, flash, efficient = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
    if s.dtype is torch.float32 or s.documents or s.capability is None or s.capability < (8, 0):
        return (efficient,)  # alone in taking fp32, and masks
    # cuDNN's is 1.7 to 2.3 times FlashAttention-2 on Hopper, and 0.8 of it on Ampere, where flash is FlashAttention-2.
    best = (9, 0) <= s.capability < (11, 0) and cudnn_version >= _CUDNN_SOUND
    return (cudnn, flash, efficient) if best else (flash, efficient)


_NOT_MADE_FOR_IT = re.compile(
    r"no kernel image|PTX|invalid (device function|argument|configuration)|too many resources|supported"
)
"""What CUDA says of a kernel that is not for this GPU; all else it says is of the GPU."""


def _refusal(
    attention: Callable[..., torch.Tensor], make_mask: Callable[..., Any], s: Situation, shape: ModelConfig
) -> str | None:
    """Try it forward and backward on the current GPU; what it says where it does not work. Raises OSError where the GPU fails."""
    T = 128
    # Transposed as in the model.
    q, k, v = (
        torch.randn(1, T, heads, s.head_dim, device="cuda", dtype=s.dtype, requires_grad=True).transpose(1, 2)
        for heads in (shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads)
    )
    mask = make_mask(torch.zeros(1, T, dtype=torch.long, device="cuda")) if s.documents else None
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            attention(q, k, v, causal=True, mask=mask).sum().backward()
            torch.cuda.synchronize()  # a kernel's failure is heard of late
    except RuntimeError as error:
        if isinstance(error, torch.AcceleratorError | torch.OutOfMemoryError) and not _NOT_MADE_FOR_IT.search(
            str(error)
        ):
            suspect(this_host())
            raise OSError(
                f"a GPU of {this_host()} fails at its first work ({str(error).splitlines()[0]}): see nvidia-smi there, "
                "and leave the host out with sbatch --exclude"
            ) from error
        first, *more = str(error).strip().splitlines() or [repr(error)]
        if "No available kernel" in first:
            more = _reasons(str(line.message) for line in said)
        elif isinstance(error, NotImplementedError):  # of xformers: what it got, then why each of its kernels cannot
            more = [line.strip() for line in more if line.startswith("    ") and " : " not in line]
        else:
            more = []
        return "; ".join(dict.fromkeys(more)) or first
    return None


def _reasons(warned: Iterable[str]) -> list[str]:
    """Of what PyTorch says when it refuses, why: not its headings, nor that we allowed no other kernel."""
    lines = [line.partition(" (Triggered")[0].rstrip(".") for line in warned]
    return [line for line in lines if not line.endswith((":", "has been runtime disabled"))]


def choose(config: ModelConfig, situation: Situation) -> Operations:
    """`decide` and `make`: the operations that a model of this shape computes with in this situation.

    Raises:
        ValueError: something was asked for by name that cannot be had here, with the remedy.
    """
    return make(decide(config.ops, situation), situation, config)


def table(choices: tuple[Chosen, ...]) -> str:
    """The choices as aligned text, a line each."""
    rows = [("operation", "backend", "kernel", "why"), *((c.operation, c.backend, c.kernel, c.why) for c in choices)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join((*(cell.ljust(w) for cell, w in zip(row, widths)), row[3])) for row in rows)
