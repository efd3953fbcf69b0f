"""Xid errors of the GPUs: the driver queues them as events, and each reading takes what has come since the last one.

Rules: counted from the first reading on, through failures of NVML; a card that cannot tell (as under WSL, or a virtual
one) has no count, which is not the same as none; each card has an event set of its own, because a card that fell off
the bus can no longer be asked which one it is.

Source: NVML API, event handling methods; https://docs.nvidia.com/deploy/xid-errors/ for what is the program's fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

APPLICATION_XIDS = frozenset({13, 31, 32, 43, 45, 68, 69})
"""Most often a fault of the program on the card, which ends by it."""

CORRECTED_XIDS = frozenset({63, 92})
"""A memory error that the card has dealt with itself: a page or row retired, many single-bit errors."""

KINDS = ("application", "corrected", "hardware")
_MOST_EVENTS = 1000  # at one reading, so that a storm cannot hold it up


@dataclass(frozen=True)
class XidErrors:
    """Of one card since this program began: how many of each kind, and the code of the last one."""

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

    def read(self, cards: int) -> None:
        """Take what has come; begins to watch cards that were not watched."""
        for index in range(cards) if len(self._sets) < cards else ():
            self._watch(index)
        self._take()

    def found(self) -> tuple[XidErrors, ...]:
        """One entry for each card that ever could tell, also when it is lost: its last error is why."""
        return tuple(XidErrors(index, uuid, {kind: self._counts[uuid, kind] for kind in KINDS}, self._last.get(uuid))
                     for uuid, index in self._index.items())

    def forget(self) -> None:
        """NVML is being shut down, and with it what watches: take what is left; the counts stay."""
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
            nvml.nvmlEventSetFree(events)  # this one cannot tell, and will be asked again
            return
        self._sets[uuid], self._index[uuid] = events, index

    def _take(self) -> None:
        nvml = self._nvml
        for uuid, events in self._sets.items():
            try:
                for _ in range(_MOST_EVENTS):
                    xid = int(nvml.nvmlEventSetWait_v2(events, 0).eventData)
                    self._counts[uuid, kind_of(xid)] += 1
                    self._last[uuid] = xid
            except (nvml.NVMLError, nvml.NVMLLibraryMismatchError):
                continue  # no more events, as a rule; a card that is not well shows in everything else


def kind_of(xid: int) -> str:
    """Whose fault an Xid error is: the program's, one that was corrected, or one of card, link or driver."""
    return "application" if xid in APPLICATION_XIDS else "corrected" if xid in CORRECTED_XIDS else "hardware"
