"""Each operation against its definition, written with torch's plainest parts in float64."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from pretrain import ops, parallel


def plain_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=ops.IGNORE_INDEX)


@pytest.mark.parametrize("chunk_rows", [256, 10_000])
@pytest.mark.parametrize(("B", "T", "D", "V"), [(3, 301, 24, 515), (1, 1, 8, 3), (2, 256, 16, 1000), (1, 257, 8, 64)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_linear_cross_entropy_is_the_plain_one(
    monkeypatch: pytest.MonkeyPatch,
    chunk_rows: int,
    B: int,
    T: int,
    D: int,
    V: int,
    dtype: torch.dtype,
    tolerance: float,
    z_loss: float,
) -> None:
    monkeypatch.setitem(ops.LOGITS_BYTES, "cpu", chunk_rows * 4 * V)
    generator = torch.Generator().manual_seed(B * T + V)
    hidden = torch.randn(B, T, D, generator=generator).to(dtype)
    weight = torch.randn(V, D, generator=generator)
    targets = torch.randint(0, V, (B, T), generator=generator)
    if T > 1:
        targets[torch.rand(B, T, generator=generator) < 0.3] = ops.IGNORE_INDEX
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    reference = [hidden.double().requires_grad_(), weight.to(dtype).double().requires_grad_()]
    loss, expected = ops.linear_cross_entropy(*ours, targets, z_loss), plain_cross_entropy(*reference, targets)
    log_sum = (reference[0] @ reference[1].T).logsumexp(-1)[targets != ops.IGNORE_INDEX]
    (3 * loss).backward()
    (3 * (expected + z_loss * log_sum.square().mean())).backward()  # the value stays the cross-entropy alone
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for mine, theirs in zip(ours, reference):
        assert mine.grad.dtype == mine.dtype
        error = (mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < tolerance


def test_linear_cross_entropy_s_mean_is_that_of_all_tokens_in_bf16() -> None:
    """Over 192 of them, where 1/192 is 0.2% off in bf16: 192 times the mean's gradients are the sum's, on the whole."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((4, 48, 64), (300, 64)))
    targets = torch.randint(300, (4, 48), generator=generator)
    found = []
    for times in (1, 192):
        tensors = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        (times * ops.linear_cross_entropy(*tensors, targets)).backward()
        found.append([tensor.grad.float() for tensor in tensors])
    for mean, whole in zip(*found):
        assert 192 * (mean * whole).sum() / whole.square().sum() == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_compiled_in_chunks_is_that_in_one_piece(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four chunks, the last one short; a compiler adds up the weight's gradient as it likes."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(2, 450, 24, generator=generator).to(dtype), torch.randn(321, 24, generator=generator)
    targets = torch.randint(0, 321, (2, 450), generator=generator)
    targets[:, ::7] = ops.IGNORE_INDEX
    found = []
    for chunk_rows, compiled in ((10_000, False), (256, True)):
        monkeypatch.setitem(ops.LOGITS_BYTES, "cpu", chunk_rows * 4 * 321)
        function = torch.compile(ops.linear_cross_entropy, fullgraph=True) if compiled else ops.linear_cross_entropy
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = function(*inputs, targets, 1e-2)
        (3 * loss).backward()
        found.append((loss.detach(), *(x.grad for x in inputs)))
    for whole, chunked in zip(*found):
        assert whole.norm() > 0
        assert (chunked - whole).norm() <= (1e-6 if dtype is torch.float32 else 5e-3) * whole.norm()


def test_linear_cross_entropy_without_gradient_is_the_same() -> None:
    hidden, weight = torch.randn(2, 40, 8), torch.randn(30, 8)
    targets = torch.randint(0, 30, (2, 40))
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        loss = ops.linear_cross_entropy(hidden, weight, targets)
    assert counted.get_total_flops() == 2 * 80 * 8 * 30, "the logits, and no gradients"
    torch.testing.assert_close(loss, plain_cross_entropy(hidden, weight, targets))
    assert ops.linear_cross_entropy(hidden, weight, torch.full_like(targets, ops.IGNORE_INDEX)).isnan()


def test_linear_cross_entropy_of_large_logits_does_not_overflow() -> None:
    hidden = torch.full((1, 3, 4), 100.0, requires_grad=True)
    weight = torch.tensor([[1.0] * 4, [2.0] * 4, [-1.0] * 4])
    loss = ops.linear_cross_entropy(hidden, weight, torch.tensor([[0, 1, 2]]))
    loss.backward()
    assert loss.item() == pytest.approx((400 + 0 + 1200) / 3)
    assert hidden.grad.isfinite().all()


def test_rope_turns_scores_into_functions_of_the_distance() -> None:
    """What the rotation is for: q at m and k at n score by m - n alone; and it keeps lengths."""
    rope = ops.rope_table(50, 16, 10000.0, torch.device("cpu"))
    q, k = torch.randn(16, generator=torch.Generator().manual_seed(0)), torch.randn(16)
    q = ops.apply_rope(q.expand(1, 1, 50, 16), rope)[0, 0]
    k = ops.apply_rope(k.expand(1, 1, 50, 16), rope)[0, 0]
    scores = q @ k.T
    for distance in range(-10, 11):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert scores.diagonal(1)[0] != pytest.approx(scores.diagonal(7)[0].item(), abs=1e-3)
    torch.testing.assert_close(q.norm(dim=-1), q.norm(dim=-1)[:1].expand(50), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("H_kv", [1, 2, 6])
def test_attention_is_causal_and_shares_heads(H_kv: int) -> None:
    B, H, T, d = 2, 6, 9, 8
    generator = torch.Generator().manual_seed(H_kv)
    q = torch.randn(B, H, T, d, generator=generator)
    k, v = (torch.randn(B, H_kv, T, d, generator=generator) for _ in "kv")
    scores = q @ k.repeat_interleave(H // H_kv, 1).transpose(-1, -2) / math.sqrt(d)
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    expected = scores.softmax(-1) @ v.repeat_interleave(H // H_kv, 1)
    torch.testing.assert_close(ops.attention(q, k, v, causal=True), expected, atol=1e-5, rtol=1e-5)
    last = ops.attention(q[:, :, -1:], k, v, causal=False)
    torch.testing.assert_close(last, expected[:, :, -1:], atol=1e-5, rtol=1e-5)


def test_documents_end_with_eos_and_positions_start_anew() -> None:
    input_ids = torch.tensor([[5, 2, 7, 7, 2, 2, 9], [2, 5, 5, 5, 5, 5, 5], [5, 5, 5, 5, 5, 5, 2]])
    document, position = ops.documents(input_ids, eos_id=2)
    assert document.tolist() == [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]]
    assert position.tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6]]
    seen = ops.document_mask(document)
    assert seen.shape == (3, 1, 7, 7)
    assert seen[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("T", [150, 256])
def test_flex_attention_sees_what_the_mask_shows(T: int) -> None:
    """Forward only: flex_attention has no backward on a CPU; tests/test_ops_gpu.py has the gradient."""
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, heads, T, 16, generator=generator) for heads in (4, 2, 2))
    document = torch.randint(0, 2, (2, T), generator=generator).mul(torch.arange(T) % 40 == 0).cumsum(1)
    expected = ops.attention(q, k, v, causal=True, mask=ops.document_mask(document))
    assert not torch.allclose(expected, ops.attention(q, k, v, causal=True))
    torch.testing.assert_close(ops.flex(q, k, v, causal=True, mask=ops.flex_document_mask(document)), expected)


