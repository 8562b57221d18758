"""Every backend that is installed against the reference, on a GPU: make test-gpu.

One that is not installed, or cannot on this chip, is named as skipped with the reason that a user would get.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from agreement import (
    ATTENTION,
    TOLERANCE,
    attention_cases,
    check,
    cross_entropy_cases,
    norm_cases,
    rope_cases,
    side_by_side_cases,
    swiglu_cases,
)

from pretrain import backends, kernels, ops, parallel
from pretrain.backends import Situation
from pretrain.sections import ModelConfig, OpsConfig, ParallelConfig

pytestmark = pytest.mark.gpu

DTYPES = list(TOLERANCE)


def here(dtype: torch.dtype, **other: object) -> Situation:
    return replace(Situation(torch.cuda.get_device_capability(), dtype, 64), **other)


def need(operation: str, backend: str, situation: Situation) -> None:
    if problem := backends.obstacle(operation, backend, situation):
        pytest.skip(f"{operation} by {backend}: {problem}")


def compiled(function: Callable) -> Callable:
    torch._dynamo.config.recompile_limit = 64  # shapes and types differ by design
    return torch.compile(function, dynamic=False, fullgraph=True)


def check_all(cases: object, dtype: torch.dtype) -> None:
    seen = 0
    for case in cases:
        check(case, dtype, "cuda")
        seen += 1
    assert seen > 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("backend", ["torch", "torch_flash", "flash_attn", "xformers"])
def test_attention(backend: str, documents: bool, dtype: torch.dtype) -> None:
    situation = here(dtype, documents=documents)
    need("attention", backend, situation)
    operations = backends.choose(ModelConfig(ops=OpsConfig(attention=backend)), situation)
    assert "math" not in operations.choices[0].kernel.lower()
    make_mask = operations.document_mask if documents else None
    cases = attention_cases(operations.attention, make_mask, "cuda")
    if "cudnn" in operations.choices[0].kernel:  # it takes no sequence of one token
        cases = (case for case in cases if " x 1 x " not in case.name)
    check_all(cases, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_flex_attention(dtype: torch.dtype) -> None:
    for case in attention_cases(compiled(ops.flex), ops.flex_document_mask, "cuda"):
        torch.compiler.reset()
        check(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("backend", ["torch", "flash_attn", "liger"])
def test_rope(backend: str, documents: bool, dtype: torch.dtype) -> None:
    """Ours compiled."""
    need("rope", backend, here(dtype, documents=documents))
    rope = {"torch": compiled(ops.rope), "flash_attn": kernels.flash_rope, "liger": kernels.liger_rope}[backend]
    check_all(rope_cases(rope, "cuda", documents), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    need("rms_norm", "liger", here(dtype))
    check_all(norm_cases(kernels.liger_rms_norm), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["xformers", "liger"])
def test_swiglu(backend: str, dtype: torch.dtype) -> None:
    need("swiglu", backend, here(dtype))
    swiglu = {"xformers": kernels.xformers_swiglu, "liger": kernels.liger_swiglu}[backend]
    check_all(swiglu_cases(swiglu), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_swiglu_side_by_side(dtype: torch.dtype) -> None:
    check_all(side_by_side_cases(compiled(ops.silu_mul_side_by_side)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["torch", "flash_attn", "liger"])
def test_cross_entropy(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours compiled, and in chunks of 256 tokens, of which the largest case has two."""
    monkeypatch.setitem(ops.LOGITS_BYTES, "cuda", 1)
    need("cross_entropy", backend, here(dtype))
    functions = {
        "torch": compiled(ops.linear_cross_entropy),
        "flash_attn": kernels.flash_cross_entropy,
        "liger": kernels.liger_cross_entropy,
    }
    check_all(cross_entropy_cases(functions[backend], "cuda"), dtype)


def test_a_kernel_that_cannot_says_so_instead_of_falling_back() -> None:
    q = torch.randn(1, 4, 64, 64, device="cuda")
    with pytest.raises(RuntimeError, match="No available kernel"):
        ops.attention(q, q, q, causal=True, kernel=torch.nn.attention.SDPBackend.FLASH_ATTENTION)  # fp32


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_compiled_model_learns_and_follows_the_eager_one(precision: str, documents: bool) -> None:
    """Whole, through `parallel.build`, with what auto chooses; no recompile after the second step."""
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    if precision == "fp8" and backends.installed("torchao") is None:
        pytest.skip(f"torchao is not installed: {backends.INSTALL['torchao']}")
    shape = ModelConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=704, num_hidden_layers=10, num_attention_heads=4
    )
    shape = replace(shape, num_key_value_heads=2, max_position_embeddings=256)
    tokens = torch.randint(3, 1024, (4, 257), generator=torch.Generator().manual_seed(1)).cuda()
    tokens[:, 20::37] = 2
    losses = {}
    for compiled in (False, True):
        torch.compiler.reset()
        settings = ParallelConfig(accelerator="cuda", strategy="single", precision=precision, compile=compiled)
        fabric, _ = parallel.launch(settings, shape, [])
        model = parallel.unwrap(
            parallel.build(fabric, shape, settings, seed=1, z_loss=1e-4, eos_id=2 if documents else None)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
        losses[compiled] = []
        for step in range(8):
            with torch._dynamo.config.patch(error_on_recompile=step >= 2):
                loss = model(tokens[:, :-1], tokens[:, 1:])
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[compiled].append(loss.item())
    assert losses[True][-1] < losses[True][0] - 0.3
    assert losses[True] == pytest.approx(losses[False], abs=0.1 if precision == "fp8" else 0.03)


def test_the_cases_are_odd_enough() -> None:
    assert {d for *_, d in ATTENTION} == {64, 80, 128}
    assert any(H_kv == 1 < H for _, H, H_kv, *_ in ATTENTION)
    assert any(H_kv == H for _, H, H_kv, *_ in ATTENTION)
    assert any(B == 1 and T % 2 for B, _, _, T, _ in ATTENTION)
