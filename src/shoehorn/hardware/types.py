"""Types that describe a machine: GPUs and host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One card.

    Attributes:
        total_bytes: what CUDA reports as total.
        free_bytes: of these, what no process holds at this moment.
        pcie_generation, pcie_width: the most that card and slot can do together; 0 where unknown. The current link is
            no use: it idles at generation 1.
        link_bytes_per_second, device_bytes_per_second: as `link_probe` measured them; 0 where unknown.
    """

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]
    pcie_generation: int
    pcie_width: int
    mig: bool
    link_bytes_per_second: float = 0.0
    device_bytes_per_second: float = 0.0


@dataclass(frozen=True)
class Hardware:
    """A machine as this container sees it.

    Attributes:
        host_memory_bytes: the smallest of the control groups' limits and the machine's memory.
        host_available_bytes: of these, what can be had now, file caches given up.
        cpus: processors' worth of time: the smaller of affinity and quota.
        amx: the processor is known to have Intel's matrix instructions.
        notes: what could not be read, in words.
    """

    gpus: tuple[Gpu, ...]
    driver_version: str
    host_memory_bytes: int
    host_available_bytes: int
    cpus: float
    notes: tuple[str, ...] = ()
    amx: bool = False

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy, for captures."""
        return asdict(self)

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> Hardware:
        """The inverse of `to_json`."""
        gpus = tuple(Gpu(**{**gpu, "compute_capability": tuple(gpu["compute_capability"])})
                     for gpu in document["gpus"])
        return Hardware(**{**document, "gpus": gpus, "notes": tuple(document["notes"])})
