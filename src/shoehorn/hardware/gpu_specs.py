"""Specifications of GPU models: total memory, PCIe generation and memory bandwidth."""

from __future__ import annotations

import re

from shoehorn.hardware.types import Gpu

_ECC = re.compile(r"(?<![A-Z\d])(T4|L4|L40S?|A2|A10G?|A16|A40)(?![\d])", re.IGNORECASE)
"""Names of GPUs that reserve a sixteenth of their memory for ECC."""

_DRIVER_BYTES, _DRIVER_SHARE = 330 << 20, 0.009
"""Memory that the driver reserves, at most: measured 380 MiB of 8 GB, 430 of 20, 1,230 of 141 (tests/captures)."""


def usable_bytes(gigabytes: float, name: str) -> int:
    """Estimate the total memory that CUDA reports for a GPU sold with `gigabytes`; slightly low for most models.

    Args:
        name: NVIDIA's name, or a part like `L4`; may be empty.
    """
    total = gigabytes * (1 << 30) * (15 / 16 if _ECC.search(name) else 1)
    return max(0, round(total * (1 - _DRIVER_SHARE)) - _DRIVER_BYTES)


GB = 10**9

_PCIE_BYTES_PER_SECOND = {1: 3.1e9, 2: 6.2e9, 3: 12.3e9, 4: 25e9, 5: 55.4e9, 6: 110e9}
"""Host-to-device bandwidth of pinned memory with 16 lanes, by PCIe generation."""

_DEVICE_GB_PER_SECOND = {
    "H200": 4380, "H100 PCIe": 2000, "H100": 3350, "A100-SXM4-80": 2039, "A100 80": 1935, "A100": 1555, "L40": 864,
    "L4": 300, "A10G": 600, "A10": 600, "A4500": 640, "4000 Ada": 360, "A6000": 768, "6000 Ada": 960, "T4": 320,
    "5090": 1792, "5080": 960, "5070 Ti": 896, "5070": 672, "5060 Ti": 448, "5060": 448, "4090": 1008, "4080": 717,
    "4070 Ti SUPER": 672, "4070": 504, "4060 Ti": 288, "4060": 272, "3090": 936, "3080 Ti": 912, "3080": 760,
    "3070": 448, "3060 Ti": 448, "3060": 360, "3050": 224,
}
"""Memory bandwidth by part of the name, specific names first: datasheets, the H200 measured."""

SLOWEST_BYTES_PER_SECOND = 224e9

_TYPICAL_PCIE = {r"H[12]00|50[789]0": (5, 16), r"5060": (5, 8), r"4060": (4, 8), r"T4": (3, 16),
                 r"[34]0[5-9]0|A100|A10|A4500|A6000|L40?|[46]000 Ada": (4, 16)}


def host_to_device_bandwidth(gpu: Gpu) -> tuple[float, bool]:
    """Return bytes a second from pinned host memory, and whether they are known; if not, those of PCIe 4.0 x16."""
    if gpu.link_bytes_per_second:
        return gpu.link_bytes_per_second, True
    bandwidth = _PCIE_BYTES_PER_SECOND.get(gpu.pcie_generation)
    if bandwidth is None or not gpu.pcie_width:
        return _PCIE_BYTES_PER_SECOND[4], False
    return bandwidth * gpu.pcie_width / 16, True


def typical_pcie(name: str) -> tuple[int, int]:
    """Return PCIe generation and lanes of a GPU model, for planning on another machine; (0, 0) if unknown."""
    return next((pcie for part, pcie in _TYPICAL_PCIE.items() if re.search(rf"(?<!\d)({part})", name)), (0, 0))


def memory_bandwidth(name: str) -> float | None:
    """Return the memory bandwidth of a GPU model in bytes a second; None if unknown."""
    return next((gb * 1e9 for part, gb in _DEVICE_GB_PER_SECOND.items() if part.lower() in name.lower()), None)
