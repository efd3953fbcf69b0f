"""The next smaller configuration after a failed engine start, usually for lack of memory.

The ladder: a smaller KV cache, as long as one request fits into it; then fewer tokens in a batch, fewer sequences, a
shorter context, CUDA graphs for smaller batches only, none, more offload. The first rung that is enough alone is taken;
where none is, all of them from the top until it is enough. Options that the user gave are never changed. A failure that
is not about memory is answered by another dtype where the GPU lacks one, else by no draft tokens.
Rules: pure; at most `MAX_STEPS` steps a start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from shoehorn.common.units import MIB, format_size
from shoehorn.planner.least_offload import with_offload
from shoehorn.planner.memory.activations import captured_sizes
from shoehorn.planner.memory.model import CONTEXT_BYTES, MemoryModel
from shoehorn.planner.search import with_fewer_graphs
from shoehorn.planner.serving_config import ExpertCacheOffload, HybridOffload, ServingConfig
from shoehorn.planner.throughput import divided_tokens, least_slots
from shoehorn.planner.vllm_args import KNOBS, Field, offload_options

MAX_STEPS = 5

KEPT_OPTIONS = tuple(knob.option for knob in KNOBS if knob.keeps)
"""Options that a step keeps as they are, but for those that it changes."""

_OFFLOAD_OPTIONS = frozenset(knob.option for knob in KNOBS if knob.field is Field.OFFLOAD)

_LEAST_BYTES = 128 * MIB
"""A step frees at least this, and twice as much at every further one: the engine names what one allocation lacked."""

_LEAST_TOKENS, _LEAST_SEQUENCES, _LEAST_CONTEXT = 128, 1, 512
_HALVED = {"max-num-batched-tokens": "max_num_batched_tokens", "max-num-seqs": "max_num_seqs",
           "max-model-len": "max_model_len"}


@dataclass(frozen=True)
class FailedStart:
    """Facts about an engine start that failed.

    Attributes:
        is_memory: memory ran out or was missing; is_dtype: the GPU does not support the dtype.
        is_gpu_in_use: other processes use the GPU's memory.
        has_kv_cache: it failed after the KV cache was allocated.
        missing_bytes: memory that was missing; 0 where unknown.
        limits: values of options with which the engine says that it can start.
    """

    is_memory: bool
    is_dtype: bool = False
    is_gpu_in_use: bool = False
    has_kv_cache: bool = False
    missing_bytes: int = 0
    limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """One change of a step, for a log line: subject, before, after."""

    subject: str
    before: str
    after: str


@dataclass(frozen=True)
class Step:
    """A change of vLLM's options; None drops an option."""

    options: Mapping[str, object]
    changes: tuple[Change, ...]

    @property
    def text(self) -> str:
        """All changes in one line."""
        return ", ".join(f"{change.subject} {change.before} -> {change.after}" for change in self.changes)


