"""Specifications of GPU models compared with captured machines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes import captured
from shoehorn.hardware import gpu_specs
from shoehorn.hardware.types import Gpu

H200 = Gpu(0, "", "NVIDIA H200", 140 << 30, 140 << 30, (9, 0), 5, 16, False)


@pytest.mark.parametrize("name", captured.machines())
def test_estimated_memory_of_a_sold_gpu_is_slightly_below_the_captured_one(name: str) -> None:
    gpu = captured.machine(name).gpus[0]
    assert 0.987 <= gpu_specs.usable_bytes(float(name.split("-")[1]), gpu.name) / gpu.total_bytes <= 1


def test_estimated_memory_is_never_negative() -> None:
    assert gpu_specs.usable_bytes(0.1, "L4") == 0


@pytest.mark.parametrize(("name", "bandwidth", "link"), [
    ("NVIDIA GeForce RTX 3060 Ti", 448e9, (4, 16)), ("NVIDIA GeForce RTX 4060", 272e9, (4, 8)),
    ("RTX5090", 1792e9, (5, 16)), ("NVIDIA L40S", 864e9, (4, 16)), ("NVIDIA L4", 300e9, (4, 16)),
    ("Tesla T4", 320e9, (3, 16)), ("NVIDIA H100 80GB HBM3", 3350e9, (5, 16)), ("NVIDIA A10", 600e9, (4, 16)),
    ("RTX A5000", None, (0, 0)), ("", None, (0, 0)),
])
def test_bandwidths_are_known_by_the_name_of_the_gpu(name: str, bandwidth: float | None, link: tuple[int, int]) -> None:
    assert gpu_specs.memory_bandwidth(name) == bandwidth
    assert gpu_specs.typical_pcie(name) == link


def test_unknown_pcie_counts_as_generation_4_and_lanes_count() -> None:
    assert gpu_specs.host_to_device_bandwidth(replace(H200, pcie_generation=0)) == (25e9, False)
    assert gpu_specs.host_to_device_bandwidth(replace(H200, pcie_generation=3, pcie_width=8)) == (6.15e9, True)
