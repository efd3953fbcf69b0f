"""Specifications of GPU models compared with captured machines."""

from __future__ import annotations

import pytest

from fakes import captured
from shoehorn.hardware import gpu_specs


@pytest.mark.parametrize("name", captured.machines())
def test_estimated_memory_of_a_sold_gpu_is_slightly_below_the_captured_one(name: str) -> None:
    gpu = captured.machine(name).gpus[0]
    assert 0.987 <= gpu_specs.usable_bytes(float(name.split("-")[1]), gpu.name) / gpu.total_bytes <= 1


def test_estimated_memory_is_never_negative() -> None:
    assert gpu_specs.usable_bytes(0.1, "L4") == 0
