"""Types that describe a machine: GPUs and host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        total_bytes: total memory as CUDA reports it.
        free_bytes: memory that no process uses.
        pcie_generation, pcie_width: maximum of GPU and slot; 0 if unknown. The current values are useless: an idle
            GPU reports generation 1.
        link_bytes_per_second: measured host-to-device bandwidth; 0 if unknown.
        device_bytes_per_second: measured memory bandwidth; 0 if unknown.
        mig: divided by MIG.
        core_hertz: cores times their maximum clock; 0 if unknown.
        ordinal: number by which CUDA shows it to a program.
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
    core_hertz: float = 0.0
    ordinal: int = 0

    @property
    def label(self) -> str:
        """Number of NVML and name, for texts."""
        return f"GPU {self.index} ({self.name})" if self.name else f"GPU {self.index}"


def largest_first(gpus: Iterable[Gpu]) -> list[Gpu]:
    """Sort GPUs in the order in which plans use them: by free memory in whole GiB, then by number."""
    return sorted(gpus, key=lambda gpu: (-(min(gpu.total_bytes, gpu.free_bytes) >> 30), gpu.index))


@dataclass(frozen=True)
class HostCompute:
    """The CPU's part in the execution: measured rates of its kernel for INT4 weights, with all of its threads.

    Attributes:
        read_bytes_per_second: at which the threads only read host memory.
        bytes_per_second_1, bytes_per_second_8: of weights, in forward passes of one token and of eight.
    """

    read_bytes_per_second: float
    bytes_per_second_1: float
    bytes_per_second_8: float


@dataclass(frozen=True)
class Hardware:
    """A machine within the limits of this container.

    Attributes:
        gpus: that CUDA shows to this process, in its order, without those that the engine cannot use.
        gpu_remarks: which GPUs are left out, and why.
        host_memory_bytes: minimum of physical memory and cgroup limits.
        host_available_bytes: memory available now, reclaimable file caches included.
        cpus: CPU time in CPUs: minimum of affinity and quota.
        amx: the CPU supports Intel AMX.
        cpu_kernel: the library of the CPU kernel is installed.
        host_compute: None where the CPU kernel was not measured, or cannot run.
        notes: values that could not be read.
        nodes: machines of a cluster: number of GPUs of each, in the order of `gpus`; empty for one machine.
    """

    gpus: tuple[Gpu, ...]
    driver_version: str
    host_memory_bytes: int
    host_available_bytes: int
    cpus: float
    notes: tuple[str, ...] = ()
    amx: bool = False
    gpu_remarks: tuple[str, ...] = ()
    host_compute: HostCompute | None = None
    cpu_kernel: bool = True
    nodes: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready copy, for captures; without the later fields where they have their default."""
        defaults = {"host_compute": None, "gpu_remarks": (), "cpu_kernel": True, "nodes": ()}
        return {name: value for name, value in asdict(self).items()
                if name not in defaults or value != defaults[name]}

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> Hardware:
        """Invert `to_json`."""
        gpus = tuple(Gpu(**{**gpu, "compute_capability": tuple(gpu["compute_capability"])})
                     for gpu in document["gpus"])
        compute = document.get("host_compute")
        return Hardware(**{**document, "gpus": gpus, "notes": tuple(document["notes"]),
                           "gpu_remarks": tuple(document.get("gpu_remarks", ())),
                           "nodes": tuple(document.get("nodes", ())),
                           "host_compute": HostCompute(**compute) if compute else None})
