"""Xid errors of the GPUs: the driver queues them as events, and each reading takes what has come since the last one.

Rules: counted from the first reading on, through failures of NVML; a card that cannot tell (as under WSL, or a virtual
one) has no count, which is not the same as none.

Source: NVML API, event handling methods; https://docs.nvidia.com/deploy/xid-errors/ for what is the program's fault.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

APPLICATION_XIDS = frozenset({13, 31, 32, 43, 45, 68, 69})
"""Most often a fault of the program on the card, which ends by it; any other is one of card, link or driver."""

KINDS = ("application", "hardware")
_MOST_EVENTS = 1000  # at one reading, so that a storm cannot hold it up


class XidEvents:
    """Counts Xid errors. For one thread at a time.

    Args:
        nvml: a module like pynvml, initialised before every call.
    """

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._set: Any = None
        self._watched: set[int] = set()
        self._counts: Counter[tuple[int, str]] = Counter()
        self._last: dict[int, int] = {}

    def read(self, cards: int) -> None:
        """Take what has come; begins to watch cards that were not watched."""
        nvml = self._nvml
        try:
            if self._set is None:
                self._set = nvml.nvmlEventSetCreate()
            for index in set(range(cards)) - self._watched:
                self._watch(index)
            for _ in range(_MOST_EVENTS):
                event = nvml.nvmlEventSetWait_v2(self._set, 0)
                index, xid = nvml.nvmlDeviceGetIndex(event.device), int(event.eventData)
                self._counts[index, KINDS[xid not in APPLICATION_XIDS]] += 1
                self._last[index] = xid
        except (nvml.NVMLError, nvml.NVMLLibraryMismatchError):
            return  # no more events, as a rule; a card that is not well shows in everything else

    def counts(self, index: int) -> dict[str, int]:
        """By kind; empty where the card cannot tell."""
        return {kind: self._counts[index, kind] for kind in KINDS} if index in self._watched else {}

    def last(self, index: int) -> int | None:
        """The code of the last one."""
        return self._last.get(index)

    def forget(self) -> None:
        """NVML was shut down, and with it what watches; the counts stay."""
        self._set = None
        self._watched.clear()

    def _watch(self, index: int) -> None:
        nvml = self._nvml
        try:
            nvml.nvmlDeviceRegisterEvents(nvml.nvmlDeviceGetHandleByIndex(index), nvml.nvmlEventTypeXidCriticalError,
                                          self._set)
        except (nvml.NVMLError, nvml.NVMLLibraryMismatchError):
            return  # this one cannot tell
        self._watched.add(index)
