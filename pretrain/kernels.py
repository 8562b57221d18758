"""The operations of `pretrain.ops` by other libraries: the same arguments, the same results up to rounding.

Each library is imported where it is used: none has to be there. `backends` knows what each can do and chooses.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.ops import IGNORE_INDEX

# --- flash_attn: FlashAttention-2 (arXiv 2307.08691), CUDA; rotary embedding and cross-entropy in Triton --------------


def flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Any = None) -> Tensor:
    """`ops.attention`; mask: of `flash_document_mask`."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    same = torch.are_deterministic_algorithms_enabled()  # it would not ask, and its backward adds atomically
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, T, heads, d)
    if mask is None:
        return flash_attn_func(q, k, v, causal=causal, deterministic=same).transpose(1, 2)
    starts, longest = mask
    q_, k_, v_ = (x.flatten(0, 1) for x in (q, k, v))  # (B * T, heads, d)
    out = flash_attn_varlen_func(q_, k_, v_, starts, starts, longest, longest, causal=True, deterministic=same)
    return out.view(q.shape).transpose(1, 2)


def flash_document_mask(document: Tensor) -> tuple[Tensor, int]:
    """Where documents start among the B * T tokens, and B * T (int32); and T, which no document exceeds. Waits for the device."""
    return F.pad(_starts(document), (0, 1), value=document.numel()).int(), document.shape[1]


def flash_rope(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.rope`, for the same positions in every sequence."""
    from flash_attn.layers.rotary import apply_rotary_emb

    cos, sin = table[..., : q.shape[-1] // 2].to(q.dtype)  # (T, d / 2) each
    rotated = [apply_rotary_emb(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k)]
    return rotated[0], rotated[1]


def flash_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """`ops.linear_cross_entropy`; holds all logits, and their gradient takes their place."""
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    logits = F.linear(hidden.flatten(0, 1), weight.to(hidden.dtype))
    losses, z_losses = cross_entropy_loss(
        logits, targets.flatten(), lse_square_scale=z_loss, ignore_index=IGNORE_INDEX, inplace_backward=True
    )
    # `losses` holds the z-loss; the value is to be the cross-entropy alone.
    return (losses - z_losses.detach()).sum() / (targets != IGNORE_INDEX).sum()


# --- xformers: attention by FlashAttention or CUTLASS; the fused SwiGLU of its versions before 0.0.34 -----------------


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Any = None, *, causal_mask: Any) -> Tensor:
    """`ops.attention`; mask: of `xformers_document_mask`; causal_mask: of `xformers_causal_mask`."""
    from xformers.ops import memory_efficient_attention

    if k.shape[1] != q.shape[1]:  # its layout for shared heads has no backward
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, T, H, d)
    if mask is None:
        return memory_efficient_attention(q, k, v, attn_bias=causal_mask if causal else None).transpose(1, 2)
    flat = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))  # (1, B * T, H, d)
    return memory_efficient_attention(*flat, attn_bias=mask).view(q.shape).transpose(1, 2)


def xformers_causal_mask() -> Any:
    """Made beforehand: a compiler cannot follow how."""
    from xformers.ops import LowerTriangularMask

    return LowerTriangularMask()


def xformers_document_mask(document: Tensor) -> Any:
    """The block-diagonal causal mask of B * T tokens. Waits for the device."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    lengths = F.pad(_starts(document), (0, 1), value=document.numel()).diff()
    return BlockDiagonalCausalMask.from_seqlens(lengths.tolist())


def xformers_swiglu(x: Tensor, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> Tensor:
    """`ops.swiglu` in one."""
    from xformers.ops import swiglu

    w1, w2, w3 = (layer.weight.to(x.dtype) for layer in (gate_proj, up_proj, down_proj))  # type: ignore[operator]
    return swiglu(x, w1, None, w2, None, w3, None)


# --- liger: Triton ----------------------------------------------------------------------------------------------------


def liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm`."""
    from liger_kernel.ops import LigerRMSNormFunction

    # Not in place: the gradient of its result belongs to the residual stream too.
    return LigerRMSNormFunction.apply(x, weight.to(x.dtype), eps, 0.0, "gemma", False)


def liger_rope(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.rope`."""
    from liger_kernel.ops import LigerRopeFunction

    cos, sin = table if table.ndim == 4 else table[:, None]  # (1 or B, T, d) each
    return LigerRopeFunction.apply(q, k, cos, sin)


def liger_swiglu(x: Tensor, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> Tensor:
    """`ops.swiglu`, the elementwise part fused."""
    from liger_kernel.ops import LigerSiLUMulFunction

    return down_proj(LigerSiLUMulFunction.apply(gate_proj(x), up_proj(x)))


def liger_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """`ops.linear_cross_entropy`; it too holds a chunk of logits at a time. Waits for the device once."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    loss, z, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        hidden.flatten(0, 1),
        weight.to(hidden.dtype),
        targets.flatten(),
        None,  # bias
        None,  # weight of each class
        IGNORE_INDEX,
        z_loss,
        0.0,  # label smoothing
        "mean",
        None,  # softcap
        True,  # return the z-loss
        torch.float32,  # type that the weight's gradient is summed in
    )
    return loss - z.detach()


def _starts(document: Tensor) -> Tensor:
    """Indices of the first tokens of documents in the B * T tokens; every sequence begins one. Waits for the device."""
    begins = F.pad(document[:, 1:] != document[:, :-1], (1, 0), value=True)
    return begins.flatten().nonzero().flatten()
