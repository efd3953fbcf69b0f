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

from collections.abc import Iterator
from dataclasses import dataclass, replace

from shoehorn.common.units import GIB
from shoehorn.model.shape import ModelShape
from shoehorn.planner.memory.activations import captured_sizes
from shoehorn.planner.memory.estimate import host_bytes
from shoehorn.planner.memory.fit import missing_bytes
from shoehorn.planner.memory.offload import offloaded_bytes
from shoehorn.planner.memory.weights import layer_bytes
from shoehorn.planner.placement import least_offload
from shoehorn.planner.serving_config import LEVELS, Choices, Level

GUESSED = 8
"""Tokens that n-gram look-up guesses at a time."""

_CHECKED = 128
"""Tokens of all requests together that are checked in a pass, at most: a small card hides so many behind the link."""

_LARGE_BYTES = 20 * GIB
"""GPUs that hold this much together are offered the longer of the useful contexts."""

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
