"""Each operation by each library that is installed, against plain PyTorch in fp32: loss and gradients of a small model.

    python benchmarks/operations.py [--device cuda]

A backend passes when the relative errors of its loss and of each parameter's gradient are at most three times those of plain
PyTorch in the same precision, plus 0.001. A precision's last row is plain PyTorch compiled, its cross-entropy in chunks.
The tests that are marked `gpu` look closer, over odd shapes; this needs no pytest. Status 1 where a backend is wrong.
"""

import argparse
import dataclasses
import sys
import typing

import torch

from pretrain import backends, ops
from pretrain.model import Llama
from pretrain.sections import ModelConfig, OpsConfig

SHAPE = ModelConfig(
    vocab_size=1031,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=200,
)
"""Heads of 64 features, as TinyLlama's, and a vocabulary that is no multiple of anything."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


Found = dict[str, torch.Tensor]
"""The loss, and each parameter's gradient by its name."""


def found_by(operations: ops.Operations, dtype: torch.dtype, device: torch.device, compiled: bool = False) -> Found:
    """Of the same weights on the same tokens."""
    with torch.device("meta"):
        model = Llama(SHAPE, operations, dtype)
    model.materialize(device)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim == 1 else 0.05)
            parameter.copy_(drawn + (parameter.ndim == 1))
    ids = torch.randint(0, SHAPE.vocab_size, (3, 178), generator=generator).to(device)
    forward = torch.compile(model) if compiled else model
    loss = forward(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.float() for name, p in model.named_parameters()}}


def main() -> int:
    """Print a line for each operation, library and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    capability = torch.cuda.get_device_capability() if device.type == "cuda" else None
    torch.backends.cuda.matmul.allow_tf32 = False
    exact, verdicts = found_by(ops.REFERENCE, torch.float32, device), list[bool]()
    for precision, dtype in DTYPES.items():
        plain = errors(found_by(ops.REFERENCE, dtype, device), exact)
        print(f"{precision}  plain PyTorch: {_in_words(plain)}")
        situation = backends.Situation(capability, dtype, SHAPE.head_dim)
        for field, library in _choices():
            problem = backends.obstacle(field, library, situation)
            if problem is not None:
                print(f"{precision}  {field} {library}: not tried: {problem}")
                continue
            settings = dataclasses.replace(OpsConfig(**{f: "torch" for f, _ in _choices()}), **{field: library})
            try:
                operations = backends.choose(dataclasses.replace(SHAPE, ops=settings), situation)
                kernel = next(choice.kernel for choice in operations.choices if choice.operation == field)
                found = found_by(operations, dtype, device)
            except Exception as error:  # one library's failure must not hide the others'
                verdicts.append(_failed(f"{precision}  {field} {library}", error))
                continue
            verdicts.append(judged(f"{precision}  {field} {library} ({kernel})", errors(found, exact), plain))
        ops.LOGITS_BYTES[device.type] = 256 * 4 * SHAPE.vocab_size
        try:
            found = found_by(ops.REFERENCE, dtype, device, compiled=True)
        except Exception as error:
            verdicts.append(_failed(f"{precision}  compiled", error))
            continue
        verdicts.append(judged(f"{precision}  compiled", errors(found, exact), plain))
    print(f"{len(verdicts)} tried, {verdicts.count(False)} wrong")
    return 0 if all(verdicts) else 1


def judged(name: str, off: dict[str, float], plain: dict[str, float]) -> bool:
    """Print the verdict on the errors of a backend, beside those of plain PyTorch."""
    wrong = [tensor for tensor in off if not off[tensor] <= 3 * plain[tensor] + 1e-3]  # NaN is wrong as well
    verdict = f"WRONG: {', '.join(wrong)}" if wrong else "good"
    print(f"{name}: {_in_words(off)}: {verdict}")
    return not wrong


def _failed(name: str, error: Exception) -> bool:
    print(f"{name}: FAILS: {type(error).__name__}: {str(error)[:500]}")
    return False


def _choices() -> list[tuple[str, str]]:
    hints = typing.get_type_hints(OpsConfig)
    return [(field, library) for field in hints for library in typing.get_args(hints[field]) if library != "auto"]


def errors(found: Found, exact: Found) -> dict[str, float]:
    """Relative errors of the loss and of each gradient, in the L2 norm."""
    return {name: ((found[name] - right).norm() / right.norm()).item() for name, right in exact.items()}


def _in_words(off: dict[str, float]) -> str:
    worst = max((name for name in off if name != "loss"), key=lambda name: off[name])
    return f"loss off by {off['loss']:.1e}, gradients by {off[worst]:.1e} at most ({worst.removeprefix('model.')})"


if __name__ == "__main__":
    sys.exit(main())
