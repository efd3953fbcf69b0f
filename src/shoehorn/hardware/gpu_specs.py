"""Specifications of GPU models: memory as sold, PCIe generation and memory bandwidth."""

from __future__ import annotations

import re

from shoehorn.hardware.types import Gpu

_ECC = re.compile(r"(?<![A-Z\d])(T4|L4|L40S?|A2|A10G?|A16|A40)(?![\d])", re.IGNORECASE)
"""Parts of names of cards that keep a sixteenth of their memory for error correction."""

_DRIVERS_BYTES, _DRIVERS_SHARE = 330 << 20, 0.009
"""What the driver reserves of a card, at most: 380 MiB were seen of 8 GB, 430 of 20, 1,230 of 141 (tests/captures)."""


def total_of_sold(gigabytes: float, name: str) -> int:
    """Bytes that CUDA reports as total of a card that is sold with so many GB; a little less than most have.

    Args:
        name: NVIDIA's, or a part of it like `L4`; may be empty.
    """
    whole = gigabytes * (1 << 30) * (15 / 16 if _ECC.search(name) else 1)
    return max(0, round(whole * (1 - _DRIVERS_SHARE)) - _DRIVERS_BYTES)


GB = 10**9

LINK_BYTES_PER_SECOND = {1: 3.1e9, 2: 6.2e9, 3: 12.3e9, 4: 25e9, 5: 55.4e9, 6: 110e9}
"""Pinned host memory to device with 16 lanes, by PCIe generation."""

_DEVICE_GB_PER_SECOND = {
    "H200": 4380, "H100 PCIe": 2000, "H100": 3350, "A100-SXM4-80": 2039, "A100 80": 1935, "A100": 1555, "L40": 864,
    "L4": 300, "A10G": 600, "A10": 600, "A4500": 640, "4000 Ada": 360, "A6000": 768, "6000 Ada": 960, "T4": 320,
    "5090": 1792, "5080": 960, "5070 Ti": 896, "5070": 672, "5060 Ti": 448, "5060": 448, "4090": 1008, "4080": 717,
    "4070 Ti SUPER": 672, "4070": 504, "4060 Ti": 288, "4060": 272, "3090": 936, "3080 Ti": 912, "3080": 760,
    "3070": 448, "3060 Ti": 448, "3060": 360, "3050": 224,
}
"""By a part of the card's name, the more particular first: datasheets, the H200 as measured."""

SLOWEST_BYTES_PER_SECOND = 224e9

_USUAL_LINK = {r"H[12]00|50[789]0": (5, 16), r"5060": (5, 8), r"4060": (4, 8), r"T4": (3, 16),
               r"[34]0[5-9]0|A100|A10|A4500|A6000|L40?|[46]000 Ada": (4, 16)}


def link_bytes_per_second(gpu: Gpu) -> tuple[float, bool]:
    """The link's practical speed from host memory, and whether it is known; generation 4 with 16 lanes if not."""
    if gpu.link_bytes_per_second:
        return gpu.link_bytes_per_second, True
    speed = LINK_BYTES_PER_SECOND.get(gpu.pcie_generation)
    if speed is None or not gpu.pcie_width:
        return LINK_BYTES_PER_SECOND[4], False
    return speed * gpu.pcie_width / 16, True


def usual_link(name: str) -> tuple[int, int]:
    """PCIe generation and lanes that a card of this name can have, for planning elsewhere; (0, 0) where unknown."""
    return next((link for part, link in _USUAL_LINK.items() if re.search(rf"(?<!\d)({part})", name)), (0, 0))


def device_bytes_per_second(name: str) -> float | None:
    """The speed of a card's own memory; None for a card that is not in the table."""
    return next((speed * 1e9 for part, speed in _DEVICE_GB_PER_SECOND.items() if part.lower() in name.lower()), None)
