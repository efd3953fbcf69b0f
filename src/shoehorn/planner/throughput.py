"""Expected tokens per second: bytes that one pass moves, over the link and out of the card's own memory.

Rules: bandwidths are practical ones, not the datasheets' where both are known; a card that is not in the table has no
expectation (None), never a guess; the shares of the bound that the engine reaches are those measured (H200, H100).
docs/estimator.md names the sources and says what was compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shoehorn.hardware.gpu_specs import SLOWEST_BYTES_PER_SECOND, host_to_device_bandwidth, memory_bandwidth
from shoehorn.hardware.types import Gpu
from shoehorn.model.shape import ModelShape
from shoehorn.planner.memory.activations import captured_sizes, unpacked_bytes
from shoehorn.planner.memory.offload import offloaded_bytes, offloaded_layers
from shoehorn.planner.memory.weights import head_bytes, layer_bytes, other_bytes
from shoehorn.planner.serving_config import Choices, drafting

ACCEPTED = 3.0
"""Tokens that a pass is taken to yield where a draft guesses: it depends on the text, and most pairs do better."""

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


def expected(shape: ModelShape, choices: Choices, gpu: Gpu) -> Mapping[str, float | None]:
    """Tokens per second of all requests together, for one and for eight: `batch_1`, `batch_8`.

    Args:
        gpu: the slowest card.
    """
    device = gpu.device_bytes_per_second / _COPY_SHARE or memory_bandwidth(gpu.name)
    streamed, _ = moved_bytes(shape, choices)
    if device is None and not streamed:
        return {"batch_1": None, "batch_8": None}
    found = {}
    for most in (1, 8):
        requests = min(most, choices.max_num_seqs)
        found[f"batch_{most}"] = round(requests / _token_seconds(
            shape, choices, device or SLOWEST_BYTES_PER_SECOND, host_to_device_bandwidth(gpu)[0], requests), 2)
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


def moved_bytes(shape: ModelShape, choices: Choices, requests: int = 1) -> tuple[int, int]:
    """Bytes that one GPU reads for one pass over the model: (over the link, from its own memory).

    Of a mixture's experts only those that some token passes are read from the card; what is offloaded by prefetch
    crosses the link whole.
    """
    weights, state = layer_bytes(shape, choices)
    groups = shape.tensor_bytes
    active = 1.0
    if shape.experts and not unpacked_bytes(shape, choices):
        touched = 1 - (1 - shape.experts.per_token / shape.experts.count) ** requests
        whole = groups.linears.bytes + groups.experts.bytes
        active = (groups.linears.bytes + touched * groups.experts.bytes) / max(1, whole)
    offloaded = sum(offloaded_bytes(shape, choices, stage) for stage in range(choices.pipeline_parallel))
    head = head_bytes(shape, choices)
    streamed = offloaded if choices.prefetch[0] else round(offloaded * active)
    return streamed, round((weights - offloaded + state) * active) + head + other_bytes(shape, choices)
