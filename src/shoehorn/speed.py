"""Expected tokens per second: bytes that one pass moves, over the link and out of the card's own memory.

Rules: bandwidths are practical ones, not the datasheets' where both are known; a card that is not in the table has no
expectation (None), never a guess; the shares of the bound that the engine reaches are those measured (H200, H100).
docs/estimator.md names the sources and says what was compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from shoehorn.checkpoint import ModelShape
from shoehorn.estimate import Choices, captured_sizes, drafting, moved_bytes, offloaded_layers, unpacked_bytes
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

ACCEPTED = 3.0
"""Tokens that a pass is taken to yield where a draft guesses: it depends on the text, and most pairs do better."""

_USUAL_LINK = {r"H[12]00|50[789]0": (5, 16), r"5060": (5, 8), r"4060": (4, 8), r"T4": (3, 16),
               r"[34]0[5-9]0|A100|A10|A4500|A6000|L40?|[46]000 Ada": (4, 16)}

_COPY_SHARE = 0.904
"""What a copy within the card reaches of pure reading, by which the probe's figure is made comparable (H200)."""

_FEW = 4
"""Up to so many requests bitsandbytes' kernel takes the same time as for one (backends/cuda/ops.py)."""

_LINK_SHARE, _LINK_GAIN = 0.91, 8.0
_LINK_GAIN_NF4 = 5.1
_PREFETCH_SHARE = 0.985
"""What prefetch reaches of the link, eight requests like one."""

_SUMS_SECONDS = 20e-6
"""What the two sums over the cards of a tensor-parallel layer take (two H100s over NVLink)."""

_PREFETCH_SECONDS = 400e-6
"""What the host takes to start the copies of a layer, where it starts every kernel one by one."""


@dataclass(frozen=True)
class Kernels:
    """How the kernels of one number format use a card.

    Attributes:
        share: of the card's memory bandwidth that they reach for one request; share_8: for eight together.
        ceiling: bytes a second that they reach however fast the card's memory is.
        layer_seconds: spent in every layer whatever the bytes; eager_seconds: the same without CUDA graphs, where the
            host starts every kernel one by one.
    """

    share: float
    share_8: float
    layer_seconds: float
    eager_seconds: float
    ceiling: float = math.inf

    def bytes_per_second(self, device: float, requests: int) -> float:
        """What is read of a card's memory, with so many requests together."""
        return min(device * (self.share if requests <= _FEW else self.share_8), self.ceiling)


_KERNELS = {"none": Kernels(0.85, 0.85, 30e-6, 410e-6), "bitsandbytes": Kernels(0.27, 0.096, 35e-6, 1070e-6),
            "other": Kernels(0.69, 0.69, 55e-6, 450e-6, 2.41e12)}
"""Fitted to the H200's measurements in docs/estimator.md; of packed integers to an H100's too, which is as fast."""


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


def expected(shape: ModelShape, choices: Choices, gpu: Gpu) -> Mapping[str, float | None]:
    """Tokens per second of all requests together, for one and for eight: `batch_1`, `batch_8`.

    Args:
        gpu: the slowest card.
    """
    device = gpu.device_bytes_per_second / _COPY_SHARE or device_bytes_per_second(gpu.name)
    streamed, _ = moved_bytes(shape, choices)
    if device is None and not streamed:
        return {"batch_1": None, "batch_8": None}
    found = {}
    for most in (1, 8):
        requests = min(most, choices.max_num_seqs)
        found[f"batch_{most}"] = round(requests / _token_seconds(
            shape, choices, device or _SLOWEST_BYTES_PER_SECOND, link_bytes_per_second(gpu)[0], requests), 2)
    found["batch_8"] = max(found.values())  # where eight together would be slower, they can be served in turn
    return found


def _token_seconds(shape: ModelShape, choices: Choices, device: float, link: float, requests: int) -> float:
    """The time in which each of so many requests gets a token: a pass, or its part of one where a draft guesses.

    What is guessed from the text so far is not counted on.
    """
    guesses = choices.speculative_tokens
    checking = _pass_seconds(shape, choices, device, link, requests * (1 + guesses))
    if choices.draft is None:
        return checking
    return (checking + guesses * _pass_seconds(choices.draft, drafting(choices), device, link, requests)) / ACCEPTED


def _pass_seconds(shape: ModelShape, choices: Choices, device: float, link: float, requests: int) -> float:
    """The time of one pass with so many requests; stages of a pipeline work one after the other."""
    streamed, resident = moved_bytes(shape, choices, requests)
    kind = shape.quantization or choices.quantization or "none"
    kernels = _KERNELS.get(kind, _KERNELS["other"])
    gain = _LINK_GAIN_NF4 if kind == "bitsandbytes" else _LINK_GAIN
    reached = kernels.bytes_per_second(device, requests)
    eager = choices.eager or requests > captured_sizes(choices)[-1]
    per_layer = kernels.eager_seconds if eager else kernels.layer_seconds
    per_layer += _SUMS_SECONDS * (choices.tensor_parallel > 1)
    if choices.prefetch[0]:  # copies and kernels run side by side
        working = (streamed + resident) / reached
        starting = offloaded_layers(shape, choices.prefetch) * _PREFETCH_SECONDS * eager
        return max(streamed / link / _PREFETCH_SHARE,
                   working + unpacked_bytes(shape, choices) / device + shape.layers * per_layer + starting)
    on_link = streamed / link / _LINK_SHARE * (1 if requests <= _FEW else 8 / gain)
    reading = resident / reached + unpacked_bytes(shape, choices) / device
    if streamed and eager:  # while the link is waited for, the host runs ahead
        return max(on_link + reading, reading + shape.layers * per_layer)
    return on_link + reading + shape.layers * per_layer
