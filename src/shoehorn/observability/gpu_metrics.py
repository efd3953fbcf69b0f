"""What NVML says about the GPUs, read so that nothing it does can take the exporter down.

Rules:
- what a card or driver does not support is None, never 0; a card that fails in the middle is left out whole;
- fewer cards than were seen before is a failure, and so is none at all: both are NO_ANSWER;
- after a failure NVML is initialised again at the next reading, so a driver that comes later is found;
- a process is named only when its id is one of ours: in a container NVML may give ids of the host.

`python -m shoehorn.observability.nvml_recording` prints a recording of this machine's GPUs; it needs pynvml only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoehorn.observability.xid_events import XidErrors, XidEvents

NO_ANSWER = -1
"""The return code where NVML gave none of its own: no answer in time, no GPU, or one fewer than before."""

THROTTLING = {0x4: "power_cap", 0x8: "hardware_slowdown", 0x20: "thermal", 0x40: "hardware_thermal",
              0x80: "power_brake"}
"""Bits of NVML's clocks event reasons (nvml.h) that mean that a card is slower than it could be."""

# NVML_ERROR_ NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, INSUFFICIENT_SIZE (the list grew meanwhile), FUNCTION_NOT_FOUND,
# ARGUMENT_VERSION_MISMATCH: the figure cannot be had, and the card is well. Every other code means that it is not.
_FUNCTION_NOT_FOUND = 13
_UNAVAILABLE = frozenset({3, 4, 6, 7, _FUNCTION_NOT_FOUND, 25})


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes on a GPU: its id as NVML gives it, `unknown` as name when it is none of ours."""

    pid: int
    name: str
    memory_bytes: int | None


@dataclass(frozen=True)
class Gpu:
    """One card at one moment; None where it does not say.

    Attributes:
        memory_used_bytes: without what the driver reserves, unless `memory_reserved_bytes` is None: then with it.
        utilization_ratio: share of the last sample period in which a kernel ran, 0..1.
        throttled: why its clocks are held down just now, of THROTTLING.
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
    """All cards that answered; `return_code` is NVML's (0 is success) or NO_ANSWER, `problem` the same in words.

    Attributes:
        xid_errors: also of cards that no longer answer.
    """

    gpus: tuple[Gpu, ...] = ()
    driver_version: str = ""
    return_code: int = 0
    problem: str = ""
    xid_errors: tuple[XidErrors, ...] = ()


class NvmlReader:
    """Reads the GPUs through `nvml`, a module like pynvml. For one thread at a time.

    Args:
        proc: where this container's processes are listed.
    """

    def __init__(self, nvml: Any, proc: Path = Path("/proc")) -> None:
        self._nvml = nvml
        self._proc = proc
        self._initialised = self._failed = False
        self._most = 0
        self._events = XidEvents(nvml)

    def read(self) -> GpuReading:
        """One reading; a failure is part of it, never an exception."""
        if self._failed:
            self._close()  # not earlier: until now NVML kept what happened to the cards that are well
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
            return GpuReading(return_code=error.value, problem=str(error), xid_errors=self._events.found())
        self._most = max(self._most, count)
        gpus, code, problem = [], 0, ""
        self._events.read(count)
        if count == 0 or count < self._most:
            code, problem = NO_ANSWER, f"{count} GPUs are visible" + (f" of {self._most}" if self._most else "")
        for index in range(count):
            try:
                gpus.append(self._gpu(index))
            except nvml.NVMLError as error:
                code, problem = error.value, f"GPU {index}: {error}"
        return GpuReading(tuple(gpus), driver_version, code, problem, self._events.found())

    def _gpu(self, index: int) -> Gpu:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
        reserved = None if memory is None else int(memory.reserved)
        if memory is None:
            memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        milliwatts = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        temperature = self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        return Gpu(
            index=index, uuid=nvml.nvmlDeviceGetUUID(handle), name=nvml.nvmlDeviceGetName(handle),
            memory_total_bytes=None if memory is None else int(memory.total),
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_free_bytes=None if memory is None else int(memory.free),
            memory_reserved_bytes=reserved,
            utilization_ratio=None if rates is None else rates.gpu / 100,
            power_watts=None if milliwatts is None else milliwatts / 1000,
            temperature_celsius=None if temperature is None else float(temperature),
            throttled=tuple(word for bit, word in THROTTLING.items() if bit & int(
                self._ask(nvml.nvmlDeviceGetCurrentClocksEventReasons, handle) or 0)),
            processes=self._processes(self._ask(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()))

    def _processes(self, entries: Sequence[Any]) -> tuple[GpuProcess, ...]:
        """One entry a process: with MIG a process may come several times, once for each instance it uses."""
        memory: dict[int, int | None] = {}
        for entry in entries:
            before, more = memory.get(entry.pid), entry.usedGpuMemory
            memory[entry.pid] = before if more is None else (before or 0) + int(more)
        return tuple(GpuProcess(pid, self._process_name(pid), used) for pid, used in memory.items())

    def _process_name(self, pid: int) -> str:
        """The short name of a process of our own user, never its arguments."""
        path = self._proc / str(pid) / "comm"
        try:
            if path.stat().st_uid != os.geteuid():
                return "unknown"
            return path.read_text(encoding="utf-8", errors="replace").strip() or "unknown"
        except OSError:
            return "unknown"

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The answer, or None where the card or driver has none. Raises NVMLError when the card is not well."""
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
            return  # it is being left because it failed


def code(error: Exception) -> int:
    """NVML's code; pynvml's own complaint of a library without the function has none."""
    return int(getattr(error, "value", _FUNCTION_NOT_FOUND))
