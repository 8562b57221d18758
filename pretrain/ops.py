"""The five operations that decide the speed of a Llama, each a plain function of tensors.

    hidden -> rms_norm -> q, k, v -> rope -> attention -> + -> rms_norm -> swiglu -> + ... -> linear_cross_entropy

These are the reference: plain PyTorch, written so that torch.compile fuses them well. `Operations` is the set that a model
computes with; `kernels` has the same operations from other libraries, and `backends` chooses among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from pretrain.sections import RopeScaling

IGNORE_INDEX = -100
"""A target that does not count (PyTorch's and Hugging Face's convention)."""


# --- products --------------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """A product without bias, in its input's type whatever the type that the weight is kept in."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(x, self.weight.to(x.dtype))


def linears(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """Each layer's product with the same x, (..., D) -> (..., out_features) each; by one product where that is for free."""
    side_by_side = _joined(x, *layers)
    if side_by_side is None:
        return [layer(x) for layer in layers]
    return side_by_side.split([len(cast(Tensor, layer.weight)) for layer in layers], dim=-1)


def _joined(x: Tensor, *layers: nn.Module) -> Tensor | None:
    """The products with the same x side by side, by one product; None where that is not for free.

    k_proj and v_proj alone are too narrow to fill a GPU, and each further product reads x, and writes a gradient for it, once
    more. Compiled, the cast of the weights writes them side by side at no cost. Where nothing is cast (fp32; weights gathered by
    FSDP2) or compiled, joining them would be a copy, kept for the backward. Layers of another class (float8's) stay apart.
    """
    free = torch.compiler.is_compiling() and all(type(layer) is Linear for layer in layers)
    if not free or cast(Tensor, layers[0].weight).dtype == x.dtype:
        return None
    return F.linear(x, torch.cat([cast(Tensor, layer.weight).to(x.dtype) for layer in layers]))


# --- norm, rotary embedding, SwiGLU ----------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (arXiv 1910.07467, eq. 4), its statistics in fp32.

    x: (..., D), any float type; weight: (D,). The result has x's type.
    """
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Angle from one position to the next of each pair of features (radians), (d/2,) fp32: theta^(-2j / d), scaled or not.

    scaling: Llama 3.1's (`apply_scaling` in Meta's llama-models, `_compute_llama3_parameters` in transformers). By how often a
    pair turns within the original length: up to low_freq_factor times, its frequency is divided by factor; from
    high_freq_factor times on it stays; between them its share of staying grows linearly in the number of turns.
    """
    inv_freq = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    if scaling is None:
        return inv_freq
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # In transformers' order of operations, for the same last bits.
    turns = scaling.original_max_position_embeddings / (2 * math.pi / inv_freq)
    stays = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - stays) * inv_freq / scaling.factor + stays * inv_freq


def rope_table(
    length: int, head_dim: int, theta: float, device: torch.device, scaling: RopeScaling | None = None
) -> Tensor:
    """Cosines and sines of the rotary embedding (arXiv 2104.09864, eq. 34), fp32.

    Returns (2, length, head_dim): [0] cosines, [1] sines, for feature j the angle position * theta^(-2 (j mod d/2) / d), or with
    the frequency that `rope_frequencies` makes of it.
    """
    inv_freq = rope_frequencies(head_dim, theta, scaling, device)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), inv_freq)
    angle = torch.cat((angle, angle), dim=-1)
    return torch.stack((angle.cos(), angle.sin()))


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate pairs (j, j + d/2) of every head by its position's angle, in fp32; Hugging Face's layout of a head.

    x: (B, H, T, d); table: (2, T, d) from `rope_table`, or (2, B, T, d) where positions differ. The result has x's type.
    """
    # (T, 1, d/2) or (B, T, 1, d/2) each: the same for all heads
    cos, sin = table[..., : x.shape[-1] // 2].unsqueeze(-2)
    x = x.transpose(1, 2)  # (B, T, H, d), as the product left it and its backward wants the gradient: nothing is moved
    left, right = x.chunk(2, dim=-1)
    # By halves, and not x * cos + (-right, left) * sin: of that the compiled backward is bound by its instructions.
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype).transpose(1, 2)


def rope(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rope` to queries (B, H, T, d) and keys (B, H_kv, T, d)."""
    return apply_rope(q, table), apply_rope(k, table)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, elementwise (arXiv 2002.05202, eq. 6)."""
    return F.silu(gate) * up


def silu_mul_side_by_side(gate_and_up: Tensor) -> Tensor:
    """`silu_mul` of gate and up that stand in one tensor, (..., 2 F) -> (..., F)."""
    return _SiluMul.apply(gate_and_up)


class _SiluMul(torch.autograd.Function):
    """For the compiler: by itself it joins the two gradients by computing both of them for each element of either half, and the
    pass is bound by its instructions; here a half computes what is its own.
    """

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        """(..., 2 F) -> (..., F)."""
        ctx.save_for_backward(gate_and_up)
        return silu_mul(*gate_and_up.chunk(2, dim=-1))

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Tensor:  # type: ignore[override]
        """Both gradients side by side, (..., 2 F), computed in fp32."""
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.unflatten(-1, (2, -1)).float().split(1, dim=-2)  # (..., 1, F) each
        d_out = d_out.float().unsqueeze(-2)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        of_gate = torch.arange(2, device=gate.device)[:, None] == 0  # (2, 1)
        d_both = d_out * torch.where(of_gate, up * (sigmoid + silu * (1 - sigmoid)), silu)  # (..., 2, F)
        return d_both.flatten(-2).to(gate_and_up.dtype)


def swiglu(
    x: Tensor,
    gate_proj: nn.Module,
    up_proj: nn.Module,
    down_proj: nn.Module,
    elementwise: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The whole block around `silu_mul`, (B, T, D) -> (B, T, D); some libraries fuse it with its products.

    elementwise: takes the place of `silu_mul`, as where its result is to be computed again in the backward; None: as is best.
    """
    side_by_side = _joined(x, gate_proj, up_proj)
    if side_by_side is None:
        return down_proj((elementwise or silu_mul)(gate_proj(x), up_proj(x)))
    if elementwise is None:
        return down_proj(silu_mul_side_by_side(side_by_side))
    return down_proj(elementwise(*side_by_side.chunk(2, dim=-1)))


