"""Who computes what on which chip: chosen with a reason, or refused with the remedy; nothing is taken in silence."""

import dataclasses
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, write_config
from torch.nn.attention import SDPBackend

from pretrain import backends, config, preparation, trainer
from pretrain.backends import Situation, _reasons, decide, obstacle, sdpa_order
from pretrain.sections import ModelConfig, OpsConfig

A100, H100, T4 = (8, 0), (9, 0), (7, 5)
EVERYTHING = {"flash_attn": "2.8.3", "xformers": "0.0.33.post2", "liger": "0.8.5", "torchao": "0.18.0"}


XFORMERS_SAYS = """No operator found for `memory_efficient_attention_backward` with inputs:
     query       : shape=(1, 128, 32, 264) (torch.bfloat16)
     p           : 0.0
`fa3B@0.0.0` is not supported because:
    requires device with capability > (9, 0) but your GPU has capability (8, 0) (too old)
    max(query.shape[-1], value.shape[-1]) > 256
`fa2B@2.8.3` is not supported because:
    max(query.shape[-1], value.shape[-1]) > 256"""
"""How a refusal of its reads."""


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What counts as installed; a test takes out of it, or changes it."""
    found: dict[str, str | None] = dict(EVERYTHING)
    monkeypatch.setattr(backends, "installed", found.get)
    monkeypatch.setattr(backends, "unloadable", lambda backend: None)
    return found


def on(capability: tuple[int, int] | None, **other: object) -> Situation:
    situation = Situation(capability, torch.bfloat16, 64)
    return dataclasses.replace(situation, **other)


def chosen(situation: Situation, **asked: str) -> dict[str, str]:
    return {choice.operation: choice.backend for choice in decide(OpsConfig(**asked), situation)}


TORCH = dict.fromkeys(("attention", "rope", "swiglu", "rms_norm", "cross_entropy"), "torch")
LIGER = {**TORCH, "rope": "liger", "swiglu": "liger", "rms_norm": "liger"}


def test_auto_takes_the_fastest_that_is_there(versions: dict) -> None:
    assert chosen(on(None)) == TORCH
    for chip in (A100, H100):
        assert chosen(on(chip, compiled=True)) == TORCH
        assert chosen(on(chip)) == LIGER
        assert chosen(on(chip, documents=True)) == {**LIGER, "attention": "flash_attn"}
        assert chosen(on(chip, documents=True, compiled=True)) == TORCH
        versions["flash_attn"] = None
        assert chosen(on(chip, documents=True)) == {**LIGER, "attention": "xformers"}
        versions["flash_attn"] = "2.8.3"
    assert chosen(on(A100, documents=True, dtype=torch.float32))["attention"] == "xformers"
    versions["liger"] = None
    assert chosen(on(A100)) == {**TORCH, "rope": "flash_attn", "swiglu": "xformers"}
    versions["liger"] = "0.8.5"
    assert chosen(on(T4)) == TORCH
    versions.clear()
    assert chosen(on(A100)) == TORCH
    why = {choice.operation: choice.why for choice in decide(OpsConfig(), on(A100))}
    assert "liger-kernel is not installed: pip install" in why["rms_norm"]


def test_a_gpu_never_gets_attention_that_holds_all_scores() -> None:
    flash, cudnn, efficient = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
    assert sdpa_order(on(H100), 91900) == (cudnn, flash, efficient)
    assert sdpa_order(on(H100), 91500) == (flash, efficient), "its backward reads beyond its memory"
    assert sdpa_order(on((12, 0)), 91900) == (flash, efficient)
    assert sdpa_order(on(A100), 91900) == (flash, efficient)
    for chip in (T4, A100, H100):
        assert sdpa_order(on(chip, dtype=torch.float32), 91900) == (efficient,)
        for documents in (False, True):
            assert SDPBackend.MATH not in sdpa_order(on(chip, documents=documents), 91900)


@pytest.mark.parametrize(
    ("operation", "backend", "situation", "version", "problem"),
    [
        ("attention", "flash_attn", on(None), "2.8.3", "needs a CUDA device, .*: set model.ops.attention to auto or torch$"),
        ("rope", "liger", on(None), None, r"set model.ops.rope to auto or torch; on a GPU it needs .*: pip install .*\.\[gpu\]"),
        ("attention", "flash_attn", on(A100), None, r"flash-attn is not installed: pip install .*\.\[flash-attn\]"),
        ("rms_norm", "liger", on(A100), None, r"liger-kernel is not installed: pip install .*\.\[gpu\]"),
        ("attention", "xformers", on(A100), None, "xformers is not installed: pip install"),
        ("attention", "flash_attn", on(T4), "2.8.3", "needs compute capability 8.0 or later, and this GPU has 7.5"),
        ("attention", "flash_attn", on(A100, dtype=torch.float32), "2.8.3", "bf16, not in fp32: set parallel.precision"),
        ("attention", "flash_attn", on(A100, head_dim=257), "2.8.3", "up to 256 features, .* this model has 257"),
        ("attention", "flash_attn", on(A100, documents=True, compiled=True), "2.8.3", "breaks a compiled graph: use torch"),
        ("rope", "flash_attn", on(A100, documents=True), "2.8.3", "not with data.intra_document"),
        ("swiglu", "xformers", on(A100), "0.0.34", "no fused SwiGLU any more; the last that has is 0.0.33.post2"),
        ("swiglu", "xformers", on(A100, float8=True), "0.0.33.post2", "not in float8"),
        ("attention", "xformers", on(A100, compiled=True, deterministic=True), "0.0.35", "parallel.compile false"),
        ("cross_entropy", "liger", on(A100, compiled=True), "0.8.5", "parallel.compile false"),
        ("cross_entropy", "flash_attn", on(A100, compiled=True), "2.8.3", "parallel.compile false"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_an_error_with_the_remedy(
    versions: dict, operation: str, backend: str, situation: Situation, version: str | None, problem: str
) -> None:
    versions[backend] = version
    with pytest.raises(ValueError, match=f"model.ops.{operation} is {backend}: .*{problem}"):
        chosen(situation, **{operation: backend})


LIBRARIES = {
    "flash_attn": "import torch\nimport flash_attn_2_cuda",
    "xformers": "_has_cpp_library = False",
    "liger_kernel": "",
}
"""Modules as they are where flash-attn and xformers were compiled for another PyTorch."""


@pytest.fixture
def compiled_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = {name: sys.modules.pop(name, None) for name in LIBRARIES}
    for name, text in LIBRARIES.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "flash_attn_2_cuda.py").write_text("raise ImportError('undefined symbol: _ZN3c104cuda\\nand so on')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(backends, "unloadable", backends.unloadable.__wrapped__)
    monkeypatch.setattr(backends, "version", lambda package: "9.9")
    yield
    for name, module in before.items():
        sys.modules.pop(name, None)
        sys.modules.update({name: module} if module else {})


def test_what_was_compiled_for_another_pytorch_is_refused(compiled_for_another: None) -> None:
    for backend, problem in (("flash_attn", "undefined symbol: _ZN3c104cuda"), ("xformers", "cannot be loaded")):
        said = obstacle("attention", backend, on(A100))
        assert said is not None
        assert f"9.9 was not compiled for PyTorch {torch.__version__}" in said
        assert problem in said
        assert "pip install" in said
        assert "\n" not in said
    assert obstacle("rms_norm", "liger", on(A100)) is None
    (attention, *_) = decide(OpsConfig(), on(A100, documents=True))
    assert attention.backend == "torch"
    assert "not flash_attn: flash-attn 9.9 was not compiled" in attention.why


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            torch.AcceleratorError("CUDA error: no kernel image is available\nCompile with TORCH_USE_CUDA_DSA"),
            "CUDA error: no .*",
        ),
        (NotImplementedError(XFORMERS_SAYS), "requires device with capability > .*; max\\(.*\\) > 256"),
    ],
)
def test_an_attention_that_fails_on_this_gpu_is_refused_before_the_first_step(
    versions: dict, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    def fails(*_: object, **__: object) -> torch.Tensor:
        raise error

    on_cpu = {"device": "cpu", "requires_grad": True}
    randn = torch.randn
    monkeypatch.setattr(backends.torch, "randn", lambda *shape, **_: randn(*shape, **on_cpu))
    monkeypatch.setitem(backends._MADE, ("attention", "flash_attn"), {"attention": fails, "document_mask": fails})
    with pytest.raises(ValueError, match=f"model.ops.attention is flash_attn: {expected}; use torch$"):
        backends.choose(ModelConfig(ops=OpsConfig(attention="flash_attn")), on(A100))


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
    ],
)
def test_a_gpu_that_fails_is_no_lack_of_a_kernel(
    versions: dict, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A restart may get another host; a refusal would be for good."""

    def fails(*_: object, **__: object) -> torch.Tensor:
        raise error

    randn = torch.randn
    monkeypatch.setattr(backends.torch, "randn", lambda *shape, **_: randn(*shape, requires_grad=True))
    monkeypatch.setattr(backends.ops, "attention", fails)
    said = (
        f"a GPU of {socket.gethostname()} fails at its first work .{str(error).splitlines()[0]}.: see nvidia-smi there"
    )
    with pytest.raises(OSError, match=said):
        backends.choose(ModelConfig(ops=OpsConfig(attention="torch")), on(A100))


