"""Expected tokens per second: bytes that one pass moves, over the link and out of the card's own memory.

Rules: bandwidths are practical ones, not the datasheets' where both are known; a card that is not in the table has no
expectation (None), never a guess; the shares of the bound that the engine reaches are those measured once, on an H200.
docs/estimator.md names the sources and says what was compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from shoehorn.checkpoint import ModelShape
from shoehorn.estimate import Choices, streamed_and_resident_bytes
from shoehorn.hardware import Gpu

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

_SLOWEST_BYTES_PER_SECOND = 224e9

_USUAL_LINK = {r"H[12]00|50[789]0": (5, 16), r"5060": (5, 8), r"4060": (4, 8), r"T4": (3, 16),
               r"[34]0[5-9]0|A100|A10|A4500|A6000|L40?|[46]000 Ada": (4, 16)}

# Shares of the bound at one request, and how many times faster eight requests together are.
_LINK_SHARE, _LINK_GAIN = 0.91, 8.0
_LINK_GAIN_NF4 = 4.4
_DEVICE_SHARE = {"none": (0.70, 8.0), "bitsandbytes": (0.25, 2.7), "other": (0.43, 7.9)}


def link_bytes_per_second(gpu: Gpu) -> tuple[float, bool]:
    """The link's practical speed from host memory, and whether it is known; generation 4 with 16 lanes if not."""
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


def expected(shape: ModelShape, choices: Choices, gpu: Gpu) -> Mapping[str, float | None]:
    """Tokens per second of all requests together, for one and for eight: `batch_1`, `batch_8`.

    Args:
        gpu: the slowest card.
    """
    streamed, resident = streamed_and_resident_bytes(shape, choices)
    device = device_bytes_per_second(gpu.name)
    if device is None and not streamed:
        return {"batch_1": None, "batch_8": None}
    kind = shape.quantization or choices.quantization or "none"
    share, gain = _DEVICE_SHARE.get(kind, _DEVICE_SHARE["other"])
    on_link = streamed / link_bytes_per_second(gpu)[0] / _LINK_SHARE
    on_device = resident / (device or _SLOWEST_BYTES_PER_SECOND) / share
    link_gain = _LINK_GAIN_NF4 if kind == "bitsandbytes" and not choices.prefetch[0] else _LINK_GAIN
    return {"batch_1": round(1 / (on_link + on_device), 2),
            "batch_8": round(1 / (on_link / link_gain + on_device / gain), 2)}
