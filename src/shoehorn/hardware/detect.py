"""Detection of GPUs (NVML), host memory and CPUs -> `Hardware`.

Rules:
- all sources are arguments: `nvml` is a module like pynvml, `root` contains /proc and /sys/fs/cgroup, `environment` has
  the variables with which CUDA hides and orders GPUs;
- a value that cannot be read is noted in `notes`; a machine without a GPU is not an error;
- sizes are usable sizes: GPU memory without the driver's reserve (as CUDA reports it), host memory within the limits
  of all cgroups of this process, v2 or v1.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from shoehorn.hardware import visible_gpus
from shoehorn.hardware.host import cpus, memory, text
from shoehorn.hardware.types import Gpu, Hardware

KERNEL_LIBRARY = Path(__file__).resolve().parents[2] / "shoehorn_vllm/hybrid/kernel/w4a16.so"
"""Library of the CPU kernel, next to its sources; the installation compiles it if it finds a C compiler."""


def detect(nvml: ModuleType | None = None, root: Path = Path("/"), environment: Mapping[str, str] | None = None,
           ) -> Hardware:
    """Detect the machine. Never fails: `notes` lists what could not be read."""
    notes: list[str] = []
    gpus, driver = _gpus(nvml or importlib.import_module("pynvml"), notes)
    gpus, remark = visible_gpus.select(gpus, environment or {}) if gpus else (gpus, "")
    total, available = memory(root, notes)
    return Hardware(gpus, driver, total, available, cpus(root, notes), tuple(notes),
                    "amx_tile" in text(root / "proc/cpuinfo").split(), (remark,) if remark else (),
                    cpu_kernel=KERNEL_LIBRARY.is_file())


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
                notes.append(f"NVML: GPU {index} ignored: {error}")
    except nvml.NVMLError as error:
        notes.append(f"NVML: {error}")
        return (), ""
    finally:
        nvml.nvmlShutdown()
    return tuple(gpus), driver


def _gpu(nvml: Any, index: int, notes: list[str]) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def query(function: Callable[..., Any], default: Any, quantity: str, *arguments: Any) -> Any:
        """Return a value, or the default if unsupported, noted unless `quantity` is empty."""
        try:
            return function(handle, *arguments)
        except (nvml.NVMLError, nvml.NVMLLibraryMismatchError) as error:
            if quantity:
                notes.append(f"NVML: GPU {index}: {quantity} unavailable: {error}")
            return default

    memory = query(nvml.nvmlDeviceGetMemoryInfo, None, "", nvml.nvmlMemory_v2)
    reserved = 0 if memory is None else int(memory.reserved)
    memory = memory or nvml.nvmlDeviceGetMemoryInfo(handle)
    mig = bool(query(nvml.nvmlDeviceGetMigMode, (0, 0), "")[0])
    if mig:
        notes.append(f"GPU {index} is divided by MIG: sizes are those of the whole GPU, not of a slice")
    return Gpu(
        index=index, uuid=nvml.nvmlDeviceGetUUID(handle), name=nvml.nvmlDeviceGetName(handle),
        total_bytes=int(memory.total) - reserved, free_bytes=int(memory.free),
        compute_capability=tuple(query(nvml.nvmlDeviceGetCudaComputeCapability, (0, 0), "compute capability")),
        pcie_generation=int(query(nvml.nvmlDeviceGetMaxPcieLinkGeneration, 0, "PCIe generation")),
        pcie_width=int(query(nvml.nvmlDeviceGetMaxPcieLinkWidth, 0, "PCIe width")), mig=mig,
        core_hertz=1e6 * int(query(nvml.nvmlDeviceGetNumGpuCores, 0, ""))
        * int(query(nvml.nvmlDeviceGetMaxClockInfo, 0, "", nvml.NVML_CLOCK_SM)), ordinal=index)
