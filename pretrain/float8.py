"""Linear layers in float8: products of 8-bit numbers with one scale a tensor, by torchao. Weights stay fp32."""

import torch
from torch import nn

from pretrain import backends

_NEEDS = "parallel.precision is fp8: it needs a GPU of compute capability 8.9 or later, and {}: set it to bf16"


def convert(model: nn.Module, device: torch.device, emulate: bool = False) -> None:
    """Let the decoder layers' linear products compute in float8 (e4m3, gradients e5m2; arXiv 2209.05433), in place.

    The output projection stays as it is: its error would go straight into the loss. emulate: the same rounding without the
    chip, slowly, for tests.

    Raises:
        ValueError: torchao or the chip (compute capability 8.9 or later) is missing, or a width is not a multiple of 16.
    """
    if backends.installed("torchao") is None:
        raise ValueError(f"parallel.precision is fp8: torchao is not installed: {backends.INSTALL['torchao']}")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if not emulate and capability is None:
        raise ValueError(_NEEDS.format("this runs on the CPU"))
    check(model, None if emulate else capability, "this GPU")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(model, config=Float8LinearConfig(emulate=emulate), module_filter_fn=_wanted)


def check(model: nn.Module, capability: tuple[int, int] | None, chip: str) -> None:
    """Raise ValueError where a chip of this compute capability (None: any), or the model's widths, cannot do with float8."""
    if capability is not None and capability < (8, 9):
        raise ValueError(_NEEDS.format(f"{chip} has {capability[0]}.{capability[1]}"))
    for name, layer in model.named_modules():
        if _wanted(layer, name) and (layer.in_features % 16 or layer.out_features % 16):  # type: ignore[operator]
            raise ValueError(
                f"parallel.precision is fp8: {name} is {layer.in_features} x {layer.out_features}; float8 products need "
                "multiples of 16: set parallel.precision to bf16"
            )


def _wanted(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name != "lm_head"
