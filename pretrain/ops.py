"""The five operations that decide the speed of a Llama, each a plain function of tensors.

    hidden -> rms_norm -> q, k, v -> apply_rope -> attention -> + -> rms_norm -> swiglu -> + ... -> linear_cross_entropy

These are the reference: plain PyTorch, written so that torch.compile fuses them well.
"""

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
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, elementwise (arXiv 2002.05202, eq. 6)."""
    return F.silu(gate) * up


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean over the counted targets of -log softmax(hidden @ weight.T)[target], in fp32.

    hidden: (B, T, D); weight: (V, D); targets: (B, T) int64, `IGNORE_INDEX` where nothing counts. Returns a scalar in nats
    a token; NaN where no target counts.
    """
    logits = F.linear(hidden, weight)  # (B, T, V): the largest tensor of the step
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX)
