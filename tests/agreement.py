"""Cases on which a library's operation must agree with the reference of `pretrain.ops`, in value and gradient.

Run as a script, the ones that run in Triton's interpreter are checked on the CPU (TRITON_INTERPRET=1).
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain import kernels, ops

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest relative error of a value or a gradient, as a norm, against the reference in fp32."""

ATTENTION = [(2, 4, 2, 128, 64), (1, 6, 1, 77, 80), (3, 4, 4, 200, 128), (1, 32, 4, 333, 64), (2, 2, 2, 1, 64)]
"""B, H, H_kv, T, d."""

ROWS = [(2, 13, 48), (1, 1, 64), (3, 77, 2048), (1, 300, 1000)]
"""B, T, D."""

LOGITS = [(2, 13, 16, 50), (1, 301, 64, 515), (3, 64, 128, 4096), (1, 1, 16, 3)]
"""B, T, D, V."""


@dataclass
class Case:
    """A function, its reference, and what both get."""

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: list[Tensor]


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    """Raise AssertionError where values or gradients of `function` in `dtype` are not the reference's."""
    rounded = [x.to(dtype) for x in case.inputs]
    mine = [x.to(device).clone().requires_grad_() for x in rounded]  # clones: some kernels write into what they get
    theirs = [x.to(device).float().clone().requires_grad_() for x in rounded]
    got, expected = (_tuple(f(*x)) for f, x in ((case.function, mine), (case.reference, theirs)))
    generator = torch.Generator().manual_seed(9)
    upstream = [torch.randn(out.shape, generator=generator).to(device) for out in expected]
    torch.autograd.backward(got, [g.to(out.dtype).clone() for g, out in zip(upstream, got)])
    torch.autograd.backward(expected, upstream)
    upstream_norm = sum(g.norm() ** 2 for g in upstream) ** 0.5
    pairs = [("value", a.detach(), b.detach()) for a, b in zip(got, expected)]
    pairs += [(f"gradient {i}", a.grad, b.grad) for i, (a, b) in enumerate(zip(mine, theirs))]
    for what, a, b in pairs:
        assert a is not None, f"{case.name}: {what} is missing"
        scale = b.norm() if b.any() else upstream_norm  # with one key there is nothing to choose, and no gradient of it
        error = (a.float() - b).norm() / scale
        assert error < TOLERANCE[dtype], f"{case.name} in {dtype}: relative error of {what} {error:.2e}"


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def documents(B: int, T: int, device: str) -> tuple[Tensor, Tensor]:
    """Documents and positions of random sequences, one of them with a document of one token."""
    input_ids = torch.randint(0, 30, (B, T), generator=torch.Generator().manual_seed(T))
    input_ids[0, :2] = 2
    document, position = ops.documents(input_ids, 2)
    return document.to(device), position.to(device)


def attention_cases(attention: Callable[..., Tensor], make_mask: Callable | None, device: str) -> Iterator[Case]:
    """Whole sequences, and documents where `make_mask` is given."""
    for B, H, H_kv, T, d in ATTENTION:
        # As a model has them: views of (B, T, heads * d).
        inputs = [_random(i, B, T, heads, d).transpose(1, 2) for i, heads in enumerate((H, H_kv, H_kv))]
        shape = f"{B} x {H}/{H_kv} x {T} x {d}"
        if make_mask is None:
            yield Case(f"attention {shape}", lambda *x: attention(*x, causal=True), plain, inputs)
            continue
        document, _ = documents(B, T, device)
        mask, seen = make_mask(document), ops.document_mask(document)
        yield Case(
            f"attention within documents {shape}",
            lambda *x, mask=mask: attention(*x, causal=True, mask=mask),
            lambda *x, seen=seen: plain(*x, mask=seen),
            inputs,
        )


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention by its definition, all scores at once."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    T = q.shape[2]
    seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril() if mask is None else mask
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


