"""Stand-in for the module pynvml that replays a recording (format: `tools/nvml_recording.py`).

Rules: errors and constants are those of pynvml, which needs no driver for them; functions have pynvml's names and
arguments; a call missing in the recording fails with FUNCTION_NOT_FOUND, as with an older driver.

Tests change the behaviour: `fail["nvmlInit"] = 12` (an NVML code, for every GPU), `lose(1)` (that GPU is lost),
`hang["nvmlDeviceGetName"] = event` (the call waits for the event), `capture["gpus"]` (GPUs are added or removed),
`xid(0, 79)` (the driver reports an Xid error of that GPU).
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pynvml

GIB = 1 << 30


def example_gpu(index: int = 0, name: str = "Made-up 24G") -> dict[str, Any]:
    """Return results of an invented GPU: 24 GiB, of which process 4242 uses 6 GiB."""
    return {
        "nvmlDeviceGetName": name, "nvmlDeviceGetUUID": f"GPU-00000000-0000-0000-0000-{index:012d}",
        "nvmlDeviceGetCudaComputeCapability": [8, 9],
        "nvmlDeviceGetMemoryInfo": {"total": 24 * GIB, "used": 7 * GIB, "free": 17 * GIB},
        "nvmlDeviceGetMemoryInfo_v2": {"version": pynvml.nvmlMemory_v2, "total": 24 * GIB, "reserved": GIB,
                                       "used": 6 * GIB, "free": 17 * GIB},
        "nvmlDeviceGetMaxPcieLinkGeneration": 4, "nvmlDeviceGetMaxPcieLinkWidth": 16,
        "nvmlDeviceGetCurrPcieLinkGeneration": 1, "nvmlDeviceGetCurrPcieLinkWidth": 16,
        "nvmlDeviceGetMigMode": {"error": pynvml.NVML_ERROR_NOT_SUPPORTED},
        "nvmlDeviceGetComputeRunningProcesses": [
            {"pid": 4242, "usedGpuMemory": 6 * GIB, "gpuInstanceId": 0xFFFFFFFF, "computeInstanceId": 0xFFFFFFFF}],
        "nvmlDeviceGetUtilizationRates": {"gpu": 37, "memory": 12}, "nvmlDeviceGetPowerUsage": 123_456,
        "nvmlDeviceGetEnforcedPowerLimit": 300_000, "nvmlDeviceGetTotalEnergyConsumption": 987_654_321,
        "nvmlDeviceGetCurrentClocksEventReasons": 1, "nvmlDeviceGetTemperature": 51}


def example(*gpus: dict[str, Any]) -> dict[str, Any]:
    """Return an invented recording with these GPUs."""
    return {"version": 1, "recorded": "recording up", "gpus": list(gpus),
            "system": {"nvmlSystemGetDriverVersion": "580.95.05", "nvmlSystemGetNVMLVersion": "13.580.95.05",
                       "nvmlSystemGetCudaDriverVersion_v2": 13000}}


class FakeNvml:
    """pynvml on the machine of a recording."""

    NVMLError = pynvml.NVMLError
    NVMLLibraryMismatchError = pynvml.NVMLLibraryMismatchError

    def __init__(self, capture: Mapping[str, Any] | None = None) -> None:
        self.capture = copy.deepcopy(dict(capture if capture is not None else example(example_gpu())))
        self.fail: dict[str, int] = {}
        self.hang: dict[str, threading.Event] = {}
        self.calls: Counter[str] = Counter()
        self.initialised = 0
        self._lost: set[int] = set()
        self.event_sets: dict[int, list[int]] = {}
        self._watching: dict[int, int] = {}

    def lose(self, index: int) -> None:
        """Let every later call for this GPU fail with GPU_IS_LOST."""
        self._lost.add(index)

    def xid(self, index: int, code: int) -> None:
        """Add an Xid event of this GPU."""
        if index in self._watching:
            self.event_sets[self._watching[index]].append(code)

    def nvmlEventSetCreate(self) -> int:
        """Create an event set; here a number."""
        self._begin("nvmlEventSetCreate")
        self._need_init()
        number = self.calls["nvmlEventSetCreate"]
        self.event_sets[number] = []
        return number

    def nvmlEventSetFree(self, eventSet: int) -> None:
        """Call as in pynvml."""
        self._begin("nvmlEventSetFree")
        del self.event_sets[eventSet]

    def nvmlDeviceRegisterEvents(self, handle: int, events: int, event_set: int) -> None:
        """Register for events; only Xid errors occur."""
        self._begin("nvmlDeviceRegisterEvents")
        assert events == pynvml.nvmlEventTypeXidCriticalError
        answer = self.capture["gpus"][handle].get("nvmlDeviceRegisterEvents")
        if answer:
            raise pynvml.NVMLError(answer["error"])
        self._watching[handle] = event_set

    def nvmlEventSetWait_v2(self, event_set: int, _milliseconds: int) -> Any:
        """Return the next event, or raise TIMEOUT; a lost GPU does not return its identity."""
        self._begin("nvmlEventSetWait_v2")
        self._need_init()
        if not self.event_sets[event_set]:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)
        return SimpleNamespace(eventType=pynvml.nvmlEventTypeXidCriticalError,
                               eventData=self.event_sets[event_set].pop(0))

    def nvmlInit(self) -> None:
        """Initialise; calls are counted."""
        self._begin("nvmlInit")
        self.initialised += 1

    def nvmlShutdown(self) -> None:
        """Call as in pynvml."""
        self._begin("nvmlShutdown")
        self._need_init()
        self.initialised -= 1
        self.event_sets.clear()
        self._watching.clear()

    def nvmlDeviceGetCount(self) -> int:
        """Return the number of recorded GPUs."""
        self._begin("nvmlDeviceGetCount")
        self._need_init()
        return len(self.capture["gpus"])

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        """Return the index as handle."""
        self._begin("nvmlDeviceGetHandleByIndex")
        self._need_init()
        if index in self._lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        if index not in range(len(self.capture["gpus"])):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> Any:
        """Return the first form of the result, or with `version` the second."""
        return self._replay("nvmlDeviceGetMemoryInfo_v2" if version else "nvmlDeviceGetMemoryInfo", handle)

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> Any:
        """Return the temperature of the only sensor."""
        if sensor != pynvml.NVML_TEMPERATURE_GPU:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self._replay("nvmlDeviceGetTemperature", handle)

    def nvmlDeviceGetMaxClockInfo(self, handle: int, clock: int) -> Any:
        """Return the maximum of the SM clock in MHz."""
        if clock != pynvml.NVML_CLOCK_SM:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self._replay("nvmlDeviceGetMaxClockInfo", handle)

    def __getattr__(self, name: str) -> Any:
        """Return constants and error classes of pynvml, and other calls from the recording."""
        real = getattr(pynvml, name)
        if not name.startswith(("nvmlDeviceGet", "nvmlSystemGet")):
            return real
        system: Callable[[], Any] = lambda: self._replay(name)  # noqa: E731  # two signatures, as pynvml has
        device: Callable[[int], Any] = lambda handle: self._replay(name, handle)  # noqa: E731  # the same
        return system if name.startswith("nvmlSystemGet") else device

    def _replay(self, name: str, handle: int | None = None) -> Any:
        self._begin(name)
        self._need_init()
        if handle in self._lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        answers = self.capture["system"] if handle is None else self.capture["gpus"][handle]
        answer = answers.get(name, {"error": pynvml.NVML_ERROR_FUNCTION_NOT_FOUND})
        if isinstance(answer, dict) and set(answer) == {"error"}:
            raise pynvml.NVMLError(answer["error"])
        return _struct(answer)

    def _begin(self, name: str) -> None:
        self.calls[name] += 1
        if name in self.hang:
            self.hang[name].wait()
        if name in self.fail:
            raise pynvml.NVMLError(self.fail[name])

    def _need_init(self) -> None:
        if self.initialised < 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)


def _struct(answer: Any) -> Any:
    if isinstance(answer, dict):
        return SimpleNamespace(**answer)
    if isinstance(answer, list) and answer and isinstance(answer[0], dict):
        return [SimpleNamespace(**each) for each in answer]
    if isinstance(answer, list):  # pynvml returns pairs as tuples or lists
        return tuple(answer) if answer else []
    return answer
