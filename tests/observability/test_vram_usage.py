"""Attribution of a GPU's used memory: parts that add up, whatever NVML reports."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fakes.nvml import GIB, FakeNvml
from shoehorn.observability import vram_usage
from shoehorn.observability.exporter import gpu_samples, volume_samples, vram_samples
from shoehorn.observability.gpu_metrics import GpuProcess, GpuReading, GpuSample, NvmlReader
from shoehorn.runtime.state import Phase, State

ROWS = tuple({"gpu": 0, "part": part, "expected_bytes": 1, "measured_bytes": size} for part, size in (
    ("weights", 3 * GIB), ("kv_cache", GIB), ("cuda_graphs", GIB // 4), ("framework", GIB),
    ("total", 5 * GIB + GIB // 4)))


def sample(*processes: tuple[str, int | None], used: int = 6 * GIB) -> GpuSample:
    return GpuSample(0, "GPU-0", "Made-up 24G", 24 * GIB, used, 17 * GIB, GIB, None, None, None,
               tuple(GpuProcess(number, name, size) for number, (name, size) in enumerate(processes)))


@pytest.mark.parametrize(("processes", "ready", "expected"), [
    ([("VLLM::EngineCor", 6 * GIB - GIB // 2)], True,
     {"framework": GIB, "activations": GIB // 4, "other_processes": GIB // 2}),
    ([("unknown", None)], True, {"framework": GIB, "activations": 0, "other_processes": 3 * GIB // 4}),
    ([], True, {"framework": GIB, "other_processes": 3 * GIB // 4}),
    ([("VLLM::EngineCor", 2 * GIB)], True, {"unattributed": 2 * GIB, "other_processes": 4 * GIB}),
    ([("VLLM::EngineCor", 2 * GIB)], False, {"unattributed": 2 * GIB, "other_processes": 4 * GIB}),
    ([], False, {"unattributed": 6 * GIB, "other_processes": 0}),
])
def test_parts_add_up_to_the_size_of_the_gpu(processes: list[tuple[str, int | None]], ready: bool,
                                          expected: dict[str, int]) -> None:
    parts = vram_usage.breakdown(ROWS, sample(*processes), ready=ready)
    assert sum(parts.values()) == 24 * GIB
    assert {part: parts[part] for part in expected} == expected
    assert ("weights" in parts) == ("framework" in expected)
    assert set(parts) <= set(vram_usage.PARTS)


def test_known_quantization_state_is_a_separate_part() -> None:
    rows = (*ROWS, {"gpu": 0, "part": "quant_state", "expected_bytes": 1, "measured_bytes": GIB // 4})
    parts = vram_usage.breakdown(rows, sample(("VLLM::EngineCor", 6 * GIB)), ready=True)
    assert (parts["quant_state"], parts["framework"], parts["activations"]) == (GIB // 4, GIB, GIB // 2)
    assert sum(parts.values()) == 24 * GIB


def test_gpu_without_used_memory_has_no_parts() -> None:
    silent = dataclasses.replace(sample(), memory_used_bytes=None)
    assert vram_usage.breakdown(ROWS, silent, ready=True) == {}


def test_gpus_without_rows_and_no_gpus(tmp_path: Path) -> None:
    samples = vram_samples(State(phase=Phase.READY, memory=ROWS), (sample(), dataclasses.replace(sample(), index=1)))
    assert {labels for labels, _ in samples["shoehorn_vram_bytes"]} >= {("0", "weights"), ("1", "unattributed")}
    assert [labels for labels, _ in samples["shoehorn_vram_expected_bytes"]] == [
        ("0", part) for part in ("weights", "kv_cache", "cuda_graphs", "framework")]
    assert vram_samples(State(), ()) == {}
    assert volume_samples(tmp_path / "absent") == {}
    assert volume_samples(tmp_path)["shoehorn_models_volume_bytes"][0][1] > 0


def test_throttling_reasons_are_present_only_when_throttled() -> None:
    nvml = FakeNvml()
    assert NvmlReader(nvml).read().gpus[0].throttled == ()
    nvml.capture["gpus"][0]["nvmlDeviceGetCurrentClocksEventReasons"] = 0x24
    [gpu] = NvmlReader(nvml).read().gpus
    assert gpu.throttled == ("power_cap", "thermal")
    assert gpu_samples(GpuReading((gpu,)))["shoehorn_gpu_throttled"] == [
        (("0", gpu.uuid, "power_cap"), 1), (("0", gpu.uuid, "thermal"), 1)]
