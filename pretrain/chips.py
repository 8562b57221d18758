"""What chips can do by their datasheets.

By the device's whole name: a variant or a part (MIG) is another chip. A chip that is not here gets no MFU and no judgement
from `pretrain doctor`, rather than a guessed one.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Datasheet:
    """Peaks by datasheet."""

    flops: float | None
    """Dense bf16 matrix products with fp32 accumulation (FLOP/s); none: it has no units for them."""
    bytes_per_s: float
    """Memory bandwidth (bytes/s)."""
    link: float | None = None
    """To the other GPUs of its node: NVLink, one direction (bytes/s); none: it has no NVLink to all of them, or is not known."""
    fp32_flops: float | None = None
    """Products in fp32, outside of the units for bf16 (FLOP/s); none: the plan does not know the chip."""


DATASHEETS = {
    "NVIDIA A100-SXM4-40GB": Datasheet(312e12, 1555e9, 300e9, 19.5e12),
    "NVIDIA A100-SXM4-80GB": Datasheet(312e12, 2039e9, 300e9, 19.5e12),
    "NVIDIA A100-PCIE-40GB": Datasheet(312e12, 1555e9),
    "NVIDIA A100 80GB PCIe": Datasheet(312e12, 1935e9),
    "NVIDIA H100 80GB HBM3": Datasheet(989e12, 3350e9, 450e9, 67e12),
    "NVIDIA H100 PCIe": Datasheet(756e12, 2000e9),
    "NVIDIA H200": Datasheet(989e12, 4800e9, 450e9, 67e12),
    "NVIDIA B200": Datasheet(2250e12, 8000e9),
    "NVIDIA L40S": Datasheet(362e12, 864e9),
    "NVIDIA L40": Datasheet(181e12, 864e9),
    "NVIDIA L4": Datasheet(121e12, 300e9),
    "NVIDIA A40": Datasheet(149.7e12, 696e9),
    "NVIDIA A30": Datasheet(165e12, 933e9),
    "NVIDIA A10": Datasheet(125e12, 600e9),
    "NVIDIA RTX A6000": Datasheet(154.8e12, 768e9),
    "NVIDIA GeForce RTX 4090": Datasheet(165.2e12, 1008e9),
    "NVIDIA GeForce RTX 3090": Datasheet(71e12, 936e9),
    "Tesla V100-SXM2-16GB": Datasheet(None, 900e9),
    "Tesla V100-SXM2-32GB": Datasheet(None, 900e9),
    "Tesla V100-PCIE-16GB": Datasheet(None, 900e9),
    "Tesla V100-PCIE-32GB": Datasheet(None, 900e9),
}
