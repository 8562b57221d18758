"""The five operations that decide the speed of a Llama, each a plain function of tensors.

    hidden -> rms_norm -> q, k, v -> apply_rope -> attention -> + -> rms_norm -> swiglu -> + ... -> linear_cross_entropy

These are the reference: plain PyTorch, written so that torch.compile fuses them well.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""A target that does not count (PyTorch's and Hugging Face's convention)."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (arXiv 1910.07467, eq. 4).

    x: (..., D), any float type; weight: (D,). The result has x's type.
    """
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def rope_table(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Cosines and sines of the rotary embedding (arXiv 2104.09864, eq. 34), fp32.

    Returns (2, length, head_dim): [0] cosines, [1] sines, for feature j the angle position * theta^(-2 (j mod d/2) / d).
    """
    inv_freq = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), inv_freq)
    angle = torch.cat((angle, angle), dim=-1)
    return torch.stack((angle.cos(), angle.sin()))


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate pairs (j, j + d/2) of every head by its position's angle; Hugging Face's layout of a head.

    x: (B, H, T, d); rope: (2, T, d) from `rope_table`. The result has x's type.
    """
    cos, sin = rope[0].to(x.dtype), rope[1].to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Scaled dot-product attention; each key-value head serves H / H_kv query heads (arXiv 2305.13245).

    q: (B, H, T, d); k, v: (B, H_kv, S, d). causal: query t sees keys 0..t, which needs S = T. Returns (B, H, T, d).
    """
    assert not causal or q.shape[2] == k.shape[2], "a causal mask is aligned to the first key"
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, elementwise (arXiv 2002.05202, eq. 6)."""
    return F.silu(gate) * up


LOGITS_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
"""Memory for fp32 logits in `linear_cross_entropy`, by type of device: what a CPU's cache holds, what fills a GPU (bytes)."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean over the counted targets of -log softmax(hidden @ weight.T)[target], in fp32.

    hidden: (B, T, D); weight: (V, D); targets: (B, T) int64, `IGNORE_INDEX` where nothing counts. Returns a scalar in nats
    a token; NaN where no target counts. The logits, the largest tensor of a step, exist for a chunk of tokens at a time only
    (`LOGITS_BYTES`): their gradient, softmax - one_hot, is known as soon as they are, so it is used up on the spot.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # which F.linear would follow by itself
        hidden = hidden.to(torch.get_autocast_dtype(device))
    total = _LinearCrossEntropy.apply(hidden.flatten(0, 1), weight, targets.flatten())
    return total / (targets != IGNORE_INDEX).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies, with both gradients computed along with it and kept for the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """hidden: (N, D); weight: (V, D); targets: (N,). Returns a fp32 scalar."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        compute = weight.to(hidden.dtype)
        wanted = any(ctx.needs_input_grad)
        d_hidden = torch.empty_like(hidden) if wanted else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
        chunk = max(256, LOGITS_BYTES[hidden.device.type] // (4 * len(weight)))
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, len(hidden), chunk):
                part = slice(first, first + chunk)
                logits = (hidden[part] @ compute.T).float()  # (chunk, V)
                counted = (targets[part] != IGNORE_INDEX)[:, None]
                index = targets[part, None].where(counted, 0)
                log_sum = logits.logsumexp(dim=-1, keepdim=True)
                total += (log_sum - logits.gather(1, index)).where(counted, 0).sum()
                if d_hidden is None or d_weight is None:
                    continue
                # In place, and without a pass for what does not count: exp(logit - inf) is 0.
                d_logits = logits.sub_(log_sum.where(counted, torch.inf)).exp_()
                d_logits = d_logits.scatter_add_(1, index, -counted.float()).to(hidden.dtype)
                d_hidden[part] = d_logits @ compute
                d_weight += d_logits.T @ hidden[part]
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        """Both gradients, times that of the sum."""
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_total.to(d_hidden.dtype), (d_weight * d_total).to(ctx.weight_dtype), None