def rope_cases(rope: Callable[..., Any], device: str, in_documents: bool) -> Iterator[Case]:
    """The same positions for all, or those of documents."""
    for B, H, H_kv, T, d in ATTENTION:
        table = ops.rope_table(T, d, 10000.0, torch.device(device))
        if in_documents:
            table = table[:, documents(B, T, device)[1]]
        inputs = [_random(i, B, T, heads, d).transpose(1, 2) for i, heads in enumerate((H, H_kv))]
        name = f"rope {B} x {H}/{H_kv} x {T} x {d}"
        yield Case(name, lambda *x, t=table: rope(*x, t), lambda *x, t=table: ops.rope(*x, t), inputs)


def norm_cases(rms_norm: Callable[..., Tensor]) -> Iterator[Case]:
    for B, T, D in ROWS:
        inputs = [_random(1, B, T, D), 1 + 0.3 * _random(2, D)]
        yield Case(
            f"rms_norm {B} x {T} x {D}", lambda *x: rms_norm(*x, 1e-5), lambda *x: ops.rms_norm(*x, 1e-5), inputs
        )


class Product(nn.Module):
    """A linear layer whose weight is an input of the test."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def swiglu_cases(swiglu: Callable[..., Tensor]) -> Iterator[Case]:
    for B, T, D in ROWS[:3]:
        weights = [_random(2, D + 16, D) / D**0.5, _random(3, D + 16, D) / D**0.5, _random(4, D, D + 16) / D**0.5]
        inputs = [_random(1, B, T, D), *weights]
        name = f"swiglu {B} x {T} x {D}"
        yield Case(
            name, lambda x, *w: swiglu(x, *map(Product, w)), lambda x, *w: ops.swiglu(x, *map(Product, w)), inputs
        )


def side_by_side_cases(silu_mul: Callable[[Tensor], Tensor]) -> Iterator[Case]:
    """`ops.silu_mul` of gate and up in one tensor."""
    for B, T, D in ROWS:
        yield Case(
            f"silu_mul {B} x {T} x 2 {D}",
            silu_mul,
            lambda x: ops.silu_mul(*x.chunk(2, dim=-1)),
            [_random(1, B, T, 2 * D)],
        )


def cross_entropy_cases(cross_entropy: Callable[..., Tensor], device: str) -> Iterator[Case]:
    """With and without z-loss; some targets do not count."""
    for B, T, D, V in LOGITS:
        generator = torch.Generator().manual_seed(T)
        targets = torch.randint(0, V, (B, T), generator=generator)
        targets[torch.rand(B, T, generator=generator) < 0.3] = ops.IGNORE_INDEX
        targets[0, 0] = 1
        targets = targets.to(device)
        inputs = [_random(1, B, T, D), _random(2, V, D) / D**0.5]
        for z_loss in (0.0, 1e-2):
            yield Case(
                f"cross_entropy {B} x {T} x {D} x {V}, z-loss {z_loss}",
                lambda *x, t=targets, z=z_loss: cross_entropy(*x, t, z_loss=z),
                lambda *x, t=targets, z=z_loss: ops.linear_cross_entropy(*x, t, z_loss=z),
                inputs,
            )


def main() -> int:
    """Liger's rope and cross-entropy in Triton's interpreter; its norm and SwiGLU do not run there (triton 3.7)."""
    checked = 0
    small = ("1 x 6/1 x 77 x 80", "2 x 2/2 x 1 x 64", "2 x 13 x 16 x 50", "1 x 1 x 16 x 3")  # it is slow
    for dtype in TOLERANCE:
        cases = [*rope_cases(kernels.liger_rope, "cpu", False), *rope_cases(kernels.liger_rope, "cpu", True)]
        for case in [*cases, *cross_entropy_cases(kernels.liger_cross_entropy, "cpu")]:
            if any(shape in case.name for shape in small):
                check(case, dtype, "cpu")
                checked += 1
    print(f"{checked} cases agree")
    return 0


if __name__ == "__main__":
    sys.exit(main())
