"""Plans of INT4 mixtures whose experts are cached on the GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest

from fakes import captured
from shoehorn.hardware.types import Hardware, HostCompute
from shoehorn.model import checkpoint
from shoehorn.model.shape import ModelShape
from shoehorn.planner import host_compute
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.plan import Plan
from shoehorn.planner.serving_config import ExpertCacheOffload, UvaOffload
from shoehorn.planner.step_down import FailedStart, StepDown
from shoehorn.planner.throughput import copied_experts
from shoehorn.planner.vllm_args import with_options
from support.plans import GIB, machine, plan_for, planned

MIXTURE = "qwen3-30b-a3b"
EIGHT = machine(("NVIDIA GeForce RTX 4060", 7.6), ram=64)


@cache
def converted(name: str = MIXTURE) -> ModelShape:
    return captured.shape(f"{name}@int4")


def with_weights(**changes: object) -> ModelShape:
    """The mixture with a changed description of its quantization."""
    config = json.loads(captured.converted(MIXTURE).read("config.json"))
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"] |= changes
    return _read_with(config)


def _read_with(config: object) -> ModelShape:
    class Files:
        def __init__(self) -> None:
            self.source = captured.converted(MIXTURE)

        def names(self) -> object:
            return self.source.names()

        def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
            return json.dumps(config).encode() if name == "config.json" else self.source.read(name, start, length)

    return checkpoint.read(Files())  # type: ignore[arg-type]


def test_only_symmetric_int4_in_groups_is_cacheable() -> None:
    assert all(converted(name).experts.cacheable  # type: ignore[union-attr]
               for name in (MIXTURE, "mixtral-8x7b-instruct-v0.1", "deepseek-v2-lite-chat"))
    for change in ({"symmetric": False}, {"num_bits": 8}, {"type": "float"}, {"strategy": "channel"}):
        shape = with_weights(**change)
        assert shape.experts
        assert not shape.experts.cacheable, change
    for name in captured.names():
        experts = captured.shape(name).experts
        assert experts is None or experts.cacheable == name.startswith("gpt-oss"), name


@pytest.mark.parametrize(("name", "layers", "size"), [
    (MIXTURE, 48, 3 * 2048 * 768 * (1 / 2 + 2 / 128)),
    ("deepseek-v2-lite-chat", 26, 3 * 2048 * 1408 * (1 / 2 + 2 / 64))])
def test_layers_and_size_of_experts_are_exact(name: str, layers: int, size: float) -> None:
    weights = MemoryModel(converted(name), planned(EIGHT, converted(MIXTURE)).config).weights
    assert weights.expert_layers == layers
    assert weights.expert_bytes == size + 3 * 16, "the shapes of the three matrices are stored too"


def test_experts_are_cached_where_they_do_not_fit() -> None:
    plan = planned(EIGHT, converted())
    offload = plan.config.offload
    assert isinstance(offload, ExpertCacheOffload)
    assert 8 <= offload.slots < 128
    experts = converted().tensor_bytes.experts.bytes
    assert plan.offloaded_bytes == experts
    weights = MemoryModel(converted(), plan.config).weights
    assert plan.vram[0].offload_buffer_bytes == (offload.slots * 48 + 3 * offload.scratch) * weights.expert_bytes
    assert plan.vram[0].weights_bytes < 2 * GIB
    assert plan.engine_args["moe-backend"] == "marlin"
    assert plan.engine_args["additional-config"]["shoehorn"]["experts"] == {  # type: ignore[index]
        "slots": offload.slots, "scratch": offload.scratch, "divided": offload.divided}
    assert offload.divided >= offload.slots // 8
    assert with_options(plan.config, plan.engine_args).offload == offload, "options kept after a good start hold it"
    larger = planned(machine(("NVIDIA GeForce RTX 3060", 11.6)), converted())
    assert isinstance(larger.config.offload, ExpertCacheOffload)
    assert larger.config.offload.slots > offload.slots


def test_placement_names_experts_apart() -> None:
    placement = planned(EIGHT, converted()).to_json()["placement"]
    assert placement == [
        {"layers": "0-47", "part": "rest", "stored": ["gpu0"], "executed": ["gpu0"]},
        {"layers": "0-47", "part": "experts", "stored": ["cpu", "gpu0"], "executed": ["gpu0"]}]


def test_copies_grow_with_tokens_and_shrink_with_slots() -> None:
    experts = converted().experts
    assert experts
    by_tokens = [copied_experts(experts, 48, tokens) for tokens in (1, 2, 4, 6, 7, 16, 512)]
    assert by_tokens == sorted(by_tokens)
    assert by_tokens[0] == pytest.approx(8 * 80 / 128)
    assert by_tokens[-1] == 80, "every expert without a slot, once"
    by_slots = [copied_experts(experts, slots, 1) for slots in (8, 32, 64, 128)]
    assert by_slots == sorted(by_slots, reverse=True)
    assert by_slots[-1] == 0


@pytest.mark.parametrize("options", ["--moe-backend triton", "--compilation-config '{\"mode\": 0}'",
                                     "--enable-expert-parallel"])
def test_given_options_disable_the_cache_and_uva_is_not_planned(options: str) -> None:
    plan = plan_for(EIGHT, converted(), VLLM_EXTRA_ARGS=options)
    if isinstance(plan, Plan):
        assert not isinstance(plan.config.offload, ExpertCacheOffload | UvaOffload)


def measured(compute: HostCompute | None, cpus: float = 16.0) -> Hardware:
    """The machine with rates of its CPU kernel."""
    return replace(EIGHT, host_compute=compute, cpus=cpus)


def sharing(hardware: Hardware, shape: ModelShape | None = None, **settings: str) -> ExpertCacheOffload:
    offload = planned(hardware, shape or converted(), **settings).config.offload
    assert isinstance(offload, ExpertCacheOffload)
    return offload


DESKTOP, SLOW = HostCompute(65e9, 62e9, 40e9), HostCompute(12e9, 11e9, 6e9)


def test_cpu_computes_experts_where_it_reads_faster_than_pcie_copies() -> None:
    plan = planned(measured(DESKTOP), converted())
    offload = plan.config.offload
    assert isinstance(offload, ExpertCacheOffload)
    assert offload.computed >= 32
    assert plan.engine_args["additional-config"]["shoehorn"]["experts"] == {  # type: ignore[index]
        "slots": offload.slots, "scratch": offload.scratch, "divided": 0, "computed": offload.computed}
    assert with_options(plan.config, plan.engine_args).offload == offload
    assert plan.config.speculation.draft_tokens == 0, "a pass of several tokens reads more experts"
    assert plan.config.capture_limit
    assert not plan.config.eager
    document = plan.to_json()
    assert document["placement"][1]["executed"] == ["cpu", "gpu0"]  # type: ignore[index]
    assert any("CPU computes the others" in reason.text for reason in plan.reasons)
    copying = planned(EIGHT, converted())
    assert plan.expected_tokens_per_second["batch_1"] > 1.5 * copying.expected_tokens_per_second["batch_1"]
    assert plan.host_bytes == copying.host_bytes, "one copy of the experts"


@pytest.mark.parametrize(("hardware", "settings"), [
    (measured(None), {}), (measured(SLOW), {}), (measured(DESKTOP, 3.0), {}),
    (measured(DESKTOP), {"CPU_COMPUTE": "off"}),
    (replace(measured(DESKTOP), gpus=tuple(replace(gpu, compute_capability=(7, 5)) for gpu in EIGHT.gpus)), {})])
def test_experts_are_copied_otherwise(hardware: Hardware, settings: dict[str, str]) -> None:
    assert sharing(hardware, **settings).computed == 0


def test_computed_passes_are_the_smaller_the_faster_pcie_is() -> None:
    experts = converted().experts
    assert experts
    limits = [host_compute.computed_tokens(DESKTOP, pcie, experts) for pcie in (6e9, 12e9, 25e9, 50e9, 100e9)]
    assert limits == sorted(limits, reverse=True)
    assert limits[0] > limits[-1] == 0


def test_experts_need_less_memory_on_the_gpu_where_the_cpu_computes() -> None:
    small = machine(("NVIDIA GeForce RTX 4060", 3.3), ram=64)
    offload = sharing(replace(small, host_compute=DESKTOP))
    assert offload.slots < 8, "fewer than a token chooses"


def test_experts_in_mxfp4_are_cached() -> None:
    shape = checkpoint.read(captured.files("gpt-oss-20b"))
    offload = sharing(measured(DESKTOP), shape)
    assert offload.computed
    weights = MemoryModel(shape, planned(measured(DESKTOP), shape).config).weights
    assert weights.expert_layers == 24
    padded = 3 * 3072 * 2944 * (1 / 2 + 1 / 32)
    assert weights.expert_bytes == pytest.approx(padded, rel=0.005), "biases besides"


def test_step_down_reduces_the_slots_of_shared_experts() -> None:
    start = MemoryModel(converted(), planned(measured(DESKTOP), converted()).config)
    step = StepDown(start, _OTHERS, {}, EIGHT.gpus[0].total_bytes, EIGHT.host_memory_bytes).next_step(
        FailedStart(is_memory=True, missing_bytes=400 << 20), 0)
    assert step
    before, after = start.config.offload, with_options(start.config, step.options).offload
    assert isinstance(before, ExpertCacheOffload)
    assert isinstance(after, ExpertCacheOffload)
    assert after.slots < before.slots
    assert after.computed == before.computed


_OTHERS = frozenset({"gpu-memory-utilization", "max-num-batched-tokens", "max-num-seqs", "max-model-len",
                     "max-cudagraph-capture-size", "enforce-eager"})


def test_step_down_reduces_the_slots() -> None:
    plan = planned(EIGHT, converted())
    before = plan.config.offload
    assert isinstance(before, ExpertCacheOffload)
    start = MemoryModel(converted(), plan.config)
    step = StepDown(start, _OTHERS, {}, EIGHT.gpus[0].total_bytes, EIGHT.host_memory_bytes).next_step(
        FailedStart(is_memory=True, missing_bytes=400 << 20), 0)
    assert step
    after = with_options(plan.config, step.options)
    assert isinstance(after.offload, ExpertCacheOffload)
    assert after.offload.slots < before.slots
    smaller = replace(plan.config, offload=after.offload)
    assert start.offloaded.buffers_bytes - MemoryModel(converted(), smaller).offloaded.buffers_bytes >= 400 << 20
