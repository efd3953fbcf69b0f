"""Plans in which the CPU multiplies the layers in host memory."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from fakes import captured
from shoehorn.hardware.types import Hardware, HostCompute
from shoehorn.model.shape import ModelShape
from shoehorn.planner import host_compute
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.serving_config import HybridOffload, NoOffload, PrefetchOffload
from shoehorn.planner.step_down import FailedStart, StepDown
from shoehorn.planner.throughput import expected
from shoehorn.planner.vllm_args import with_options
from support.plans import GIB, machine, planned

DESKTOP = HostCompute(65e9, 62e9, 30e9)
SERVER = HostCompute(99e9, 95e9, 35e9)
LLAMA_70B = "deepseek-r1-distill-llama-70b"


@cache
def converted(name: str = LLAMA_70B) -> ModelShape:
    return captured.shape(f"{name}@int4")


def measured(compute: HostCompute | None = DESKTOP, pcie: float = 12.5e9, size: float = 7.6, gpus: int = 1,
             ram: int = 64) -> Hardware:
    bare = machine(*[("NVIDIA GeForce RTX 4060", size)] * gpus, ram=ram)
    return replace(bare, gpus=tuple(replace(gpu, link_bytes_per_second=pcie) for gpu in bare.gpus),
                   host_compute=compute)


def test_cpu_multiplies_where_it_was_measured() -> None:
    plan, without = planned(measured(), converted()), planned(measured(None), converted())
    offload = plan.config.offload
    assert isinstance(offload, HybridOffload)
    assert isinstance(without.config.offload, PrefetchOffload)
    assert not {"offload-backend", "offload-group-size"} & plan.engine_args.keys()
    assert plan.engine_args["additional-config"]["shoehorn"]["hybrid"]["levels"]  # type: ignore[index]
    fast, slow = plan.expected_tokens_per_second["batch_1"], without.expected_tokens_per_second["batch_1"]
    assert fast
    assert slow
    assert fast > 3 * slow
    assert {reason.code for reason in plan.reasons} >= {"hybrid", "hybrid-capture", "expert-graphs"}


def test_placement_names_both_devices() -> None:
    plan = planned(measured(), converted())
    stored = {group.stored: group.executed for group in plan.placement.groups}
    assert stored == {("gpu0",): ("gpu0",), ("cpu",): ("cpu", "gpu0")}
    assert sorted(layer for group in plan.placement.groups for layer in group.layers) == list(range(80))


def test_options_are_read_as_they_were_written() -> None:
    plan = planned(measured(), converted())
    assert with_options(plan.config, plan.engine_args).offload == plan.config.offload


@pytest.mark.parametrize("settings", [
    {"VLLM_EXTRA_ARGS": "--enable-lora"}, {"VLLM_EXTRA_ARGS": "--compilation-config.mode 0"},
    {"VLLM_EXTRA_ARGS": "--tensor-parallel-size 2"}])
def test_options_that_do_not_permit_it(settings: dict[str, str]) -> None:
    plan = planned(measured(gpus=2, ram=128), converted(), **settings)
    assert not isinstance(plan.config.offload, HybridOffload)


@pytest.mark.parametrize("change", [
    {"cpus": 3.0}, {"host_compute": None}, {"host_compute": HostCompute(9e9, 5e9, 1e9)}])
def test_machines_that_do_not_permit_it(change: dict[str, Any]) -> None:
    plan = planned(replace(measured(), **change), converted())
    assert isinstance(plan.config.offload, PrefetchOffload)


def test_setting_switches_it_off() -> None:
    plan = planned(measured(), converted(), CPU_COMPUTE="off")
    assert isinstance(plan.config.offload, PrefetchOffload)
    assert plan.engine_environment["SHOEHORN_CPU_COMPUTE"] == "off"
    assert "SHOEHORN_CPU_COMPUTE" not in planned(measured(), converted()).engine_environment


def test_gpus_without_bfloat16_do_not_permit_it() -> None:
    hardware = measured()
    turing = replace(hardware, gpus=tuple(replace(gpu, compute_capability=(7, 5)) for gpu in hardware.gpus))
    assert not isinstance(planned(turing, converted()).config.offload, HybridOffload)


def test_other_formats_do_not_permit_it() -> None:
    for name in captured.names():
        shape = captured.shape(name)
        assert shape.symmetric_int4 == (name.endswith("w4a16")), name
    assert converted().symmetric_int4
    assert not host_compute.is_supported(converted("qwen3-30b-a3b"), 16, measured().gpus[0])


def test_nothing_is_offloaded_where_everything_fits() -> None:
    assert isinstance(planned(measured(size=47.0), converted()).config.offload, NoOffload)


def test_buffers_take_less_than_those_of_prefetch() -> None:
    hybrid, prefetch = (planned(measured(compute), converted()) for compute in (DESKTOP, None))
    assert hybrid.vram[0].offload_buffer_bytes < prefetch.vram[0].offload_buffer_bytes
    assert hybrid.offloaded_bytes <= prefetch.offloaded_bytes


def test_host_memory_is_never_exceeded() -> None:
    for ram in (40, 48, 64):
        plan = planned(measured(ram=ram), converted())
        assert plan.host_bytes <= ram * GIB


@pytest.mark.parametrize("compute", [DESKTOP, SERVER, HostCompute(40e9, 38e9, 8e9)])
@pytest.mark.parametrize("pcie", [6e9, 12.5e9, 25e9, 52e9])
def test_larger_passes_stream_more(compute: HostCompute, pcie: float) -> None:
    levels = host_compute.levels(compute, pcie)
    shares = [level.streamed for level in levels]
    assert shares == sorted(shares)
    assert all(0 <= share < 1 for share in shares)
    for level in levels:
        best = host_compute.rate(compute, pcie, level.tokens, level.streamed)
        assert best >= 0.97 * host_compute.rate(compute, pcie, level.tokens, 1.0)
        assert best >= 0.97 * host_compute.rate(compute, pcie, level.tokens, 0.0)


def test_rate_follows_every_bandwidth() -> None:
    for tokens in (1, 4, 8, 32):
        for share in (0.0, 0.3, 0.6, 1.0):
            slow = host_compute.rate(DESKTOP, 12.5e9, tokens, share)
            doubled = HostCompute(130e9, 124e9, 60e9)
            assert host_compute.rate(doubled, 25e9, tokens, share) == pytest.approx(2 * slow)
            assert host_compute.rate(doubled, 12.5e9, tokens, share) >= slow
            assert host_compute.rate(DESKTOP, 25e9, tokens, share) >= slow


def test_draft_tokens_follow_the_cost_of_a_pass() -> None:
    assert host_compute.draft_tokens(HostCompute(65e9, 62e9, 200e9), 12.5e9, 8) == 8
    assert host_compute.draft_tokens(HostCompute(65e9, 62e9, 8e9), 1e9, 8) == 0
    few = host_compute.draft_tokens(DESKTOP, 12.5e9, 8)
    assert 1 <= few < 8
    plan = planned(measured(), converted())
    assert plan.engine_args["speculative-config"]["num_speculative_tokens"] == few  # type: ignore[index]


def test_slower_without_the_measured_cpu() -> None:
    """Expected speed rests on the measured rates, not on the form of the offload."""
    plan, hardware = planned(measured(), converted()), measured()
    model = MemoryModel(converted(), plan.config)
    slower = HostCompute(33e9, 31e9, 15e9)
    rates = [expected(model, hardware.gpus[0], host=compute)["batch_1"] for compute in (DESKTOP, slower)]
    assert rates[0]
    assert rates[1]
    assert rates[0] > 1.7 * rates[1]


def test_step_down_keeps_hybrid_execution() -> None:
    plan, hardware = planned(measured(), converted()), measured()
    others = frozenset({"max-model-len", "max-num-seqs", "max-num-batched-tokens", "gpu-memory-utilization",
                        "max-cudagraph-capture-size", "enforce-eager", "speculative-config"})
    step = StepDown(MemoryModel(converted(), plan.config), others, {}, hardware.gpus[0].total_bytes,
                    hardware.host_memory_bytes).next_step(FailedStart(is_memory=True, missing_bytes=400 << 20), 0)
    assert step
    before, after = plan.config.offload, with_options(plan.config, step.options).offload
    assert isinstance(before, HybridOffload)
    assert isinstance(after, HybridOffload)
    assert after.levels == before.levels
    assert after.last * before.group > before.last * after.group
