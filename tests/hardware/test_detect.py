"""Detection: NVML recordings and synthetic /proc and /sys/fs/cgroup trees -> limits of a container."""

from __future__ import annotations

import json
from pathlib import Path

import pynvml
import pytest

from fakes.nvml import FakeNvml, example, example_gpu
from shoehorn.hardware import detect, host
from shoehorn.hardware.types import Hardware

GIB = 1 << 30


def machine(root: Path, files: dict[str, str] | None = None, cgroup: str = "0::/", affinity: str = "0-7,12") -> Path:
    """Write a tree with 64 GiB of memory, 40 of it available, and nine CPUs."""
    tree = {"proc/meminfo": f"MemTotal: {64 << 20} kB\nMemFree: {8 << 20} kB\nMemAvailable: {40 << 20} kB\n",
            "proc/self/status": f"Name:\tx\nCpus_allowed_list:\t{affinity}\n", "proc/self/cgroup": f"{cgroup}\n",
            **(files or {})}
    for name, text in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_gpu_has_the_memory_of_cuda_and_the_maximum_of_its_pcie_link(tmp_path: Path) -> None:
    nvml = FakeNvml()
    hardware = detect.detect(nvml, machine(tmp_path))
    gpu = hardware.gpus[0]
    assert (gpu.total_bytes, gpu.free_bytes) == (23 * GIB, 17 * GIB)  # 24 GiB, of which the driver reserves one
    assert (gpu.pcie_generation, gpu.pcie_width) == (4, 16)
    assert (gpu.compute_capability, gpu.mig, gpu.name) == ((8, 9), False, "Made-up 24G")
    assert hardware.driver_version == "580.95.05"
    assert hardware.notes == ()
    assert nvml.initialised == 0


@pytest.mark.parametrize(("flags", "amx"), [("fpu amx_bf16 amx_tile amx_int8", True), ("fpu avx512f amx_tiles", False)])
def test_amx_is_detected(tmp_path: Path, flags: str, amx: bool) -> None:
    assert not detect.detect(FakeNvml(), machine(tmp_path)).amx
    assert detect.detect(FakeNvml(), machine(tmp_path, {"proc/cpuinfo": f"flags\t\t: {flags}\n"})).amx is amx


def test_unsupported_gpu_properties_are_noted(tmp_path: Path) -> None:
    answers = example_gpu()
    for name in ("nvmlDeviceGetMaxPcieLinkGeneration", "nvmlDeviceGetCudaComputeCapability",
                 "nvmlDeviceGetMemoryInfo_v2"):
        answers[name] = {"error": pynvml.NVML_ERROR_NOT_SUPPORTED}
    hardware = detect.detect(FakeNvml(example(answers)), machine(tmp_path))
    assert hardware.gpus[0].pcie_generation == 0
    assert hardware.gpus[0].compute_capability == (0, 0)
    assert hardware.gpus[0].total_bytes == 24 * GIB
    assert sum("unavailable" in note for note in hardware.notes) == 2


def test_lost_gpu_is_ignored_with_a_note(tmp_path: Path) -> None:
    nvml = FakeNvml(example(example_gpu(), example_gpu(1)))
    nvml.lose(1)
    hardware = detect.detect(nvml, machine(tmp_path))
    assert [gpu.index for gpu in hardware.gpus] == [0]
    assert "GPU 1 ignored" in hardware.notes[0]


def test_mig_is_noted(tmp_path: Path) -> None:
    hardware = detect.detect(FakeNvml(example({**example_gpu(), "nvmlDeviceGetMigMode": [1, 1]})), machine(tmp_path))
    assert hardware.gpus[0].mig
    assert "MIG" in hardware.notes[0]


@pytest.mark.parametrize(("code", "note"), [
    (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "NVML: driver library not found"),
    (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "NVML: Driver Not Loaded"),
])
def test_missing_driver_is_a_note_not_an_error(tmp_path: Path, code: int, note: str) -> None:
    nvml = FakeNvml()
    nvml.fail["nvmlInit"] = code
    hardware = detect.detect(nvml, machine(tmp_path))
    assert hardware.gpus == ()
    assert hardware.notes == (note,)
    assert hardware.host_memory_bytes == 64 * GIB


