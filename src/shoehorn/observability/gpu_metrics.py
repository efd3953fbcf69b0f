"""GPU metrics from NVML; no failure of NVML stops the exporter.

Rules:
- unsupported values are None, never 0; a GPU that fails during a reading is omitted;
- fewer GPUs than before, or none, is a failure with the code NO_ANSWER;
- after a failure NVML is initialised again at the next reading, so that a driver that is loaded later is detected;
- a process is named only if its id belongs to this container: NVML may return ids of the host.

`python tools/nvml_recording.py` prints a recording of this machine's GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoehorn.observability.xid_events import XidErrors, XidEvents

NO_ANSWER = -1
"""Return code without one of NVML: it timed out, or found no GPU or fewer than before."""

THROTTLING = {0x4: "power_cap", 0x8: "hardware_slowdown", 0x20: "thermal", 0x40: "hardware_thermal",
              0x80: "power_brake"}
"""Bits of NVML's clocks event reasons (nvml.h) that reduce a GPU's clocks."""

# NVML_ERROR_ NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, INSUFFICIENT_SIZE (the list grew), FUNCTION_NOT_FOUND,
# ARGUMENT_VERSION_MISMATCH: the value is unavailable and the GPU works. Every other code is a failure of the GPU.
_FUNCTION_NOT_FOUND = 13
_UNAVAILABLE = frozenset({3, 4, 6, 7, _FUNCTION_NOT_FOUND, 25})


@dataclass(frozen=True)
class GpuProcess:
    """A compute process of a GPU: its id from NVML; its name is `unknown` outside of this container."""

    pid: int
    name: str
    memory_bytes: int | None


@dataclass(frozen=True)
class GpuSample:
    """Values of one GPU in one reading; None where unavailable.

    Attributes:
        memory_used_bytes: without the driver's reserve, unless `memory_reserved_bytes` is unknown.
        utilization_ratio: share of the last sample period in which a kernel ran, 0..1.
        throttled: current reasons of reduced clocks, of THROTTLING.
    """

    index: int
    uuid: str
    name: str
    memory_total_bytes: int | None
    memory_used_bytes: int | None
    memory_free_bytes: int | None
    memory_reserved_bytes: int | None
    utilization_ratio: float | None
    power_watts: float | None
    temperature_celsius: float | None
    processes: tuple[GpuProcess, ...]
    throttled: tuple[str, ...] = ()


@dataclass(frozen=True)
class GpuReading:
    """All GPUs that answered; `return_code` is NVML's (0 is success) or NO_ANSWER, `problem` its message.

    Attributes:
        xid_errors: also of GPUs that no longer answer.
    """

    gpus: tuple[GpuSample, ...] = ()
    driver_version: str = ""
    return_code: int = 0
    problem: str = ""
    xid_errors: tuple[XidErrors, ...] = ()


class NvmlReader:
    """Reads the GPUs through `nvml`, a module like pynvml. For one thread at a time.

    Args:
        proc: the mounted proc file system.
    """

    def __init__(self, nvml: Any, proc: Path = Path("/proc")) -> None:
        self._nvml = nvml
        self._proc = proc
        self._initialised = self._failed = False
        self._max_count = 0
        self._events = XidEvents(nvml)

    def read(self) -> GpuReading:
        """Read once; a failure is returned, never raised."""
        if self._failed:
            self._close()  # not earlier: NVML kept the Xid events of working GPUs until now
        reading = self._read()
        self._failed = reading.return_code != 0
        return reading

    def _read(self) -> GpuReading:
        nvml = self._nvml
        try:
            if not self._initialised:
                nvml.nvmlInit()
                self._initialised = True
            driver_version = nvml.nvmlSystemGetDriverVersion()
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            return GpuReading(return_code=error.value, problem=str(error), xid_errors=self._events.errors())
        self._max_count = max(self._max_count, count)
        gpus, code, problem = [], 0, ""
        self._events.read(count)
        if count == 0 or count < self._max_count:
            code, problem = NO_ANSWER, f"{count} GPUs visible" + (f" of {self._max_count}" if self._max_count else "")
        for index in range(count):
            try:
                gpus.append(self._gpu(index))
            except nvml.NVMLError as error:
                code, problem = error.value, f"GPU {index}: {error}"
        return GpuReading(tuple(gpus), driver_version, code, problem, self._events.errors())

    def _gpu(self, index: int) -> GpuSample:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = self._query(nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
        reserved = None if memory is None else int(memory.reserved)
        if memory is None:
            memory = self._query(nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = self._query(nvml.nvmlDeviceGetUtilizationRates, handle)
        milliwatts = self._query(nvml.nvmlDeviceGetPowerUsage, handle)
        temperature = self._query(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        return GpuSample(
            index=index, uuid=nvml.nvmlDeviceGetUUID(handle), name=nvml.nvmlDeviceGetName(handle),
            memory_total_bytes=None if memory is None else int(memory.total),
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_free_bytes=None if memory is None else int(memory.free),
            memory_reserved_bytes=reserved,
            utilization_ratio=None if rates is None else rates.gpu / 100,
            power_watts=None if milliwatts is None else milliwatts / 1000,
            temperature_celsius=None if temperature is None else float(temperature),
            throttled=tuple(word for bit, word in THROTTLING.items() if bit & int(
                self._query(nvml.nvmlDeviceGetCurrentClocksEventReasons, handle) or 0)),
            processes=self._processes(self._query(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()))

    def _processes(self, entries: Sequence[Any]) -> tuple[GpuProcess, ...]:
        """Merge the entries of each process: with MIG NVML lists it once for each instance that it uses."""
        memory: dict[int, int | None] = {}
        for entry in entries:
            known, size = memory.get(entry.pid), entry.usedGpuMemory
            memory[entry.pid] = known if size is None else (known or 0) + int(size)
        return tuple(GpuProcess(pid, self._process_name(pid), used) for pid, used in memory.items())

    def _process_name(self, pid: int) -> str:
        """Return the short name of a process of this user, never its arguments."""
        path = self._proc / str(pid) / "comm"
        try:
            if path.stat().st_uid != os.geteuid():
                return "unknown"
            return path.read_text(encoding="utf-8", errors="replace").strip() or "unknown"
        except OSError:
            return "unknown"

    def _query(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Query a value; None if it is unavailable. Raises NVMLError if the GPU fails."""
        try:
            return function(*arguments)
        except (self._nvml.NVMLError, self._nvml.NVMLLibraryMismatchError) as error:
            if code(error) in _UNAVAILABLE:
                return None
            raise

    def _close(self) -> None:
        if not self._initialised:
            return
        self._initialised = False
        self._events.forget()
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError:
            return  # NVML has failed before


def code(error: Exception) -> int:
    """Return NVML's code; pynvml's own error of a library without the function has none."""
    return int(getattr(error, "value", _FUNCTION_NOT_FOUND))
