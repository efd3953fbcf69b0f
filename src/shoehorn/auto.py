"""What nobody asked for otherwise: quantization, GPUs, offload, context and batch that suit the model and the machine.

The best that fits, in this order:
1. everything on the GPUs as the checkpoint is, where that is comfortable;
2. quantized, everything on the GPUs;
3. quantized, with the least offload that leaves room for a useful context;
4. whatever still runs, with a short context.
Rules: pure; what a setting or a profile says is a bound of the search, never overruled; host memory that is not there
is never promised.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from shoehorn.checkpoint import ModelShape
from shoehorn.estimate import (
    MARGIN_BYTES,
    Choices,
    captured_sizes,
    compiling_bytes,
    estimate,
    host_bytes,
    kv_bytes,
    layer_bytes,
    loading_bytes,
    offloaded_bytes,
)
from shoehorn.units import GIB

OFFLOAD_STEP_BYTES = GIB // 10
"""UVA offload is counted in these, as a person would write it."""

GUESSED = 8
"""Tokens that n-gram look-up guesses at a time."""

_CHECKED = 128
"""Tokens of all requests together that are checked in a pass, at most: a small card hides so many behind the link."""

BUFFERS = 2
"""Layers that the card holds of those in host memory: one is worked with while the next one arrives."""

_LARGE_BYTES = 20 * GIB
"""GPUs that hold this much together are offered the longer of the useful contexts."""


@dataclass(frozen=True)
class Level:
    """How much is offered: the longest request, requests at a time, and tokens in a batch."""

    context: int
    sequences: int
    tokens: int


LEVELS = (Level(131_072, 256, 8192), Level(65_536, 256, 8192), Level(32_768, 256, 8192), Level(32_768, 64, 4096),
          Level(16_384, 64, 2048), Level(8192, 32, 2048), Level(4096, 16, 1024), Level(2048, 8, 512),
          Level(1024, 4, 256), Level(512, 2, 128))
"""The largest first."""

_COMFORTABLE, _RESIDENT = LEVELS[:6], LEVELS[:7]
_TIGHT = Level(4096, 8, 512)
"""A useful context for one request, with fewer graphs or none if need be: rather that on the GPU than with offload."""

_USEFUL_LARGE, _USEFUL = LEVELS[5], LEVELS[6]


@dataclass(frozen=True)
class Found:
    """A way to start that fits.

    Attributes:
        mode: one of the four above, from 1.
        requests: of full length that the KV cache has room for, at least.
    """

    choices: Choices
    mode: int
    requests: int


def search(shape: ModelShape, start: Choices, left_open: frozenset[str], host_memory_bytes: int,
           may_quantize: bool) -> Found | None:
    """The best way to start within the bounds; None when nothing fits.

    Args:
        start: what is given; of a field that is left open only its bound counts.
        left_open: fields of `Choices` that may be chosen: `quantization`, `offload_bytes`, `eager`, `max_model_len`,
            `max_num_seqs`, `max_num_batched_tokens`, `speculative_tokens`, `capture_limit`.
        host_memory_bytes: 0 where unknown, then it does not bound anything.
        may_quantize: the model can be quantized while it is loaded.
    """
    def fits(choices: Choices, requests: int) -> bool:
        short = missing_bytes(shape, choices, requests)
        return short <= 0 and (not host_memory_bytes or host_bytes(shape, choices) <= host_memory_bytes)

    for found in _candidates(shape, start, left_open, may_quantize):
        if fits(found.choices, found.requests):
            return found
    return None


def _candidates(shape: ModelShape, start: Choices, left_open: frozenset[str], may_quantize: bool) -> Iterator[Found]:
    quantizable = may_quantize and "quantization" in left_open and start.quantization is None
    best = replace(start, quantization="bitsandbytes") if quantizable else start
    resident, small = start, best
    if "offload_bytes" in left_open:
        resident, small = replace(start, offload_bytes=0), replace(best, offload_bytes=0)
    for level in _COMFORTABLE if quantizable else _RESIDENT:
        yield Found(at_level(resident, level, left_open), 1, 2)
    if quantizable:
        for level in _RESIDENT:
            yield Found(at_level(small, level, left_open), 2, 2)
    tight = at_level(small, _TIGHT, left_open)
    fewer = fewer_graphs(tight) if "capture_limit" in left_open else ()
    for candidate in (tight, *fewer, *([replace(tight, eager=True)] if "eager" in left_open else [])):
        yield Found(candidate, 2 if quantizable else 1, 1)
    if "offload_bytes" in left_open:
        large = start.limit_bytes * start.gpus >= _LARGE_BYTES
        for level in (_USEFUL_LARGE, _USEFUL) if large else (_USEFUL,):
            yield Found(_offloading(shape, at_level(best, level, left_open), left_open, 2), 3, 2)
    for uva in (False, True):  # without buffers, where host memory or the card is too small for those
        for level in LEVELS[6:]:
            for requests in (2, 1):
                tight = at_level(best, level, left_open)
                yield Found(_offloading(shape, tight, left_open, requests, uva), 4, requests)


def _offloading(shape: ModelShape, start: Choices, left_open: frozenset[str], requests: int,
                uva: bool = False) -> Choices:
    """With the least offload, without CUDA graphs where most of a pass is waiting for the link, and with guesses."""

    def least(choices: Choices) -> Choices:
        return least_offload(shape, choices, requests, uva) if "offload_bytes" in left_open else choices

    def mostly_waits(choices: Choices) -> bool:
        return 2 * offloaded_bytes(shape, choices) > layer_bytes(shape, start)[0]

    guessing = start
    if "speculative_tokens" in left_open and not uva and not shape.experts:
        guessing = replace(start, speculative_tokens=max(0, min(GUESSED, _CHECKED // start.max_num_seqs - 1)))
        if "capture_limit" in left_open:  # graphs as without guesses, so that these cost no memory
            guessing = replace(guessing, capture_limit=2 * start.max_num_seqs)
    found = least(guessing)
    if "eager" in left_open and mostly_waits(found):
        return least(replace(guessing, eager=True))
    checks_for_free = mostly_waits(found) or (found.quantization != "bitsandbytes" and offloaded_bytes(shape, found))
    return found if checks_for_free else least(start)


def fewer_graphs(choices: Choices) -> Iterator[Choices]:
    """With CUDA graphs for smaller and smaller batches only, down to one request alone."""
    if not choices.eager:
        yield from (replace(choices, capture_limit=most) for most in reversed(captured_sizes(choices)[:-1]))


def at_level(choices: Choices, level: Level, left_open: frozenset[str]) -> Choices:
    """The choices at a level, as far as they are left open; given values are bounds."""
    changes: dict[str, int] = {}
    sequences = min(level.sequences, choices.max_num_seqs) if "max_num_seqs" in left_open else choices.max_num_seqs
    length = min(level.context, choices.max_model_len) if "max_model_len" in left_open else choices.max_model_len
    if "max_model_len" in left_open:
        changes["max_model_len"] = length
    if "max_num_seqs" in left_open:
        changes["max_num_seqs"] = sequences
    if "max_num_batched_tokens" in left_open:
        most = min(level.tokens, choices.max_num_batched_tokens, sequences * length)
        changes["max_num_batched_tokens"] = max(most, sequences)
    return replace(choices, **changes)  # type: ignore[arg-type]  # mypy takes the dictionary for every field's value


def missing_bytes(shape: ModelShape, choices: Choices, requests: int = 1) -> int:
    """Bytes that the fullest GPU lacks for that many requests of full length; negative where there is room.

    vLLM refuses to start when the KV cache holds less than one request of full length.
    """
    least = kv_bytes(shape, choices, requests)
    loading = loading_bytes(shape, choices)
    lacks = []
    for parts in estimate(shape, choices):
        others = parts.total_bytes - parts.kv_cache_bytes + MARGIN_BYTES
        compiling = parts.total_bytes - parts.kv_cache_bytes - parts.activations_bytes - parts.cuda_graphs_bytes + \
            compiling_bytes(shape, choices)
        lacks.append(compiling + MARGIN_BYTES - choices.limit_bytes)
        lacks.append(parts.weights_bytes + parts.quant_state_bytes + parts.embeddings_bytes + parts.framework_bytes
                     + loading + MARGIN_BYTES - choices.limit_bytes)
        if choices.kv_cache_bytes is not None:
            lacks.append(max(others + choices.kv_cache_bytes - choices.limit_bytes, least - choices.kv_cache_bytes))
        else:
            lacks.append(others + least - choices.limit_bytes)
    return max(lacks)


def least_offload(shape: ModelShape, choices: Choices, requests: int, uva: bool = False) -> Choices:
    """The choices with no more layers in host memory than leaves room for that many requests.

    `offload_bytes` bounds it; as many layers as that allows where even those do not make enough room.
    """
    none = replace(choices, offload_bytes=0)
    needed = missing_bytes(shape, none, requests)
    if needed <= 0:
        return none
    if uva or not shape.understood:
        steps = math.ceil(needed * choices.pipeline_parallel / OFFLOAD_STEP_BYTES) * OFFLOAD_STEP_BYTES
        return replace(choices, offload_bytes=min(choices.offload_bytes, steps, _whole(shape, choices)))

    def enough(layers: int) -> bool:
        more = with_offload(shape, none, layers)
        return offloaded_bytes(shape, more) > choices.offload_bytes or missing_bytes(shape, more, requests) <= 0

    counts = range(1, shape.layers + 1)
    layers = min(1 + bisect.bisect_left(counts, True, key=enough), shape.layers)
    while layers and offloaded_bytes(shape, with_offload(shape, none, layers)) > choices.offload_bytes:
        layers -= 1
    return with_offload(shape, none, layers) if layers else none


def with_offload(shape: ModelShape, choices: Choices, layers: int) -> Choices:
    """The choices with that many layers, or a few more, in host memory.

    By prefetch, and the embedding with them, of which a token needs one row; by UVA where the architecture is not
    known, since prefetch wants one stack of layers.
    """
    if not shape.understood:
        size = _whole(shape, choices) * layers / shape.layers
        return replace(choices, offload_bytes=math.ceil(size / OFFLOAD_STEP_BYTES) * OFFLOAD_STEP_BYTES)
    stages = choices.pipeline_parallel
    pattern = spread(-(-shape.layers // stages), -(-layers // stages))
    return replace(choices, offload_bytes=0, prefetch=(*pattern, BUFFERS), embedding_on_host=not shape.tied_embeddings)


def _whole(shape: ModelShape, choices: Choices) -> int:
    """All layers, in whole steps of UVA offload."""
    return math.ceil(layer_bytes(shape, choices)[0] / OFFLOAD_STEP_BYTES) * OFFLOAD_STEP_BYTES


def offload_options(choices: Choices) -> dict[str, object]:
    """The engine's options for the choices' offload; what is not used is 0 or left out."""
    options: dict[str, object] = {"cpu-offload-gb": round(choices.offload_bytes / GIB, 1)}
    group, last, steps = choices.prefetch
    if group:
        options |= {"offload-backend": "prefetch", "offload-group-size": group, "offload-num-in-group": last,
                    "offload-prefetch-step": steps}
    if choices.embedding_on_host:
        options["additional-config"] = {"shoehorn": {"embedding": "host"}}
    return options


@functools.cache
def spread(layers: int, wanted: int) -> tuple[int, int]:
    """(group size, last layers of each) that take `wanted` of the layers, or a twentieth more: the smallest groups.

    The smaller the groups, the more evenly the copies spread over a pass.
    """
    most = wanted + wanted // 20
    return next((group, last) for group in range(1, layers + 1) for last in range(1, group + 1)
                if wanted <= layers // group * last + max(0, layers % group - group + last) <= most)
