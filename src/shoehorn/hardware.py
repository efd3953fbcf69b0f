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
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

_ECC = re.compile(r"(?<![A-Z\d])(T4|L4|L40S?|A2|A10G?|A16|A40)(?![\d])", re.IGNORECASE)
"""Parts of names of cards that keep a sixteenth of their memory for error correction."""

_DRIVERS_BYTES, _DRIVERS_SHARE = 330 << 20, 0.009
"""What the driver reserves of a card, at most: 380 MiB were seen of 8 GB, 430 of 20, 1,230 of 141 (tests/captures)."""

_V1_UNLIMITED = 1 << 62
"""cgroup v1 writes a number close to 2^63 where there is no limit."""


def total_of_sold(gigabytes: float, name: str) -> int:
    """Bytes that CUDA reports as total of a card that is sold with so many GB; a little less than most have.

    Args:
        name: NVIDIA's, or a part of it like `L4`; may be empty.
    """
    whole = gigabytes * (1 << 30) * (15 / 16 if _ECC.search(name) else 1)
    return max(0, round(whole * (1 - _DRIVERS_SHARE)) - _DRIVERS_BYTES)


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


def detect(nvml: ModuleType | None = None, root: Path = Path("/")) -> Hardware:
    """Look at the machine. Never fails: what cannot be read is in `notes`."""
    notes: list[str] = []
    gpus, driver = _gpus(nvml or importlib.import_module("pynvml"), notes)
    total, available = _memory(root, notes)
    cpus = _cpus(root, notes)
    return Hardware(gpus, driver, total, available, cpus, tuple(notes),
                    "amx_tile" in _text(root / "proc/cpuinfo").split())


def memory_kills(root: Path = Path("/")) -> int:
    """How many processes of this one's control group the kernel has killed for memory; 0 where that cannot be read."""
    counts = [_fields(group / name).get("oom_kill", 0)
              for group in _groups(root, "memory") for name in ("memory.events", "memory.oom_control")]
    return max(counts, default=0)


def disk_free(path: Path) -> int:
    """Free bytes on the file system of `path`, or of its nearest parent that exists."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def disk_used(path: Path) -> int:
    """Bytes of all files in a folder, which need not exist; a model that was pulled in part is not pulled anew."""
    total = 0
    for file in path.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue  # a pull that runs beside us has just renamed it
    return total


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


def _memory(root: Path, notes: list[str]) -> tuple[int, int]:
    """(total, available) in bytes; (0, 0) when /proc/meminfo cannot be read."""
    fields = _fields(root / "proc/meminfo")
    try:
        total, available = fields["MemTotal:"] * 1024, fields.get("MemAvailable:", fields["MemFree:"]) * 1024
    except KeyError:
        notes.append("/proc/meminfo: cannot be read, so host memory counts as none")
        return 0, 0
    for group in _groups(root, "memory"):
        v1 = (group / "memory.limit_in_bytes").exists()
        limit = _number(group / ("memory.limit_in_bytes" if v1 else "memory.max"))
        if limit is None or limit >= _V1_UNLIMITED:
            continue
        used = _number(group / ("memory.usage_in_bytes" if v1 else "memory.current")) or 0
        cache = _fields(group / "memory.stat").get("total_inactive_file" if v1 else "inactive_file", 0)
        total = min(total, limit)
        available = min(available, max(0, limit - max(0, used - cache)))
    return total, available


def _cpus(root: Path, notes: list[str]) -> float:
    """Processors' worth of time; 1 when nothing can be read."""
    cpus = float(_affinity(root))
    if not cpus:
        notes.append("/proc/self/status: the processors cannot be read, so they count as one")
        cpus = 1.0
    for group in _groups(root, "cpu"):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota is None:
            words = _text(group / "cpu.max").split()
            quota, period = (int(words[0]), int(words[1])) if len(words) == 2 and words[0] != "max" else (None, None)
        if quota and period and quota > 0:
            cpus = min(cpus, quota / period)
    return cpus


def _affinity(root: Path) -> int:
    """The number of processors that this process may run on; 0 when unknown."""
    for line in _text(root / "proc/self/status").splitlines():
        if line.startswith("Cpus_allowed_list:"):
            ranges = [part.split("-") for part in line.split(":")[1].strip().split(",")]
            return sum(int(each[-1]) - int(each[0]) + 1 for each in ranges)
    return 0


def _groups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control group and of all above it: limits add up.

    Inside a container the path of /proc/self/cgroup may be the host's, which is not there: the mount's top is then
    the container's own group.
    """
    folders: list[Path] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        inner = Path(path.lstrip("/"))
        folders += [top / inner, *(top / parent for parent in inner.parents)]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _fields(path: Path) -> dict[str, int]:
    """Lines of `name number ...` as numbers by name."""
    words = (line.split() for line in _text(path).splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}


def _number(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None


def _text(path: Path) -> str:
    """The file's text; empty when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