def test_what_can_be_had_is_taken_as_asked(versions: dict) -> None:
    situation = on(A100)
    for field in dataclasses.fields(OpsConfig):
        for backend in ("torch", "torch_flash", "flash_attn", "xformers", "liger"):
            if f"'{backend}'" in str(field.type):
                assert obstacle(field.name, backend, situation) is None
                (choice,) = (
                    c for c in decide(OpsConfig(**{field.name: backend}), situation) if c.operation == field.name
                )
                assert (choice.backend, choice.why) == (backend, f"model.ops.{field.name} asks for it")


def test_pytorchs_flash_kernel_is_to_be_had_on_any_gpu(
    versions: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On Hopper, too, where auto takes cuDNN's: to compare the two in a whole step."""
    tried = []

    def attention(q: torch.Tensor, *_: object, kernel: SDPBackend, **__: object) -> torch.Tensor:
        tried.append(kernel)
        return q

    randn = torch.randn
    monkeypatch.setattr(backends.torch, "randn", lambda *shape, **_: randn(*shape, requires_grad=True))
    monkeypatch.setattr(backends.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(backends.ops, "attention", attention)
    monkeypatch.setattr(backends.torch.backends.cudnn, "version", lambda: 91900)
    for backend, kernel in (("auto", "SDPA cudnn"), ("torch_flash", "SDPA flash")):
        operations = backends.choose(ModelConfig(ops=OpsConfig(attention=backend)), on(H100))
        assert operations.choices[0].kernel == kernel
    assert tried == [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    for situation, why in (
        (on(H100, documents=True), "no mask"),
        (on(H100, dtype=torch.float32), "bf16, not in fp32"),
        (on(None), "needs a CUDA device"),
    ):
        assert why in str(obstacle("attention", "torch_flash", situation))


def test_all_problems_are_named_at_once(versions: dict) -> None:
    versions.clear()
    with pytest.raises(ValueError, match=r"model.ops.attention is flash_attn: .*; model.ops.rms_norm is liger: "):
        chosen(on(A100), attention="flash_attn", rms_norm="liger")


def test_every_backend_that_can_be_asked_for_has_its_function() -> None:
    pairs = {
        (field.name, backend)
        for field in dataclasses.fields(OpsConfig)
        for backend in ("flash_attn", "xformers", "liger")
        if f"'{backend}'" in str(field.type)
    }
    assert len(pairs) == 9
    assert pairs == set(backends._MADE)
    for (operation, backend), functions in backends._MADE.items():
        assert operation in functions
        for function in functions.values():
            assert function.__module__ == "pretrain.kernels"
            assert function.__name__.startswith(backend.removesuffix("_attn") + "_"), "a run would say another one"


def test_the_choice_is_no_part_of_the_models_shape() -> None:
    other = ModelConfig(ops=OpsConfig(rms_norm="torch"))
    assert other == ModelConfig()
    assert other.shape() == ModelConfig().shape()
    assert "ops" not in other.shape()
    assert other.shape()["hidden_size"] == 2048


def test_a_run_says_what_it_took_and_refuses_before_it_writes(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tree = tiny_config(datasets, tmp_path / "run", train={"max_steps": 2}, optim={"warmup_steps": 1})
    tree["model"] = {**tree["model"], "ops": {"attention": "flash_attn"}}
    file = write_config(tmp_path / "c.yaml", tree)
    with pytest.raises(ValueError, match=r"model\.ops\.attention is flash_attn: it needs a CUDA device"):
        preparation.prepare(config.load(file))
    assert not (tmp_path / "run" / "config.yaml").exists()

    assert (
        trainer.train(preparation.prepare(config.parse(["--config", str(file), "--model.ops.attention", "auto"]))) == 0
    )
    written = json.loads((tmp_path / "run" / "operations.json").read_text())
    assert {row["operation"]: row["backend"] for row in written} == TORCH
    assert all(row["kernel"] and row["why"] for row in written)
    assert "attention      torch    SDPA of the CPU  the only one on a CPU" in capsys.readouterr().out
    again = ["--config", str(file), "--train.max_steps", "3", "--model.ops.attention", "torch"]
    assert trainer.train(preparation.prepare(config.parse(again))) == 0  # another choice: still the same run
    output = capsys.readouterr().out
    assert "resumed after step 2" in output
    assert "model.ops.attention asks for it" in output


def test_of_a_refused_kernel_the_reason_is_kept() -> None:
    """What PyTorch 2.11 warns of when cuDNN's attention alone is allowed, in deterministic mode."""
    said = [
        "Memory efficient kernel not used because: (Triggered internally at a.cpp:986.)",
        "Memory Efficient attention has been runtime disabled. (Triggered internally at b.h:552.)",
        "Flash attention kernel not used because: (Triggered internally at a.cpp:988.)",
        "Flash attention has been runtime disabled. (Triggered internally at b.h:540.)",
        "cuDNN attention kernel not used because: (Triggered internally at a.cpp:990.)",
        "cuDNN SDPA is not deterministic. (Triggered internally at a.cpp:718.)",
    ]
    assert _reasons(said) == ["cuDNN SDPA is not deterministic"]
