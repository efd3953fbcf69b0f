"""The engine did not start, most often for want of memory -> the smallest change that should do, from a stated ladder.

The ladder: a smaller KV cache, as long as one request has room in it; then fewer tokens in a batch, fewer sequences,
a shorter context, CUDA graphs for smaller batches only, none, more offload. The first rung that is enough alone is
taken; where none is, all of them from the top until it is enough. What the user fixed is never touched. A failure that
is not about memory is answered by another number format where the card lacks one, else by no guessed tokens where the
plan had some.
Rules: pure; at most `TRIES` steps a start; each is logged with before and after.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from shoehorn.common.units import MIB, format_size
from shoehorn.engine.diagnosis import Diagnosis
from shoehorn.model.shape import ModelShape
from shoehorn.planner.memory.activations import captured_sizes
from shoehorn.planner.memory.estimate import CONTEXT_BYTES, estimate, host_bytes, kv_bytes
from shoehorn.planner.memory.offload import offloaded_bytes
from shoehorn.planner.placement import with_offload
from shoehorn.planner.search import fewer_graphs
from shoehorn.planner.serving_config import Choices
from shoehorn.planner.vllm_args import offload_options

TRIES = 5

_OFFLOAD = ("cpu-offload-gb", "offload-backend", "offload-group-size", "offload-num-in-group", "offload-prefetch-step",
            "additional-config")

LADDER = ("quantization", "speculative-config", "max-num-batched-tokens", "max-num-seqs", "max-model-len",
          "max-cudagraph-capture-size", "enforce-eager", *_OFFLOAD)
"""The options that a step holds fast, but for those that it changes."""

_LEAST_BYTES = 128 * MIB
"""A step frees at least this, and twice as much at every further one: the engine names what one allocation lacked."""

_LEAST_TOKENS, _LEAST_SEQUENCES, _LEAST_CONTEXT = 128, 1, 512


@dataclass(frozen=True)
class Step:
    """A change of the engine's options; `text` names each with before and after."""

    options: Mapping[str, object]
    text: str


def next_step(shape: ModelShape, choices: Choices, fixed: frozenset[str], options: Mapping[str, object],
              card_bytes: int, host_memory_bytes: int, diagnosis: Diagnosis, tries: int) -> Step | None:
    """The change for the next try; None when nothing that may be changed would be enough.

    Args:
        choices: those of the start that failed.
        fixed: options that the user gave; options: all of that start.
        card_bytes: of the smallest card, whole.
        host_memory_bytes: 0 where unknown.
        tries: steps that were made before.
    """
    if tries >= TRIES:
        return None
    if diagnosis.name == "unsupported_dtype" and "dtype" not in fixed and options.get("dtype") != "float16":
        return Step({"dtype": "float16"}, f"dtype {options.get('dtype', 'of the checkpoint')} -> float16")
    if not diagnosis.memory:
        return Step({"speculative-config": None}, "guessed tokens -> none") if speculates(options, fixed) else None
    goal = max(diagnosis.missing_bytes + _LEAST_BYTES // 2, _LEAST_BYTES << tries)
    before = _needed(shape, choices)
    gathered = choices
    if "gpu-memory-utilization" in fixed:  # the engine itself makes the cache of what is left
        if diagnosis.name == "gpu_in_use" or diagnosis.cache_made:
            return None
    else:
        gathered = replace(choices, limit_bytes=choices.limit_bytes - goal)
        goal = _needed(shape, gathered) - gathered.limit_bytes
        if goal <= 0:
            return _step(shape, choices, gathered, card_bytes)
        before = _needed(shape, gathered)
    for rung in _rungs(shape, gathered, fixed, host_memory_bytes, goal):
        if before - _needed(shape, rung) >= goal:
            return _step(shape, choices, rung, card_bytes)
    for rung in _rungs(shape, gathered, fixed, host_memory_bytes, goal, gather=True):
        if before - _needed(shape, rung) >= goal:
            return _step(shape, choices, rung, card_bytes)
    return None


def speculates(options: Mapping[str, object], fixed: frozenset[str]) -> bool:
    """Whether tokens are guessed without the engine's having been told so: not every model allows it."""
    return bool(options.get("speculative-config")) and "speculative-config" not in fixed


def _needed(shape: ModelShape, choices: Choices) -> int:
    """What the fullest GPU needs for one request of full length."""
    return max(parts.total_bytes - parts.kv_cache_bytes for parts in estimate(shape, choices)) + kv_bytes(
        shape, choices)


def _rungs(shape: ModelShape, start: Choices, fixed: frozenset[str], host_memory_bytes: int, goal_bytes: int,
           gather: bool = False) -> Iterator[Choices]:
    """The choices of every rung, the least change first; each from the start, or with all rungs above it."""
    choices = start
    halved = (("max-num-batched-tokens", "max_num_batched_tokens", max(_LEAST_TOKENS, choices.max_num_seqs)),
              ("max-num-seqs", "max_num_seqs", _LEAST_SEQUENCES), ("max-model-len", "max_model_len", _LEAST_CONTEXT))
    for option, field, least in halved:
        if option in fixed:
            continue
        value, rung = getattr(choices, field), choices
        while value // 2 >= least:
            value //= 2
            rung = replace(choices, **{field: value})
            yield rung
        choices = rung if gather else start
    if "max-cudagraph-capture-size" not in fixed:
        yield from fewer_graphs(choices)
    if "enforce-eager" not in fixed and not choices.eager:
        rung = replace(choices, eager=True)
        yield rung
        choices = rung if gather else start
    if fixed.intersection(_OFFLOAD):
        return
    before, held = _needed(shape, choices), offloaded_bytes(shape, choices)
    for layers in range(1, shape.layers + 1):
        rung = with_offload(shape, choices, layers)
        if offloaded_bytes(shape, rung) > held and (not host_memory_bytes
                                                    or host_bytes(shape, rung) <= host_memory_bytes):
            yield rung
            if before - _needed(shape, rung) >= goal_bytes:
                return


def _step(shape: ModelShape, before: Choices, after: Choices, card_bytes: int) -> Step:
    options: dict[str, object] = {}
    words = []
    if after.limit_bytes != before.limit_bytes:
        share = (after.limit_bytes - CONTEXT_BYTES) / card_bytes
        options["gpu-memory-utilization"] = math.floor(share * 10_000) / 10_000
        words.append(f"memory of the card {format_size(before.limit_bytes)} -> {format_size(after.limit_bytes)}")
    for option, field in (("max-num-batched-tokens", "max_num_batched_tokens"), ("max-num-seqs", "max_num_seqs"),
                          ("max-model-len", "max_model_len")):
        if getattr(after, field) != getattr(before, field):
            options[option] = getattr(after, field)
            words.append(f"{option} {getattr(before, field)} -> {getattr(after, field)}")
    if after.capture_limit != before.capture_limit and not after.eager:
        options["max-cudagraph-capture-size"] = after.capture_limit
        words.append(f"CUDA graphs for {captured_sizes(before)[-1]} tokens at a time -> {after.capture_limit}")
    if after.eager != before.eager:
        options["enforce-eager"] = True
        words.append("CUDA graphs -> none")
    held, moved = offloaded_bytes(shape, before), offloaded_bytes(shape, after)
    if moved != held:
        options |= offload_options(after)
        words.append(f"weights in host memory {format_size(held)} -> {format_size(moved)}")
    return Step(options, ", ".join(words))
