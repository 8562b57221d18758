"""Each operation by each library that is installed, against plain PyTorch in fp32: loss and gradients of a small model.

    python benchmarks/operations.py [--device cuda]

A backend passes when its relative error is at most twice that of plain PyTorch in the same precision, plus 0.001. The tests
that are marked `gpu` look closer, over odd shapes; this needs no pytest. Status 1 where a backend is wrong.
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


def gradients(operations: ops.Operations, dtype: torch.dtype, device: torch.device) -> tuple[float, torch.Tensor]:
    """The loss, and all gradients as one vector, of the same weights on the same tokens."""
    with torch.device("meta"):
        model = Llama(SHAPE, operations, dtype)
    model.materialize(device)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim == 1 else 0.05)
            parameter.copy_(drawn + (parameter.ndim == 1))
    ids = torch.randint(0, SHAPE.vocab_size, (3, 178), generator=generator).to(device)
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return loss.item(), torch.cat([p.grad.float().flatten() for p in model.parameters()])


def main() -> int:
    """Print a line for each operation, library and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    capability = torch.cuda.get_device_capability() if device.type == "cuda" else None
    torch.backends.cuda.matmul.allow_tf32 = False
    exact, wrong, tried = gradients(ops.REFERENCE, torch.float32, device), 0, 0
    for precision, dtype in DTYPES.items():
        plain = _errors(gradients(ops.REFERENCE, dtype, device), exact)
        print(f"{precision}  plain PyTorch: loss off by {plain[0]:.1e}, gradients by {plain[1]:.1e}")
        situation = backends.Situation(capability, dtype, SHAPE.head_dim)
        for field, library in _choices():
            problem = backends.obstacle(field, library, situation)
            if problem is not None:
                print(f"{precision}  {field} {library}: not tried: {problem}")
                continue
            settings = dataclasses.replace(OpsConfig(**{f: "torch" for f, _ in _choices()}), **{field: library})
            try:
                operations = backends.choose(dataclasses.replace(SHAPE, ops=settings), situation)
                off = _errors(gradients(operations, dtype, device), exact)
            except Exception as error:  # one library's failure must not hide the others'
                wrong, tried = wrong + 1, tried + 1
                print(f"{precision}  {field} {library}: FAILS: {type(error).__name__}: {str(error)[:500]}")
                continue
            good = all(error <= 2 * usual + 1e-3 for error, usual in zip(off, plain))
            wrong, tried = wrong + (not good), tried + 1
            kernel = next(choice.kernel for choice in operations.choices if choice.operation == field)
            verdict = "good" if good else "WRONG"
            print(f"{precision}  {field} {library} ({kernel}): loss {off[0]:.1e}, gradients {off[1]:.1e}: {verdict}")
    print(f"{tried} tried, {wrong} wrong")
    return 1 if wrong else 0


def _choices() -> list[tuple[str, str]]:
    hints = typing.get_type_hints(OpsConfig)
    return [(field, library) for field in hints for library in typing.get_args(hints[field]) if library != "auto"]


def _errors(got: tuple[float, torch.Tensor], exact: tuple[float, torch.Tensor]) -> tuple[float, float]:
    """Relative errors of the loss, and of the gradient in the L2 norm."""
    return abs(got[0] / exact[0] - 1), ((got[1] - exact[1]).norm() / exact[1].norm()).item()


if __name__ == "__main__":
    sys.exit(main())
