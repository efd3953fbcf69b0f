"""Steps down: the smallest change of a configuration that is enough after a failed start."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoehorn.model.shape import ModelShape
from shoehorn.planner.memory.model import CONTEXT_BYTES, MemoryModel
from shoehorn.planner.memory.offload import offloaded_layers
from shoehorn.planner.serving_config import Limits, NoOffload, Offload, PrefetchOffload, ServingConfig
from shoehorn.planner.step_down import MAX_STEPS, Change, FailedStart, Step, StepDown
from shoehorn.planner.vllm_args import with_options
from support.plans import GIB, configured, llama_8b, llama_70b

MIB = 1 << 20
START = ServingConfig(24 * GIB, Limits(max_model_len=16384, max_num_seqs=64, max_num_batched_tokens=4096))
ALL_FIXED = frozenset({"max-num-batched-tokens", "max-num-seqs", "max-model-len", "max-cudagraph-capture-size",
                       "enforce-eager", "cpu-offload-gb"})
BY_SHARE = frozenset({"gpu-memory-utilization"})
"""The user's own share of the GPU: vLLM sizes the KV cache, and a step frees memory for it."""

NO_MEMORY, UNKNOWN = FailedStart(is_memory=True), FailedStart(is_memory=False)
OFFLOAD_OPTIONS = {"cpu-offload-gb", "offload-backend", "offload-group-size", "offload-num-in-group",
                   "offload-prefetch-step", "additional-config"}


def lacks(missing_bytes: int) -> FailedStart:
    return FailedStart(is_memory=True, missing_bytes=missing_bytes)


def step(failure: FailedStart, config: ServingConfig = START, fixed: frozenset[str] = frozenset(), steps: int = 0,
         host: int = 0, shape: ModelShape | None = None) -> Step | None:
    """The next step where vLLM sizes the KV cache."""
    model = MemoryModel(shape or llama_8b(), config)
    return StepDown(model, fixed | BY_SHARE, {}, 24 * GIB, host).next_step(failure, steps)


def planned_step(failure: FailedStart, steps: int = 0, fixed: frozenset[str] = frozenset(),
                 options: dict[str, object] | None = None) -> Step | None:
    """The next step where the plan sizes the KV cache."""
    return StepDown(MemoryModel(llama_8b(), START), fixed, options or {}, 24 * GIB, 0).next_step(failure, steps)


def missing_bytes(config: ServingConfig) -> int:
    return MemoryModel(llama_8b(), config).missing_bytes()


def offload(step: Step) -> Offload:
    return with_options(START, step.options).offload


def test_failure_without_lack_of_memory_has_no_step() -> None:
    assert step(UNKNOWN) is None


def test_unrequested_draft_tokens_are_dropped_after_an_unknown_failure() -> None:
    options: dict[str, object] = {"speculative-config": {"method": "ngram"}}
    assert planned_step(UNKNOWN, options=options) == Step({"speculative-config": None},
                                                          (Change("draft tokens", "some", "none"),))
    assert planned_step(UNKNOWN, options=options, fixed=frozenset({"speculative-config"})) is None
    memory = planned_step(NO_MEMORY, options=options)
    assert memory is None or "speculative-config" not in memory.options, "they take next to no memory"


def test_first_rung_that_is_enough_alone_is_taken() -> None:
    halved = Change("max-num-batched-tokens", "4096", "2048")
    assert step(NO_MEMORY) == Step({"max-num-batched-tokens": 2048}, (halved,))
    other = step(NO_MEMORY, fixed=frozenset({"max-num-batched-tokens"}))
    assert other
    assert set(other.options) <= {"max-num-seqs", "max-model-len"}
    much = step(lacks(3 * GIB))
    assert much
    assert set(much.options) == OFFLOAD_OPTIONS, "no other rung frees so much alone"


def test_rungs_are_combined_where_none_is_enough_alone() -> None:
    result = step(lacks(2200 * MIB), fixed=frozenset({"cpu-offload-gb"}))
    assert result
    assert list(result.options) == ["max-num-batched-tokens", "max-num-seqs", "max-model-len"]
    assert [change.subject for change in result.changes] == list(result.options)
    assert result.text.count(" -> ") == 3


@pytest.mark.parametrize("missing", [0, 200 * MIB, GIB, 2 * GIB])
def test_every_step_frees_the_missing_memory(missing: int) -> None:
    result = step(lacks(missing))
    assert result
    assert missing_bytes(START) - missing_bytes(with_options(START, result.options)) >= missing


def test_options_of_the_user_are_never_changed() -> None:
    assert step(NO_MEMORY, fixed=ALL_FIXED) is None


