"""GPU metrics from recordings: each failure of NVML removes its own values only."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

import pynvml
import pytest

from fakes.nvml import GIB, FakeNvml, example, example_gpu
from nvml_recording import RECORDED_GPU_CALLS, RECORDED_SYSTEM_CALLS, record
from shoehorn.common.paths import HOME
from shoehorn.observability.exporter import gpu_samples, vram_samples
from shoehorn.observability.gpu_metrics import NO_ANSWER, GpuProcess, NvmlReader
from shoehorn.runtime.state import Phase, State

CAPTURES = sorted((HOME / "tests" / "captures").glob("nvml-*.json"))
TWO = example(example_gpu(0), example_gpu(1, "Made-up 8G"))


def _process(proc: Path, pid: int, name: str) -> None:
    (proc / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "comm").write_text(name + "\n")


def test_gpu_with_all_values(tmp_path: Path) -> None:
    _process(tmp_path, 4242, "VLLM::EngineCor")
    reading = NvmlReader(FakeNvml(), tmp_path).read()
    assert (reading.return_code, reading.problem, reading.driver_version) == (0, "", "580.95.05")
    [gpu] = reading.gpus
    assert (gpu.index, gpu.uuid, gpu.name) == (0, "GPU-00000000-0000-0000-0000-000000000000", "Made-up 24G")
    assert gpu.memory_total_bytes == 24 * GIB
    assert (gpu.memory_used_bytes, gpu.memory_free_bytes, gpu.memory_reserved_bytes) == (6 * GIB, 17 * GIB, GIB)
    assert (gpu.utilization_ratio, gpu.power_watts, gpu.temperature_celsius) == (0.37, 123.456, 51.0)
    assert gpu.processes == (GpuProcess(4242, "VLLM::EngineCor", 6 * GIB),)


@pytest.mark.parametrize("capture", [TWO, *(json.loads(path.read_text()) for path in CAPTURES)],
                         ids=["made up", *(path.stem for path in CAPTURES)])
def test_recording_is_read_completely_and_adds_up(capture: dict[str, Any], tmp_path: Path) -> None:
    reading = NvmlReader(FakeNvml(capture), tmp_path).read()
    assert (reading.return_code, len(reading.gpus)) == (0, len(capture["gpus"]))
    for gpu in reading.gpus:
        assert gpu.uuid.startswith("GPU-")
        assert gpu.memory_total_bytes == sum((gpu.memory_used_bytes, gpu.memory_free_bytes, gpu.memory_reserved_bytes))
        assert 0 <= gpu.utilization_ratio <= 1
        assert 0 < gpu.power_watts < 2000
        assert 0 < gpu.temperature_celsius < 120


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, pynvml.NVML_ERROR_NOT_SUPPORTED,
                                  pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH])
def test_older_driver_returns_the_first_version_of_the_memory_struct(code: int, tmp_path: Path) -> None:
    nvml = FakeNvml()
    nvml.fail["nvmlDeviceGetMemoryInfo_v2"] = code
    reading = NvmlReader(nvml, tmp_path).read()
    [gpu] = reading.gpus
    assert reading.return_code == 0
    assert (gpu.memory_used_bytes, gpu.memory_reserved_bytes) == (7 * GIB, None)


@pytest.mark.parametrize(("call", "fields"), [
    ("nvmlDeviceGetUtilizationRates", ["utilization_ratio"]), ("nvmlDeviceGetPowerUsage", ["power_watts"]),
    ("nvmlDeviceGetTemperature", ["temperature_celsius"])])
@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_NO_PERMISSION])
def test_unsupported_values_are_none(call: str, fields: list[str], code: int, tmp_path: Path) -> None:
    nvml = FakeNvml()
    whole = vars(NvmlReader(nvml, tmp_path).read().gpus[0])
    nvml.fail[call] = code
    reading = NvmlReader(nvml, tmp_path).read()
    assert reading.return_code == 0
    assert vars(reading.gpus[0]) == {**whole, **dict.fromkeys(fields)}


def test_gpu_without_memory_values_is_included(tmp_path: Path) -> None:
    nvml = FakeNvml()
    nvml.fail = dict.fromkeys(("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo_v2"), 3)
    [gpu] = NvmlReader(nvml, tmp_path).read().gpus
    assert (gpu.memory_total_bytes, gpu.memory_used_bytes, gpu.memory_free_bytes) == (None, None, None)
    assert gpu.power_watts == 123.456


def _with_processes(*entries: dict[str, Any]) -> FakeNvml:
    return FakeNvml(example({**example_gpu(), "nvmlDeviceGetComputeRunningProcesses": list(entries)}))


def test_only_processes_of_this_user_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _process(tmp_path, 7, "ours")
    nvml = _with_processes({"pid": 7, "usedGpuMemory": 1}, {"pid": 8, "usedGpuMemory": 2})
    processes = NvmlReader(nvml, tmp_path).read().gpus[0].processes
    assert processes == (GpuProcess(7, "ours", 1), GpuProcess(8, "unknown", 2))
    monkeypatch.setattr(os, "geteuid", lambda: (tmp_path / "7" / "comm").stat().st_uid + 1)  # of another user
    assert [process.name for process in NvmlReader(nvml, tmp_path).read().gpus[0].processes] == ["unknown"] * 2


def test_own_process_is_named_in_the_real_proc() -> None:
    reading = NvmlReader(_with_processes({"pid": os.getpid(), "usedGpuMemory": 1})).read()
    assert reading.gpus[0].processes[0].name == Path("/proc/self/comm").read_text().strip()


def test_hidden_memory_is_none_and_instances_of_a_process_are_summed(tmp_path: Path) -> None:
    nvml = _with_processes(*({"pid": pid, "usedGpuMemory": used}
                             for pid, used in ((1, None), (2, 5), (2, None), (2, 6), (3, 0))))
    processes = NvmlReader(nvml, tmp_path).read().gpus[0].processes
    assert [(process.pid, process.memory_bytes) for process in processes] == [(1, None), (2, 11), (3, 0)]


def test_gpu_in_mig_mode_has_permitted_values_only(tmp_path: Path) -> None:
    sliced = {**example_gpu(), "nvmlDeviceGetMigMode": [1, 1],
              "nvmlDeviceGetUtilizationRates": {"error": pynvml.NVML_ERROR_NOT_SUPPORTED},
              "nvmlDeviceGetMemoryInfo": {"error": pynvml.NVML_ERROR_NO_PERMISSION},
              "nvmlDeviceGetMemoryInfo_v2": {"error": pynvml.NVML_ERROR_NO_PERMISSION}}
    reading = NvmlReader(FakeNvml(example(sliced, example_gpu(1))), tmp_path).read()
    assert reading.return_code == 0
    samples = gpu_samples(reading)
    for name in ("memory_total_bytes", "memory_used_bytes", "memory_free_bytes", "utilization_ratio"):
        assert [labels[0] for labels, _ in samples[f"shoehorn_gpu_{name}"]] == ["1"], name
    assert {labels[0] for labels, _ in samples["shoehorn_gpu_temperature_celsius"]} == {"0", "1"}
    parts = vram_samples(State(phase=Phase.READY), reading.gpus)["shoehorn_vram_bytes"]
    assert {labels[0] for labels, _ in parts} == {"1"}


def test_driver_without_a_process_list_loses_only_that(tmp_path: Path) -> None:
    class Old(FakeNvml):
        def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> Any:
            raise pynvml.NVMLLibraryMismatchError("as pynvml says")

    reading = NvmlReader(Old(), tmp_path).read()
    assert (reading.return_code, reading.gpus[0].processes) == (0, ())
    assert record(Old())["gpus"][0]["nvmlDeviceGetComputeRunningProcesses"] == {"error": 13}


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
                                  pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH])
def test_nvml_that_is_loaded_later_is_detected(code: int, tmp_path: Path) -> None:
    nvml = FakeNvml()
    nvml.fail["nvmlInit"] = code
    reader = NvmlReader(nvml, tmp_path)
    for _ in range(3):
        reading = reader.read()
        assert (reading.gpus, reading.return_code) == ((), code)
        assert reading.problem
    nvml.fail.clear()
    assert reader.read().return_code == 0


def test_real_module_never_raises() -> None:
    reading = NvmlReader(pynvml).read()
    assert bool(reading.gpus) == (reading.return_code == 0)


def test_nvml_is_initialised_once_and_again_after_a_failure(tmp_path: Path) -> None:
    nvml = FakeNvml()
    reader = NvmlReader(nvml, tmp_path)
    for _ in range(3):
        reader.read()
    assert nvml.calls["nvmlInit"] == 1
    nvml.fail["nvmlDeviceGetCount"] = pynvml.NVML_ERROR_UNKNOWN
    assert reader.read().return_code == 999
    nvml.fail["nvmlInit"] = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    assert reader.read().return_code == 9
    assert nvml.initialised == 0, "what failed was shut down"
    nvml.fail = {"nvmlShutdown": pynvml.NVML_ERROR_UNKNOWN, "nvmlSystemGetDriverVersion": 999}
    assert reader.read().return_code == 999  # a shutdown that fails as well changes nothing
    nvml.fail.clear()
    assert reader.read().return_code == 0


def test_zero_gpus_are_a_failure(tmp_path: Path) -> None:
    nvml = FakeNvml(example())
    reader = NvmlReader(nvml, tmp_path)
    reading = reader.read()
    assert (reading.gpus, reading.return_code, reading.problem) == ((), NO_ANSWER, "0 GPUs visible")
    nvml.capture["gpus"].append(example_gpu())
    assert reader.read().return_code == 0


def test_lost_gpu_is_omitted_and_the_others_stay(tmp_path: Path) -> None:
    nvml = FakeNvml(TWO)
    reader = NvmlReader(nvml, tmp_path)
    assert len(reader.read().gpus) == 2
    nvml.lose(0)
    reading = reader.read()
    assert [gpu.index for gpu in reading.gpus] == [1]
    assert (reading.return_code, reading.problem) == (15, "GPU 0: GPU is lost")


@pytest.mark.parametrize("call", ["nvmlDeviceGetTemperature", "nvmlDeviceGetUUID", "nvmlDeviceGetMemoryInfo_v2",
                                  "nvmlDeviceGetComputeRunningProcesses"])
def test_gpu_lost_during_a_reading_is_omitted(call: str, tmp_path: Path) -> None:
    nvml = FakeNvml()
    nvml.fail[call] = pynvml.NVML_ERROR_GPU_IS_LOST
    reading = NvmlReader(nvml, tmp_path).read()
    assert (reading.gpus, reading.return_code) == ((), 15)


def test_uncounted_gpu_is_reported_as_missing(tmp_path: Path) -> None:
    nvml = FakeNvml(TWO)
    reader = NvmlReader(nvml, tmp_path)
    reader.read()
    gone = nvml.capture["gpus"].pop()
    for _ in range(2):
        reading = reader.read()
        assert (len(reading.gpus), reading.return_code, reading.problem) == (1, NO_ANSWER, "1 GPUs visible of 2")
    nvml.capture["gpus"].append(gone)
    assert reader.read().return_code == 0


def xids(reader: NvmlReader) -> list[tuple[dict[str, int], int | None]]:
    """Non-zero counts and the last code, by GPU."""
    return [({kind: count for kind, count in errors.counts.items() if count}, errors.last)
            for errors in reader.read().xid_errors]


def test_xid_errors_are_counted_by_kind_through_failures(tmp_path: Path) -> None:
    nvml = FakeNvml(TWO)
    reader = NvmlReader(nvml, tmp_path)
    first = reader.read().xid_errors
    assert [(errors.index, errors.uuid, set(errors.counts.values()), errors.last) for errors in first] == [
        (index, example_gpu(index)["nvmlDeviceGetUUID"], {0}, None) for index in (0, 1)]
    for code in (31, 79, 48, 63):
        nvml.xid(0, code)
    nvml.xid(1, 13)
    assert xids(reader) == [({"application": 1, "hardware": 2, "corrected": 1}, 63), ({"application": 1}, 13)]
    nvml.fail["nvmlDeviceGetCount"] = pynvml.NVML_ERROR_UNKNOWN
    assert xids(reader)[1] == ({"application": 1}, 13)
    nvml.fail.clear()
    reader.read()
    nvml.xid(0, 79)
    assert xids(reader)[0] == ({"application": 1, "hardware": 3, "corrected": 1}, 79)


def test_lost_gpu_keeps_its_xid_errors(tmp_path: Path) -> None:
    nvml = FakeNvml(TWO)
    reader = NvmlReader(nvml, tmp_path)
    reader.read()
    nvml.xid(0, 79)
    nvml.lose(0)
    for _ in range(2):
        reading = reader.read()
        assert [gpu.index for gpu in reading.gpus] == [1]
        assert (reading.xid_errors[0].counts["hardware"], reading.xid_errors[0].last) == (1, 79)
    samples = gpu_samples(reading)
    assert ((("0", reading.xid_errors[0].uuid), 79.0)) in samples["shoehorn_gpu_last_xid"]
    del nvml.capture["gpus"][0]  # a reloaded driver renumbers: GPU 1 is now 0
    nvml._lost.clear()
    reader.read()
    nvml.xid(0, 31)
    assert xids(reader) == [({"hardware": 1}, 79), ({"application": 1}, 31)]


def test_storm_of_xid_errors_does_not_delay_a_reading(tmp_path: Path) -> None:
    nvml = FakeNvml()
    reader = NvmlReader(nvml, tmp_path)
    reader.read()
    for _ in range(1500):
        nvml.xid(0, 79)
    assert xids(reader) == [({"hardware": 1000}, 79)]
    assert xids(reader) == [({"hardware": 1500}, 79)]


@pytest.mark.parametrize("call", ["nvmlEventSetCreate", "nvmlDeviceRegisterEvents"])
def test_unsupported_xid_errors_have_no_count(call: str, tmp_path: Path) -> None:
    nvml = FakeNvml()
    nvml.fail[call] = pynvml.NVML_ERROR_NOT_SUPPORTED
    reader = NvmlReader(nvml, tmp_path)
    for _ in range(3):
        reading = reader.read()
        assert (reading.return_code, reading.xid_errors) == (0, ())
    assert nvml.event_sets == {}, "none is left over at each scrape"


def test_recording_of_a_replay_equals_the_recording() -> None:
    capture = example({**example_gpu(), "nvmlDeviceGetPowerUsage": {"error": 3}}, example_gpu(1))
    again = record(FakeNvml(json.loads(json.dumps(capture))))
    assert again["gpus"] == capture["gpus"]
    assert again["system"] == capture["system"]
    assert again["version"] == 1
    assert json.loads(json.dumps(again)) == again


def test_recording_shuts_nvml_down_and_reports_a_missing_driver() -> None:
    nvml = FakeNvml()
    record(nvml)
    assert nvml.initialised == 0
    nvml.fail["nvmlInit"] = 12
    with pytest.raises(pynvml.NVMLError_LibraryNotFound):
        record(nvml)


def test_structs_of_pynvml_are_converted() -> None:
    memory = pynvml.c_nvmlMemory_v2_t(pynvml.nvmlMemory_v2, 10, 1, 4, 5)
    process = pynvml.nvmlFriendlyObject({"pid": 7, "usedGpuMemory": None})

    class Real(FakeNvml):
        def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> Any:
            return memory

        def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> Any:
            return [process]

    answers = record(Real())["gpus"][0]
    assert answers["nvmlDeviceGetMemoryInfo_v2"] == {"version": 0x02000028, "total": 10, "reserved": 1, "free": 4,
                                                     "used": 5}
    assert answers["nvmlDeviceGetComputeRunningProcesses"] == [{"pid": 7, "usedGpuMemory": None}]


def test_stand_in_has_the_signatures_of_pynvml() -> None:
    nvml = FakeNvml()
    for name in ("nvmlInit", "nvmlShutdown", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex",
                 "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetTemperature", "nvmlEventSetCreate", "nvmlEventSetFree"):
        stand_in, real = (inspect.signature(getattr(module, name)).parameters.values() for module in (nvml, pynvml))
        assert [(each.name, each.default) for each in stand_in] == [(each.name, each.default) for each in real], name
    for name in {*RECORDED_GPU_CALLS, *RECORDED_SYSTEM_CALLS, "nvmlDeviceRegisterEvents", "nvmlEventSetWait_v2"}:
        assert len(inspect.signature(getattr(nvml, name)).parameters) == len(
            inspect.signature(getattr(pynvml, name)).parameters), name
    with pytest.raises(AttributeError):
        _ = nvml.nvmlDeviceGetNothing


def test_stand_in_requires_initialisation() -> None:
    nvml = FakeNvml()
    with pytest.raises(pynvml.NVMLError_Uninitialized):
        nvml.nvmlDeviceGetCount()
    nvml.nvmlInit()
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        nvml.nvmlDeviceGetHandleByIndex(1)
    assert nvml.nvmlDeviceGetCudaComputeCapability(nvml.nvmlDeviceGetHandleByIndex(0)) == (8, 9)