# --- attention -------------------------------------------------------------------------------------------------------


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None, kernel: SDPBackend | None = None
) -> Tensor:
    """Scaled dot-product attention; each key-value head serves H / H_kv query heads (arXiv 2305.13245).

    q: (B, H, T, d); k, v: (B, H_kv, S, d). causal: query t sees keys 0..t, which needs S = T. mask: (B, 1, T, S) bool, what is
    seen, instead of `causal`. kernel: the one to use, and no other: RuntimeError where it cannot; None: PyTorch's choice.
    Returns (B, H, T, d).
    """
    assert not causal or q.shape[2] == k.shape[2], "a causal mask is aligned to the first key"
    shared = q.shape[1] != k.shape[1]
    if shared and kernel is SDPBackend.EFFICIENT_ATTENTION:  # which knows of no shared heads before torch 2.14
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        shared = False
    with nullcontext() if kernel is None else sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=shared
        )


def flex(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Any = None) -> Tensor:
    """`attention` with a mask of `flex_document_mask`: fused under torch.compile only, it skips the blocks that no one sees."""
    assert causal
    assert mask is not None
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def documents(input_ids: Tensor, eos_id: int) -> tuple[Tensor, Tensor]:
    """Which document of its sequence a token belongs to, counted from 0, and its position in it; EOS ends its document.

    input_ids: (B, T). Returns two of (B, T) int64. A document that goes on from the sequence before begins at position 0.
    """
    ends = input_ids == eos_id
    document = ends.cumsum(1) - ends.long()
    t = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    begins = F.pad(ends[:, :-1], (1, 0), value=True)
    return document, t - torch.where(begins, t, 0).cummax(1).values


def document_mask(document: Tensor) -> Tensor:
    """What each token sees: itself and what stands before it in its own document. (B, T) -> (B, 1, T, T) bool."""
    T = document.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=document.device).tril()
    return ((document[:, :, None] == document[:, None, :]) & causal)[:, None]


def flex_document_mask(document: Tensor) -> Any:
    """`document_mask` as flex_attention takes it, by blocks of 128 x 128: (B, T) -> BlockMask."""
    B, T = document.shape

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[b, query] == document[b, key])

    return create_block_mask(seen, B, None, T, T, device=document.device)


# --- cross-entropy with the output projection ------------------------------------------------------------------------

LOGITS_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
"""Memory for fp32 logits in `linear_cross_entropy`, by type of device: what a CPU's cache holds, what fills a GPU (bytes)."""