def test_rms_norm_and_swiglu_are_their_formulas() -> None:
    x, w = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)), torch.randn(7)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w
    torch.testing.assert_close(ops.rms_norm(x, w, 1e-5), expected)
    assert ops.rms_norm(x.bfloat16(), w, 1e-5).dtype == torch.bfloat16
    torch.testing.assert_close(ops.silu_mul(x, x + 1), x * torch.sigmoid(x) * (x + 1))


@pytest.mark.parametrize(
    ("weights", "x", "compiled", "products"),
    [
        (torch.float32, torch.bfloat16, True, 1),
        (torch.float32, torch.bfloat16, False, 3),
        (torch.bfloat16, torch.bfloat16, True, 3),
        (torch.float32, torch.float32, True, 3),
    ],
)
def test_products_of_one_input_are_one_where_that_costs_no_copy(
    weights: torch.dtype, x: torch.dtype, compiled: bool, products: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    layers = [ops.Linear(24, width).to(weights) for width in (24, 8, 16)]
    data = torch.randn(2, 5, 24, generator=generator).to(x)
    counted = 0

    def count(graph: torch.fx.GraphModule, _: object) -> Callable:
        nonlocal counted
        counted += sum("linear" in str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    results = []
    for together in (True, False):
        function = (lambda x: ops.linears(x, *layers)) if together else (lambda x: [layer(x) for layer in layers])
        if compiled:
            torch._dynamo.reset()
            function = torch.compile(function, backend=count, fullgraph=True)
        inputs = data.clone().requires_grad_()
        outputs = function(inputs)
        sum(y.square().sum() for y in outputs).backward()
        results.append([*outputs, inputs.grad, *(layer.weight.grad for layer in layers)])
        for layer in layers:
            layer.weight.grad = None
    for ours, plain in zip(*results):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2 if x is torch.bfloat16 else 1e-6)
    assert counted == (products + 3 if compiled else 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_swiglu_of_gate_and_up_side_by_side(dtype: torch.dtype) -> None:
    """The same value; its own backward is off by no more than the rounding of its result."""
    generator = torch.Generator().manual_seed(2)
    both = (3 * torch.randn(4, 5, 2 * 24, generator=generator)).to(dtype).requires_grad_()
    d_out = torch.randn(4, 5, 24, generator=generator).to(dtype)
    out = ops.silu_mul_side_by_side(both)
    assert torch.equal(out, ops.silu_mul(*both.chunk(2, dim=-1)))
    out.backward(d_out)
    exact = both.detach().double().requires_grad_()
    ops.silu_mul(*exact.chunk(2, dim=-1)).backward(d_out.double())
    assert both.grad is not None
    assert both.grad.dtype == dtype
    torch.testing.assert_close(both.grad.double(), exact.grad, rtol=max(torch.finfo(dtype).eps, 1e-6), atol=1e-5)


@pytest.mark.parametrize("again", [False, True])
def test_the_compiled_block_of_swiglu_is_the_eager_one(again: bool) -> None:
    """By one product and by a backward of its own, which the eager one does not have."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    layers = [ops.Linear(16, 40), ops.Linear(16, 40), ops.Linear(40, 16)]
    data, results = torch.randn(2, 9, 16).bfloat16(), []
    whole = partial(ops.swiglu, elementwise=parallel._again(ops.silu_mul)) if again else ops.swiglu
    for block in (ops.swiglu, torch.compile(lambda *args: whole(*args), fullgraph=True)):
        x = data.clone().requires_grad_()
        out = block(x, *layers)
        out.float().square().sum().backward()
        results.append([out, x.grad, *(layer.weight.grad for layer in layers)])
        for layer in layers:
            layer.weight.grad = None
    for eager, compiled in zip(*results):
        difference = (eager - compiled).norm() / eager.norm()
        assert difference < 0.01
