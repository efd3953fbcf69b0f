"""The machine: GPUs from NVML, host memory and processors as this container may use them -> `Hardware`.

Rules:
- both sources are arguments, so that a captured machine can stand in: `nvml` is a module like pynvml, `root` is where
  /proc and /sys/fs/cgroup are found;
- what cannot be read is said in `notes`, in words; a machine without a GPU is no error here;
- sizes are what a program can have: a card's memory without what the driver reserves (as CUDA reports it), host
  memory within the limits of every control group above this process, of cgroup v2 or v1.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from shoehorn.hardware.host import cpus, memory, text
from shoehorn.hardware.types import Gpu, Hardware


def detect(nvml: ModuleType | None = None, root: Path = Path("/")) -> Hardware:
    """Look at the machine. Never fails: what cannot be read is in `notes`."""
    notes: list[str] = []
    gpus, driver = _gpus(nvml or importlib.import_module("pynvml"), notes)
    total, available = memory(root, notes)
    return Hardware(gpus, driver, total, available, cpus(root, notes), tuple(notes),
                    "amx_tile" in text(root / "proc/cpuinfo").split())


def _gpus(nvml: Any, notes: list[str]) -> tuple[tuple[Gpu, ...], str]:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        missing = error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND
        notes.append("NVML: driver library not found" if missing else f"NVML: {error}")
        return (), ""
    gpus = []
    try:
        driver = str(nvml.nvmlSystemGetDriverVersion())
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                gpus.append(_gpu(nvml, index, notes))
            except nvml.NVMLError as error:
                notes.append(f"NVML: GPU {index} is left out: {error}")
    except nvml.NVMLError as error:
        notes.append(f"NVML: {error}")
        return (), ""
    finally:
        nvml.nvmlShutdown()
    return tuple(gpus), driver


def _gpu(nvml: Any, index: int, notes: list[str]) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def ask(function: Callable[..., Any], default: Any, what: str, *arguments: Any) -> Any:
        """The answer; where the card or driver has none the default, noted unless `what` is empty."""
        try:
            return function(handle, *arguments)
        except (nvml.NVMLError, nvml.NVMLLibraryMismatchError) as error:
            if what:
                notes.append(f"NVML: GPU {index} does not tell its {what}: {error}")
            return default

    memory = ask(nvml.nvmlDeviceGetMemoryInfo, None, "", nvml.nvmlMemory_v2)
    reserved = 0 if memory is None else int(memory.reserved)
    memory = memory or nvml.nvmlDeviceGetMemoryInfo(handle)
    mig = bool(ask(nvml.nvmlDeviceGetMigMode, (0, 0), "")[0])
    if mig:
        notes.append(f"GPU {index} is divided by MIG: its sizes here are those of the whole card, not of a slice")
    return Gpu(
        index=index, uuid=nvml.nvmlDeviceGetUUID(handle), name=nvml.nvmlDeviceGetName(handle),
        total_bytes=int(memory.total) - reserved, free_bytes=int(memory.free),
        compute_capability=tuple(ask(nvml.nvmlDeviceGetCudaComputeCapability, (0, 0), "compute capability")),
        pcie_generation=int(ask(nvml.nvmlDeviceGetMaxPcieLinkGeneration, 0, "PCIe generation")),
        pcie_width=int(ask(nvml.nvmlDeviceGetMaxPcieLinkWidth, 0, "PCIe width")), mig=mig)