def logits_chunk(vocab_size: int, device_type: str, hidden_elements: int = 0) -> int:
    """How many tokens' logits exist at a time: a multiple of 128, which fits the tiles of a GPU's products.

    hidden_elements: N D, where the compiler keeps every chunk's part of the weight's gradient, (V, D), until the end (CUDA,
    compiled); 0 where they are added up at once. With C tokens a chunk, bf16 logits and their gradient take 4 V C bytes, the
    N / C parts 2 V D N / C: together least at C^2 = N D / 2.
    """
    chunk = max(256, LOGITS_BYTES[device_type] // (4 * vocab_size) // 128 * 128)
    return max(chunk, -(-math.isqrt(hidden_elements // 2) // 128) * 128)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Mean over the counted targets of -log softmax(hidden @ weight.T)[target], in fp32.

    hidden: (B, T, D); weight: (V, D); targets: (B, T) int64, `IGNORE_INDEX` where nothing counts. Returns a scalar in nats
    a token; NaN where no target counts. The logits, the largest tensor of a step, exist for a chunk of tokens at a time only
    (`LOGITS_BYTES`): their gradient, softmax - one_hot, is known as soon as they are, so it is used up on the spot.

    z_loss: the gradient, not the value, is that of the mean of cross-entropy + z_loss * log(sum exp logits)^2 (PaLM,
    arXiv 2204.02311, section 5).
    """
    # PyTorch 2.13 has a function of this name: its chunked path breaks a compiled graph, and it has no z-loss.
    # A function's inputs want gradients even under no_grad: it has to be told.
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total = _LinearCrossEntropy.apply(hidden.flatten(0, 1), weight, targets.flatten(), z_loss, wanted)
    return total / (targets != IGNORE_INDEX).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies, with both gradients computed along with it and kept for the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, wanted: bool) -> Tensor:
        """hidden: (N, D); weight: (V, D); targets: (N,); wanted: whether there will be a backward. Returns a fp32 scalar."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        compute = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden) if wanted else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
        keeps_parts = hidden.device.type == "cuda" and torch.compiler.is_compiling()
        chunk = logits_chunk(len(weight), hidden.device.type, hidden.numel() if keeps_parts else 0)
        for first in range(0, len(hidden), chunk):
            part = slice(first, first + chunk)
            logits = (hidden[part] @ compute.T).float()  # (chunk, V)
            counted = (targets[part] != IGNORE_INDEX)[:, None]
            index = targets[part, None].where(counted, 0)
            log_sum = logits.logsumexp(dim=-1, keepdim=True)
            # Not in place: compiled by torch 2.11, a result that was changed in place has no gradient.
            total = total + (log_sum - logits.gather(1, index)).where(counted, 0).sum()
            if d_hidden is None or d_weight is None:
                continue
            # In place. A row that does not count has log_sum = inf, so that exp makes it 0 without a pass of its own.
            d_logits = logits.sub_(log_sum.where(counted, torch.inf)).exp_()
            if z_loss:
                d_logits *= 1 + 2 * z_loss * log_sum
            d_logits = _minus_one_hot(d_logits, index, counted).to(hidden.dtype)
            d_hidden[part] = d_logits @ compute
            d_weight += d_logits.T @ hidden[part]
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        """Both gradients, times that of the sum."""
        d_hidden, d_weight = ctx.saved_tensors
        # d_total (1 / tokens) as (1, 1): PyTorch then multiplies in fp32. As a scalar it would first be rounded to bf16, by up
        # to 0.4%.
        scaled = torch.mul(d_hidden, d_total.view(1, 1), out=torch.empty_like(d_hidden))
        return scaled, (d_weight * d_total).to(ctx.weight_dtype), None, None, None


def _minus_one_hot(softmax: Tensor, index: Tensor, counted: Tensor) -> Tensor:
    """Softmax - one_hot(index) in the rows that count; softmax: (N, V); index: (N, 1) int64; counted: (N, 1) bool.

    In place; compiled, by a comparison, which Inductor does in the same pass as the exp before it.
    """
    if torch.compiler.is_compiling():
        hit = torch.arange(softmax.shape[1], device=softmax.device) == index
        return torch.where(hit & counted, softmax - 1, softmax)
    return softmax.scatter_add_(1, index, -counted.float())


# --- the set that a model computes with ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """A line of the table that says what a model computes with."""

    operation: str
    """attention, rope, ..."""
    backend: str
    """torch, torch_flash, flash_attn, xformers or liger."""
    kernel: str
    """What runs: the library's version, or PyTorch's own kernel."""
    why: str
    """Why this one."""


@dataclass(frozen=True)
class Operations:
    """The operations that a model computes with; each takes and returns what the reference of the same name does
    (`cross_entropy`: `linear_cross_entropy`).
    """

    attention: Callable[..., Tensor] = attention
    document_mask: Callable[[Tensor], Any] = document_mask
    """(B, T) documents -> the mask that `attention` takes."""
    rope: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = rope
    swiglu: Callable[[Tensor, nn.Module, nn.Module, nn.Module], Tensor] = swiglu
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    cross_entropy: Callable[..., Tensor] = linear_cross_entropy
    choices: tuple[Chosen, ...] = ()
    """How they came to be chosen."""

    def with_z_loss(self, z_loss: float) -> Operations:
        """The same, with a cross-entropy whose gradient holds the z-loss."""
        return replace(self, cross_entropy=partial(self.cross_entropy, z_loss=z_loss)) if z_loss else self

    def compiled_outside_of_layers(self) -> Operations:
        """The same, with what runs in no layer compiled by itself: for a model whose layers are compiled one by one."""
        compiled = partial(torch.compile, dynamic=False, fullgraph=True)
        return replace(self, cross_entropy=compiled(self.cross_entropy), document_mask=compiled(self.document_mask))


REFERENCE = Operations()
"""Every operation by plain PyTorch."""
