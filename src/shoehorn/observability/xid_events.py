"""Xid errors of the GPUs: the driver queues them as events, and each reading takes the new ones.

Rules: errors are counted from the first reading on, through failures of NVML; a GPU without support (under WSL, or a
virtual one) has no count, which differs from 0; each GPU has its own event set, because a GPU that fell off the bus can
no longer be identified.

Source: NVML API, event handling methods; https://docs.nvidia.com/deploy/xid-errors/ for the faults of programs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

APPLICATION_XIDS = frozenset({13, 31, 32, 43, 45, 68, 69})
"""Usually a fault of the program on the GPU, which is terminated."""

CORRECTED_XIDS = frozenset({63, 92})
"""A memory error that the GPU corrected: a page or row retired, many single-bit errors."""

KINDS = ("application", "corrected", "hardware")
_MAX_EVENTS = 1000  # per reading, so that a storm cannot delay it


@dataclass(frozen=True)
class XidErrors:
    """Errors of one GPU since this program started: their number by kind, and the code of the last one."""

    index: int
    uuid: str
    counts: Mapping[str, int]
    last: int | None


class XidEvents:
    """Counts Xid errors. For one thread at a time.

    Args:
        nvml: a module like pynvml, initialised before every call.
    """

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._sets: dict[str, Any] = {}
        self._index: dict[str, int] = {}
        self._counts: Counter[tuple[str, str]] = Counter()
        self._last: dict[str, int] = {}

    def read(self, count: int) -> None:
        """Count new events, and watch GPUs that were not watched; `count` is the number of GPUs."""
        for index in range(count) if len(self._sets) < count else ():
            self._watch(index)
        self._take()

    def errors(self) -> tuple[XidErrors, ...]:
        """One entry for each GPU that was ever watched, also when it is lost: its last error is the reason."""
        return tuple(XidErrors(index, uuid, {kind: self._counts[uuid, kind] for kind in KINDS}, self._last.get(uuid))
                     for uuid, index in self._index.items())

    def forget(self) -> None:
        """Count the remaining events before NVML is shut down with its event sets; the counts stay."""
        self._take()
        self._sets.clear()

    def _watch(self, index: int) -> None:
        nvml = self._nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid = nvml.nvmlDeviceGetUUID(handle)
            if uuid in self._sets:
                return
            events = nvml.nvmlEventSetCreate()
        except (nvml.NVMLError, nvml.NVMLLibraryMismatchError):
            return
        try:
            nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
        except (nvml.NVMLError, nvml.NVMLLibraryMismatchError):
            nvml.nvmlEventSetFree(events)  # unsupported; the next reading tries it
            return
        self._sets[uuid], self._index[uuid] = events, index

    def _take(self) -> None:
        nvml = self._nvml
        for uuid, events in self._sets.items():
            try:
                for _ in range(_MAX_EVENTS):
                    xid = int(nvml.nvmlEventSetWait_v2(events, 0).eventData)
                    self._counts[uuid, kind_of(xid)] += 1
                    self._last[uuid] = xid
            except (nvml.NVMLError, nvml.NVMLLibraryMismatchError):
                continue  # usually no more events; a failing GPU is reported by the other calls


def kind_of(xid: int) -> str:
    """Classify an Xid error: fault of the program, corrected, or fault of GPU, PCIe or driver."""
    return "application" if xid in APPLICATION_XIDS else "corrected" if xid in CORRECTED_XIDS else "hardware"
