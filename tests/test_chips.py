"""Datasheets: what libraries, the doctor and the plan take from them."""

from dataclasses import replace

import pytest

from pretrain.chips import CHIPS, DATASHEETS
from pretrain.speed import A100, HOPPER, rates_of


def test_a_chip_to_plan_for_is_its_own_datasheet() -> None:
    assert len(CHIPS) == 4
    assert all(DATASHEETS[chip.device] is chip for chip in CHIPS.values())
    assert CHIPS["A100-40G"].memory == int(39.4 * 2**30)
    assert replace(CHIPS["A100-40G"], memory_gib=float("inf")).memory is None


@pytest.mark.parametrize(
    ("part", "capability"), [("A100", (8, 0)), ("H100", (9, 0)), ("H200", (9, 0)), ("V100", (7, 0)), ("L40", (8, 9))]
)
def test_one_generation_has_one_capability(part: str, capability: tuple[int, int]) -> None:
    assert {sheet.capability for name, sheet in DATASHEETS.items() if part in name} == {capability}


def test_rates_are_those_of_the_generation() -> None:
    assert {name: rates_of(chip) for name, chip in CHIPS.items()} == {
        "A100-40G": A100,
        "A100-80G": A100,
        "H100": HOPPER,
        "H200": HOPPER,
    }
