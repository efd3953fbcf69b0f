"""Offload to host memory: as little as possible, spread over the layers."""

from __future__ import annotations

import pytest

from shoehorn.planner.least_offload import spread
from shoehorn.planner.serving_config import PrefetchOffload
from support.plans import (
    GIB,
    HUGE,
    LARGE,
    MIDDLE,
    TWENTY,
    llama_8b,
    llama_70b,
    machine,
    planned,
    reason,
    reason_of,
)


def test_weights_that_fit_are_not_offloaded() -> None:
    plan = planned(machine(MIDDLE), llama_8b(), QUANTIZATION="none", VRAM_PROFILE="32gb")
    assert reason(plan, "cpu-offload-gb")[:2] == (0, "machine")
    assert plan.host_pinned_bytes == 0


def test_least_offload_leaves_memory_for_two_requests() -> None:
    plan = planned(machine(TWENTY, TWENTY), llama_70b(), VRAM_PROFILE="2x20gb")
    offload = plan.config.offload
    assert isinstance(offload, PrefetchOffload)
    assert reason(plan, "offload-group-size") == (offload.group, "machine", "offload-least")
    params = reason_of(plan, "offload-group-size").params
    assert (params["requests"], params["context"]) == ("two requests", 8192)
    assert 2 * 8192 <= plan.kv_cache_tokens < 2 * 8192 + 2700, "of a layer or two, at 160 kB a token"
    longer = planned(machine(TWENTY, TWENTY), llama_70b(), MAX_MODEL_LEN="12288", VRAM_PROFILE="2x20gb")
    assert longer.offloaded_bytes > plan.offloaded_bytes


def test_profiles_offload_is_an_upper_bound() -> None:
    plan = planned(machine(LARGE), llama_70b(), MAX_MODEL_LEN="22000", VRAM_PROFILE="32gb")
    assert 19 * GIB < plan.offloaded_bytes <= 20 * GIB
    assert "cpu-offload-gb" not in plan.engine_args, "the upper bound is not an option of the plan"


@pytest.mark.parametrize("layers", [1, 7, 24, 32, 61, 80])
def test_offloaded_layers_are_spread_and_never_fewer_than_needed(layers: int) -> None:
    for least in range(1, layers + 1):
        group, last = spread(layers, least)
        offloaded = [layer for layer in range(layers) if layer % group >= group - last]
        assert least <= len(offloaded) <= least + least // 20
    assert spread(layers, layers) == (1, 1)


def test_offload_includes_the_embedding_and_keeps_the_users_configuration() -> None:
    plan = planned(machine(MIDDLE), llama_70b())
    assert plan.engine_args["additional-config"] == {"shoehorn": {"embedding": "host"}}
    assert plan.vram[0].embeddings_bytes == llama_70b().tensor_bytes.lm_head.parameters * 2
    configured = planned(machine(MIDDLE), llama_70b(), VLLM_EXTRA_ARGS="--additional-config '{\"other\": 1}'")
    assert configured.engine_args["additional-config"] == {"other": 1, "shoehorn": {"embedding": "host"}}


def test_given_offload_is_used() -> None:
    plan = planned(machine(HUGE), llama_8b(), VLLM_EXTRA_ARGS="--cpu-offload-gb 2")
    assert reason(plan, "cpu-offload-gb")[:2] == (2.0, "setting")
    assert plan.host_pinned_bytes == 2 * GIB


def test_given_prefetch_offload_is_estimated() -> None:
    plan = planned(machine(MIDDLE), llama_70b(), VLLM_EXTRA_ARGS="--offload-group-size 1 --offload-prefetch-step 2")
    assert plan.vram[0].offload_buffer_bytes > 0
    assert plan.vram[0].weights_bytes < GIB
