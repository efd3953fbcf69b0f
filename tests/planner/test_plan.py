"""The plan itself: JSON, devices, placement, remarks, expected rates."""

from __future__ import annotations

import json
from dataclasses import replace

from fakes.checkpoint_files import checkpoint
from shoehorn.model import checkpoint as checkpoints
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.plan import Refusal
from shoehorn.planner.serving_config import PrefetchOffload
from support.plans import (
    CPU_ONLY,
    GIB,
    LARGE,
    MIDDLE,
    SMALL,
    TWENTY,
    llama_8b,
    llama_70b,
    machine,
    planned,
    reason,
    refused,
    tiny,
)


def test_rate_depends_on_pcie_when_offloaded_and_is_unknown_on_the_cpu() -> None:
    fast = planned(replace(machine(MIDDLE), gpus=(replace(machine(MIDDLE).gpus[0], pcie_generation=5),)), llama_70b())
    slow = planned(machine(MIDDLE), llama_70b())
    assert fast.expected_tokens_per_second["batch_1"] > slow.expected_tokens_per_second["batch_1"]  # type: ignore[operator]  # both are numbers
    plan = planned(CPU_ONLY, tiny(), VRAM_PROFILE="cpu")
    assert plan.expected_tokens_per_second == {"batch_1": None, "batch_8": None}
    assert reason(plan, "speed")[1] == "machine"


def test_unequal_gpus_are_used_together_where_that_is_faster() -> None:
    plan = planned(machine(LARGE, TWENTY), llama_70b())
    assert reason(plan, "gpus") == (2, "machine", "mixed-gpus")
    assert [gpu.limit_bytes // GIB for gpu in plan.vram] == [29, 18]
    alone = planned(machine(LARGE, TWENTY), tiny())
    assert len(alone.vram) == 1
    assert reason(alone, "gpus") == (1, "machine", "unequal-gpus")
    assert reason(alone, "idle-gpus") == (1, "machine", "idle-gpus")


def test_notes_about_the_checkpoint_are_among_the_reasons() -> None:
    odd = checkpoints.read(checkpoint({
        "architectures": ["OddForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "vocab_size": 100, "intermediate_size": 128, "max_position_embeddings": 512},
        {"model.layers.0.mlp.up_proj.weight": ("BF16", [128, 64])}))
    assert reason(planned(machine(LARGE), odd), "model") == ("OddForCausalLM", "model", "model-note")


def test_plan_is_json_as_documented() -> None:
    document = json.loads(json.dumps(planned(machine(LARGE), llama_70b()).to_json()))
    assert set(document) >= {"fits", "profile", "engine_args", "reasons", "vram", "host_pinned_bytes",
                             "kv_cache_tokens", "expected_tokens_per_second", "disk_bytes"}
    assert document["fits"] is True
    assert set(document["vram"][0]) == {
        "weights_bytes", "quant_state_bytes", "embeddings_bytes", "offload_buffer_bytes", "kv_cache_bytes",
        "activations_bytes", "cuda_graphs_bytes", "framework_bytes", "total_bytes", "limit_bytes"}
    assert set(document["expected_tokens_per_second"]) == {"batch_1", "batch_8"}
    assert set(document["reasons"][0]) == {"option", "value", "source", "code", "text"}
    assert [device["device"] for device in document["devices"]] == ["gpu0", "cpu"]


def test_cpu_is_a_device_like_each_gpu() -> None:
    plan = planned(machine(TWENTY, TWENTY), llama_70b())
    assert [device.device for device in plan.devices] == ["gpu0", "gpu1", "cpu"]
    host = plan.devices[-1]
    assert plan.host_bytes == host.total_bytes == sum(host.parts().values())
    assert host.weights_bytes == plan.offloaded_bytes > 0
    assert plan.host_pinned_bytes == host.weights_bytes + host.embeddings_bytes
    assert host.limit_bytes == 64 * GIB
    alone = planned(machine(ram=64), llama_8b(), VRAM_PROFILE="cpu")
    assert [device.device for device in alone.devices] == ["cpu"]
    assert (alone.vram, alone.offloaded_bytes, alone.host_pinned_bytes) == ((), 0, 0)
    assert alone.devices[0].weights_bytes > 10 * GIB


def test_placement_names_storage_and_execution_of_every_layer_once() -> None:
    for hardware, environment in ((machine(TWENTY, TWENTY), {}), (machine(SMALL), {}), (machine(LARGE), {}),
                                  (machine(MIDDLE), {"VLLM_EXTRA_ARGS": "--cpu-offload-gb 22"}),
                                  (machine(MIDDLE, MIDDLE), {"VLLM_EXTRA_ARGS": "--pipeline-parallel-size 2"})):
        plan = planned(hardware, llama_70b(), **environment)
        groups = plan.placement.groups
        assert sorted(layer for group in groups for layer in group.layers) == list(range(80))
        assert all(name.startswith("gpu") for group in groups for name in group.executed)
        on_host = sum(len(group.layers) for group in groups if group.stored == ("cpu",))
        assert bool(on_host) == bool(plan.offloaded_bytes)
        if isinstance(plan.config.offload, PrefetchOffload):
            model = MemoryModel(llama_70b(), plan.config)
            assert plan.config.parallelism.pipeline > 1 or on_host == model.offloaded.layers
    split = planned(machine(MIDDLE, MIDDLE), llama_70b(), VLLM_EXTRA_ARGS="--pipeline-parallel-size 2").placement
    assert {group.executed: group.layers[0] // 40 for group in split.groups} == {("gpu0",): 0, ("gpu1",): 1}
    cpu = planned(CPU_ONLY, tiny(), VRAM_PROFILE="cpu").placement
    assert cpu.to_json() == [{"layers": "0-3", "stored": ["cpu"], "executed": ["cpu"]}]


def test_every_reason_remedy_and_cause_has_a_text() -> None:
    plans = [planned(machine(MIDDLE), llama_70b(), VLLM_EXTRA_ARGS="--enable-lora", MAX_NUM_SEQS="4"),
             refused(machine(SMALL, ram=8), llama_70b()), refused(machine(LARGE), llama_70b(), disk=GIB)]
    for plan in plans:
        for each in plan.reasons:
            assert each.text
            assert "{" not in each.text.replace(str(each.value), "")
        if isinstance(plan, Refusal):
            assert "{" not in plan.cause
            assert all(remedy.text for remedy in plan.remedies)