def test_graphs_for_small_batches_are_kept_where_that_is_enough() -> None:
    many = configured(START, max_num_seqs=256, tensor=2)  # 51 graphs of each kind
    others = ALL_FIXED - {"max-cudagraph-capture-size", "enforce-eager"}
    result = step(lacks(300 * MIB), many, others)
    assert result
    assert list(result.options) == ["max-cudagraph-capture-size"]
    largest = result.options["max-cudagraph-capture-size"]
    assert isinstance(largest, int)
    assert 256 < largest < 512, "no fewer than are enough"
    assert result.changes == (Change("largest CUDA graph", "512", str(largest)),)
    assert missing_bytes(many) - missing_bytes(replace(many, capture_limit=largest)) >= 300 * MIB
    with_user_limit = step(lacks(300 * MIB), many, others | {"max-cudagraph-capture-size"})
    assert with_user_limit == Step({"enforce-eager": True}, (Change("CUDA graphs", "some", "none"),))


def test_out_of_memory_makes_the_cache_smaller() -> None:
    out_of_memory = FailedStart(is_memory=True, has_kv_cache=True, missing_bytes=500 * MIB)
    assert step(out_of_memory) is None, "the user's own share is kept"
    result = planned_step(out_of_memory)
    assert result
    share = result.options["gpu-memory-utilization"]
    assert isinstance(share, float)
    assert share * 24 * GIB + CONTEXT_BYTES <= START.limit_bytes - 500 * MIB
    assert list(result.options) == ["gpu-memory-utilization"]


def test_gpu_used_by_others_gets_a_smaller_limit() -> None:
    result = planned_step(FailedStart(is_memory=True, is_gpu_in_use=True, missing_bytes=10 * GIB))
    assert result
    share = result.options["gpu-memory-utilization"]
    assert isinstance(share, float)
    assert share < 0.6
    assert "offload-group-size" in result.options, "an 8B does not fit into the 14 GiB that are left"
    assert step(FailedStart(is_memory=True, is_gpu_in_use=True, missing_bytes=GIB)) is None


def test_offload_goes_no_further_than_host_memory() -> None:
    rest = ALL_FIXED - {"cpu-offload-gb"}
    assert step(lacks(GIB), fixed=rest, host=64 * GIB) is not None
    assert step(lacks(GIB), fixed=rest, host=4 * GIB) is None


def test_steps_grow_and_end() -> None:
    assert step(NO_MEMORY, steps=MAX_STEPS) is None
    in_use = FailedStart(is_memory=True, is_gpu_in_use=True, missing_bytes=10 * GIB)
    assert planned_step(in_use, fixed=ALL_FIXED) is None, "nothing may be made smaller"
    sizes = []
    for steps in range(MAX_STEPS):
        result = step(NO_MEMORY, fixed=ALL_FIXED - {"cpu-offload-gb"}, steps=steps, shape=llama_70b())
        assert result
        sizes.append(offloaded_layers(offload(result), llama_70b().layers))
    assert sizes == sorted(sizes)
    assert sizes[-1] >= 3 * sizes[0] > 0


def test_offload_of_a_step_is_read_back() -> None:
    result = step(lacks(3 * GIB))
    assert result
    assert isinstance(offload(result), PrefetchOffload)
    assert result.options["cpu-offload-gb"] == 0
    assert offload(Step({"max-num-seqs": 1}, ())) == NoOffload()


def test_unsupported_dtype_becomes_float16_once() -> None:
    failure = FailedStart(is_memory=False, is_dtype=True)
    assert step(failure) == Step({"dtype": "float16"}, (Change("dtype", "of the checkpoint", "float16"),))
    assert step(failure, fixed=frozenset({"dtype"})) is None
    assert planned_step(failure, 1, options={"dtype": "float16"}) is None


@pytest.mark.parametrize(("limits", "fixed", "options"), [
    ({"max-num-seqs": 40}, (), {"max-num-seqs": 40}), ({"max-model-len": 8000}, (), {"max-model-len": 8000}),
    ({"max-num-batched-tokens": 16384}, (), {"max-num-batched-tokens": 16384}),
    ({"max-num-seqs": 40}, ("max-num-seqs",), None), ({"max-num-seqs": 64}, (), None), ({"max-num-seqs": 0}, (), None),
    ({"max-num-batched-tokens": 128}, (), None)])
def test_value_that_the_engine_names_is_taken(limits: dict[str, int], fixed: tuple[str, ...],
                                              options: dict[str, object] | None) -> None:
    result = planned_step(FailedStart(is_memory=False, limits=limits), fixed=frozenset(fixed))
    assert (result.options if result else None) == options
    if result:
        (change,) = result.changes
        assert change.after == str(limits[change.subject])


def test_context_that_the_engine_names_comes_before_the_ladder_unless_the_user_gave_another() -> None:
    failure = FailedStart(is_memory=True, missing_bytes=GIB, limits={"max-model-len": 12000})
    taken, ladder = planned_step(failure), planned_step(failure, fixed=frozenset({"max-model-len"}))
    assert taken
    assert taken.options == {"max-model-len": 12000}
    assert ladder
    assert "max-model-len" not in ladder.options
