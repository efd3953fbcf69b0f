"""Prints a recording of NVML's answers on this machine, which tests replay."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from shoehorn.observability.gpu_metrics import code

RECORDED_SYSTEM_CALLS = ("nvmlSystemGetDriverVersion", "nvmlSystemGetNVMLVersion", "nvmlSystemGetCudaDriverVersion_v2")
RECORDED_GPU_CALLS = (
    "nvmlDeviceGetName", "nvmlDeviceGetUUID", "nvmlDeviceGetCudaComputeCapability", "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetMaxPcieLinkGeneration", "nvmlDeviceGetMaxPcieLinkWidth", "nvmlDeviceGetCurrPcieLinkGeneration",
    "nvmlDeviceGetCurrPcieLinkWidth", "nvmlDeviceGetMigMode", "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetEnforcedPowerLimit",
    "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetTemperature")


def record(nvml: Any) -> dict[str, Any]:
    """Record the answers of this machine's NVML, ready for JSON, by name of the call.

    Shape: `{"version": 1, "recorded": time, "system": {call: answer}, "gpus": [{call: answer}]}`. An answer is a
    value, a list, or a struct as an object of its fields; a failed call is `{"error": NVML's code}`. The second version
    of the memory struct is recorded as `nvmlDeviceGetMemoryInfo_v2`.

    Raises:
        NVMLError: of `nvml`, when NVML cannot be initialised.
    """
    nvml.nvmlInit()
    try:
        gpus = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            answers = {}
            for name in RECORDED_GPU_CALLS:
                arguments = [nvml.NVML_TEMPERATURE_GPU] if name == "nvmlDeviceGetTemperature" else []
                answers[name] = _answer(nvml, getattr(nvml, name), handle, *arguments)
            answers["nvmlDeviceGetMemoryInfo_v2"] = _answer(nvml, nvml.nvmlDeviceGetMemoryInfo, handle,
                                                            nvml.nvmlMemory_v2)
            gpus.append(answers)
        return {"version": 1, "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
                "system": {name: _answer(nvml, getattr(nvml, name)) for name in RECORDED_SYSTEM_CALLS}, "gpus": gpus}
    finally:
        nvml.nvmlShutdown()


def _answer(nvml: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return _plain(function(*arguments))
    except (nvml.NVMLError, nvml.NVMLLibraryMismatchError) as error:
        return {"error": code(error)}


def _plain(answer: Any) -> Any:
    """Convert structs (ctypes' and pynvml's friendly ones) to dictionaries, lists and tuples to lists."""
    if isinstance(answer, list | tuple):
        return [_plain(each) for each in answer]
    if hasattr(answer, "_fields_"):
        return {field[0]: _plain(getattr(answer, field[0])) for field in answer._fields_}
    if hasattr(answer, "__dict__"):
        return {name: _plain(value) for name, value in vars(answer).items()}
    return answer


if __name__ == "__main__":
    import pynvml

    print(json.dumps(record(pynvml), indent=1))