def test_nvml_is_shut_down_after_an_error(tmp_path: Path) -> None:
    nvml = FakeNvml()
    nvml.fail["nvmlDeviceGetCount"] = pynvml.NVML_ERROR_UNKNOWN
    assert detect.detect(nvml, machine(tmp_path)).notes == ("NVML: Unknown Error",)
    assert nvml.initialised == 0


def test_machine_without_limits_has_all_memory_and_cpus(tmp_path: Path) -> None:
    hardware = detect.detect(FakeNvml(), machine(tmp_path))
    assert (hardware.host_memory_bytes, hardware.host_available_bytes, hardware.cpus) == (64 * GIB, 40 * GIB, 9.0)


def test_cgroup_v2_limits_memory_and_cpus(tmp_path: Path) -> None:
    hardware = detect.detect(FakeNvml(), machine(tmp_path, {
        "sys/fs/cgroup/memory.max": f"{16 * GIB}\n", "sys/fs/cgroup/memory.current": f"{10 * GIB}\n",
        "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {4 * GIB}\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}))
    assert hardware.host_memory_bytes == 16 * GIB
    assert hardware.host_available_bytes == 10 * GIB  # 6 GiB used, without 4 GiB of file cache
    assert hardware.cpus == 2.5


def test_strictest_limit_of_all_ancestor_cgroups_applies(tmp_path: Path) -> None:
    hardware = detect.detect(FakeNvml(), machine(tmp_path, {
        "sys/fs/cgroup/a/memory.max": f"{8 * GIB}\n", "sys/fs/cgroup/a/memory.current": "0\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, cgroup="0::/a/b"))
    assert hardware.host_memory_bytes == 8 * GIB
    assert hardware.cpus == 9.0


def test_host_path_in_a_container_means_the_root_of_the_mount(tmp_path: Path) -> None:
    hardware = detect.detect(FakeNvml(), machine(
        tmp_path, {"sys/fs/cgroup/memory.max": f"{8 * GIB}\n"}, cgroup="0::/docker/0123"))
    assert hardware.host_memory_bytes == 8 * GIB


@pytest.mark.parametrize(("cgroup", "folder", "name"), [
    ("0::/", "", "memory.events"), ("4:memory:/", "memory", "memory.oom_control")])
def test_out_of_memory_kills_are_counted(tmp_path: Path, cgroup: str, folder: str, name: str) -> None:
    assert host.memory_kills(tmp_path) == 0
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{cgroup}\n")
    group = tmp_path / "sys/fs/cgroup" / folder
    group.mkdir(parents=True)
    (group / name).write_text("oom 3\noom_kill 2\n")
    assert host.memory_kills(tmp_path) == 2


def test_cgroup_v1_limits_memory_and_cpus(tmp_path: Path) -> None:
    hardware = detect.detect(FakeNvml(), machine(tmp_path, {
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{12 * GIB}\n",
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{5 * GIB}\n",
        "sys/fs/cgroup/memory/box/memory.stat": f"total_inactive_file {GIB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, cgroup="4:memory:/box\n2:cpu,cpuacct:/\n0::/"))
    assert (hardware.host_memory_bytes, hardware.host_available_bytes, hardware.cpus) == (12 * GIB, 8 * GIB, 1.5)


def test_unreadable_values_are_noted(tmp_path: Path) -> None:
    hardware = detect.detect(FakeNvml(), tmp_path)
    assert (hardware.host_memory_bytes, hardware.host_available_bytes, hardware.cpus) == (0, 0, 1.0)
    assert len(hardware.notes) == 2


def test_real_machine_is_detected() -> None:
    hardware = detect.detect()
    assert hardware.host_memory_bytes >= hardware.host_available_bytes > 0
    assert hardware.cpus > 0


def test_capture_survives_json(tmp_path: Path) -> None:
    hardware = detect.detect(FakeNvml(), machine(tmp_path))
    assert Hardware.from_json(json.loads(json.dumps(hardware.to_json()))) == hardware