@dataclass(frozen=True)
class StepDown:
    """The start that failed, and the bounds of a smaller one.

    Attributes:
        fixed: options that the user gave; options: all of that start.
        gpu_bytes: whole memory of the smallest GPU.
        host_memory_bytes: 0 where unknown.
    """

    model: MemoryModel
    fixed: frozenset[str]
    options: Mapping[str, object]
    gpu_bytes: int
    host_memory_bytes: int

    def next_step(self, failure: FailedStart, steps: int) -> Step | None:
        """Choose the change for the next start; None when nothing that may be changed is enough.

        Args:
            steps: number of steps made before.
        """
        if steps >= MAX_STEPS:
            return None
        if step := self._within_limits(failure.limits):
            return step
        if failure.is_dtype and "dtype" not in self.fixed and self.options.get("dtype") != "float16":
            before = str(self.options.get("dtype", "of the checkpoint"))
            return Step({"dtype": "float16"}, (Change("dtype", before, "float16"),))
        if not failure.is_memory:
            return Step({"speculative-config": None}, (Change("draft tokens", "some", "none"),)) \
                if uses_unrequested_drafts(self.options, self.fixed) else None
        return self._free_memory(failure, max(failure.missing_bytes + _LEAST_BYTES // 2, _LEAST_BYTES << steps))

    def _within_limits(self, limits: Mapping[str, int]) -> Step | None:
        """Take the values that the engine named; None where the user gave these options, or they are kept already."""
        limited = {option: value for option, value in limits.items()
                   if option not in self.fixed and value >= 1 and self._differs(option, value)}
        if not limited:
            return None
        return Step(limited, tuple(Change(option, str(self._current(option)), str(value))
                                   for option, value in limited.items()))

    def _differs(self, option: str, value: int) -> bool:
        current = self._current(option)
        return value > current if option == "max-num-batched-tokens" else value < current

    def _current(self, option: str) -> int:
        return int(getattr(self.model.config.limits, _HALVED[option]))

    def _free_memory(self, failure: FailedStart, goal_bytes: int) -> Step | None:
        """Find the smallest change that frees that much of each GPU."""
        reduced = self.model
        if "gpu-memory-utilization" in self.fixed:  # vLLM itself gives the KV cache what is left
            if failure.is_gpu_in_use or failure.has_kv_cache:
                return None
        else:
            config = replace(self.model.config, limit_bytes=self.model.config.limit_bytes - goal_bytes)
            reduced = self.model.with_config(config)
            goal_bytes = _needed_bytes(reduced) - config.limit_bytes
            if goal_bytes <= 0:
                return self._step(config)
        enough = _needed_bytes(reduced) - goal_bytes
        for gather in (False, True):
            for config in self._rungs(reduced, gather):
                if _needed_bytes(reduced.with_config(config)) <= enough:
                    return self._step(config)
        return None

    def _rungs(self, start: MemoryModel, gather: bool) -> Iterator[ServingConfig]:
        """Yield the configuration of every rung, the least change first.

        Args:
            gather: each rung includes all rungs above it; else it changes the start alone.
        """
        config = start.config
        for option, name in _HALVED.items():
            if option in self.fixed:
                continue
            rung = config
            for value in _halves(getattr(config.limits, name), _least(option, start.config)):
                rung = config.with_limits(**{name: value})
                yield rung
            config = rung if gather else config
        if "max-cudagraph-capture-size" not in self.fixed:
            yield from with_fewer_graphs(config)
        if "enforce-eager" not in self.fixed and not config.eager:
            rung = replace(config, eager=True)
            yield rung
            config = rung if gather else config
        if not self.fixed & _OFFLOAD_OPTIONS:
            yield from self._offloads(start.with_config(config))

    def _offloads(self, start: MemoryModel) -> Iterator[ServingConfig]:
        """Yield configurations with more and more offloaded layers, as far as host memory allows."""
        offload, experts = start.config.offload, start.shape.experts
        if isinstance(offload, ExpertCacheOffload) and experts:
            for slots in range(offload.slots - 1, least_slots(experts, offload.computed) - 1, -1):
                divided = 0 if offload.computed else divided_tokens(experts, slots)
                most = captured_sizes(replace(start.config, capture_limit=min(
                    start.config.capture_limit or 512, offload.computed or divided)))[-1]
                yield replace(start.config, offload=replace(offload, slots=slots, divided=divided), capture_limit=most)
            return
        levels = offload.levels if isinstance(offload, HybridOffload) else ()
        for layers in range(1, start.shape.layers + 1):
            rung = start.with_config(with_offload(start.weights, layers, levels))
            fits_host = not self.host_memory_bytes or rung.host_beside_gpus().total_bytes <= self.host_memory_bytes
            if rung.offloaded.stage_bytes(0) > start.offloaded.stage_bytes(0) and fits_host:
                yield rung.config

    def _step(self, after: ServingConfig) -> Step:
        """Express a configuration as a change of the options."""
        before, model = self.model.config, self.model.with_config(after)
        options: dict[str, object] = {}
        changes = []
        if after.limit_bytes != before.limit_bytes:
            share = (after.limit_bytes - CONTEXT_BYTES) / self.gpu_bytes
            options["gpu-memory-utilization"] = math.floor(share * 10_000) / 10_000
            changes.append(_sizes("GPU memory limit", before.limit_bytes, after.limit_bytes))
        for option, name in _HALVED.items():
            old, new = getattr(before.limits, name), getattr(after.limits, name)
            if new != old:
                options[option] = new
                changes.append(Change(option, str(old), str(new)))
        if after.capture_limit != before.capture_limit and not after.eager:
            options["max-cudagraph-capture-size"] = after.capture_limit
            changes.append(Change("largest CUDA graph", str(captured_sizes(before)[-1]), str(after.capture_limit)))
        if after.eager != before.eager:
            options["enforce-eager"] = True
            changes.append(Change("CUDA graphs", "some", "none"))
        old, new = self.model.offloaded.buffers_bytes, model.offloaded.buffers_bytes
        if new != old and isinstance(after.offload, ExpertCacheOffload):
            options |= {option: value for option, value in offload_options(after).items() if value}
            changes.append(_sizes("cache of experts", old, new))
        old, new = self.model.offloaded.stage_bytes(0), model.offloaded.stage_bytes(0)
        if new != old:
            options |= offload_options(after)
            changes.append(_sizes("offloaded weights", old, new))
        return Step(options, tuple(changes))


def uses_unrequested_drafts(options: Mapping[str, object], fixed: frozenset[str]) -> bool:
    """Return whether speculative decoding is on without the user's request: not every model supports it."""
    return bool(options.get("speculative-config")) and "speculative-config" not in fixed


def _needed_bytes(model: MemoryModel) -> int:
    """Memory of the fullest GPU for one request of full length, as if all were as small as the smallest."""
    return max(gpu.total_bytes - gpu.kv_cache_bytes - (gpu.limit_bytes - model.config.limit_bytes)
               for gpu in model.gpus) + model.kv_bytes()


def _least(option: str, start: ServingConfig) -> int:
    """Smallest value of an option that a step may choose."""
    return {"max-num-batched-tokens": max(_LEAST_TOKENS, start.limits.max_num_seqs),
            "max-num-seqs": _LEAST_SEQUENCES, "max-model-len": _LEAST_CONTEXT}[option]


def _halves(value: int, least: int) -> Iterator[int]:
    """Yield half of a value, a quarter and so on, down to the least."""
    while value // 2 >= least:
        value //= 2
        yield value


def _sizes(subject: str, before: int, after: int) -> Change:
    return Change(subject, format_size(before), format_size(after))
