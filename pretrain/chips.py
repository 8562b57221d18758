"""What chips can do by their datasheets.

By the device's whole name: a variant or a part (MIG) is another chip. A chip that is not here gets no MFU and no judgement
from `pretrain doctor`, rather than a guessed one.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Datasheet:
    """Peaks by datasheet."""

    flops: float | None
    """Dense bf16 matrix products with fp32 accumulation (FLOP/s); none: it has no units for them."""
    bytes_per_s: float
    """Memory bandwidth (bytes/s)."""
    capability: tuple[int, int]
    """CUDA's compute capability, by which libraries say what they need."""
    link: float | None = None
    """To the other GPUs of its node: NVLink, one direction (bytes/s); none: it has no NVLink to all of them, or is not known."""


@dataclass(frozen=True, kw_only=True)
class Chip(Datasheet):
    """A GPU and its node, of which all is known that the plan needs."""

    device: str
    """What CUDA calls it."""
    flops: float
    link: float
    fp32_flops: float
    """Products in fp32, outside of the units for bf16 (FLOP/s); TF32 is not used."""
    memory_gib: float
    """What PyTorch reports as total memory (GiB); infinite: not known, as of a CPU."""
    network_gbits: float
    """Of the whole node to the others, the usual machine's: eight network cards (Gbit/s)."""

    @property
    def memory(self) -> int | None:
        """In bytes; None: not known."""
        return None if math.isinf(self.memory_gib) else int(self.memory_gib * 2**30)


def _a100(device: str, bytes_per_s: float, memory_gib: float) -> Chip:
    return Chip(
        device=device,
        flops=312e12,
        bytes_per_s=bytes_per_s,
        capability=(8, 0),
        link=300e9,
        fp32_flops=19.5e12,
        memory_gib=memory_gib,
        network_gbits=1600,
    )


def _hopper(device: str, bytes_per_s: float, memory_gib: float) -> Chip:
    return Chip(
        device=device,
        flops=989e12,
        bytes_per_s=bytes_per_s,
        capability=(9, 0),
        link=450e9,
        fp32_flops=67e12,
        memory_gib=memory_gib,
        network_gbits=3200,
    )


CHIPS = {
    "A100-40G": _a100("NVIDIA A100-SXM4-40GB", 1555e9, 39.4),
    "A100-80G": _a100("NVIDIA A100-SXM4-80GB", 2039e9, 79.2),
    "H100": _hopper("NVIDIA H100 80GB HBM3", 3350e9, 79.1),
    "H200": _hopper("NVIDIA H200", 4800e9, 139.8),
}
"""Those that a run can be planned for; networks: DGX A100 (8 x 200 Gbit/s), DGX H100 (8 x 400 Gbit/s)."""

DATASHEETS: dict[str, Datasheet] = {chip.device: chip for chip in CHIPS.values()} | {
    "NVIDIA A100-PCIE-40GB": Datasheet(312e12, 1555e9, (8, 0)),
    "NVIDIA A100 80GB PCIe": Datasheet(312e12, 1935e9, (8, 0)),
    "NVIDIA H100 PCIe": Datasheet(756e12, 2000e9, (9, 0)),
    "NVIDIA B200": Datasheet(2250e12, 8000e9, (10, 0)),
    "NVIDIA L40S": Datasheet(362e12, 864e9, (8, 9)),
    "NVIDIA L40": Datasheet(181e12, 864e9, (8, 9)),
    "NVIDIA L4": Datasheet(121e12, 300e9, (8, 9)),
    "NVIDIA A40": Datasheet(149.7e12, 696e9, (8, 6)),
    "NVIDIA A30": Datasheet(165e12, 933e9, (8, 0)),
    "NVIDIA A10": Datasheet(125e12, 600e9, (8, 6)),
    "NVIDIA RTX A6000": Datasheet(154.8e12, 768e9, (8, 6)),
    "NVIDIA GeForce RTX 4090": Datasheet(165.2e12, 1008e9, (8, 9)),
    "NVIDIA GeForce RTX 3090": Datasheet(71e12, 936e9, (8, 6)),
    "Tesla V100-SXM2-16GB": Datasheet(None, 900e9, (7, 0)),
    "Tesla V100-SXM2-32GB": Datasheet(None, 900e9, (7, 0)),
    "Tesla V100-PCIE-16GB": Datasheet(None, 900e9, (7, 0)),
    "Tesla V100-PCIE-32GB": Datasheet(None, 900e9, (7, 0)),
}
