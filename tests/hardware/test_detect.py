"""Hardware: NVML recordings and made-up /proc and /sys/fs/cgroup trees -> what a container may use."""

from __future__ import annotations

import json
from pathlib import Path

import pynvml
import pytest

from fakes import captured
from fakes.nvml import FakeNvml, example, example_gpu
from shoehorn.common import disk
from shoehorn.hardware import detect, gpu_specs, host
from shoehorn.hardware.types import Hardware

GIB = 1 << 30


def machine(root: Path, files: dict[str, str] | None = None, cgroup: str = "0::/", affinity: str = "0-7,12") -> Path:
    """A tree with 64 GiB of memory, 40 of it available, and nine processors."""
    tree = {"proc/meminfo": f"MemTotal: {64 << 20} kB\nMemFree: {8 << 20} kB\nMemAvailable: {40 << 20} kB\n",
            "proc/self/status": f"Name:\tx\nCpus_allowed_list:\t{affinity}\n", "proc/self/cgroup": f"{cgroup}\n",
            **(files or {})}
    for name, text in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_card_has_what_cuda_reports_and_the_link_its_best_not_its_idle_speed(tmp_path: Path) -> None:
    nvml = FakeNvml()
    found = detect.detect(nvml, machine(tmp_path))
    gpu = found.gpus[0]
    assert (gpu.total_bytes, gpu.free_bytes) == (23 * GIB, 17 * GIB)  # 24 GiB, of which the driver reserves one
    assert (gpu.pcie_generation, gpu.pcie_width) == (4, 16)
    assert (gpu.compute_capability, gpu.mig, gpu.name) == ((8, 9), False, "Made-up 24G")
    assert found.driver_version == "580.95.05"
    assert found.notes == ()
    assert nvml.initialised == 0


@pytest.mark.parametrize(("flags", "amx"), [("fpu amx_bf16 amx_tile amx_int8", True), ("fpu avx512f amx_tiles", False)])
def test_the_matrix_instructions_of_a_processor_are_seen(tmp_path: Path, flags: str, amx: bool) -> None:
    assert not detect.detect(FakeNvml(), machine(tmp_path)).amx
    assert detect.detect(FakeNvml(), machine(tmp_path, {"proc/cpuinfo": f"flags\t\t: {flags}\n"})).amx is amx


def test_what_a_card_does_not_tell_is_noted_and_the_card_kept(tmp_path: Path) -> None:
    answers = example_gpu()
    for name in ("nvmlDeviceGetMaxPcieLinkGeneration", "nvmlDeviceGetCudaComputeCapability",
                 "nvmlDeviceGetMemoryInfo_v2"):
        answers[name] = {"error": pynvml.NVML_ERROR_NOT_SUPPORTED}
    found = detect.detect(FakeNvml(example(answers)), machine(tmp_path))
    assert found.gpus[0].pcie_generation == 0
    assert found.gpus[0].compute_capability == (0, 0)
    assert found.gpus[0].total_bytes == 24 * GIB
    assert sum("does not tell" in note for note in found.notes) == 2


def test_a_lost_card_is_left_out_and_named(tmp_path: Path) -> None:
    nvml = FakeNvml(example(example_gpu(), example_gpu(1)))
    nvml.lose(1)
    found = detect.detect(nvml, machine(tmp_path))
    assert [gpu.index for gpu in found.gpus] == [0]
    assert "GPU 1 is left out" in found.notes[0]


def test_a_divided_card_says_so(tmp_path: Path) -> None:
    found = detect.detect(FakeNvml(example({**example_gpu(), "nvmlDeviceGetMigMode": [1, 1]})), machine(tmp_path))
    assert found.gpus[0].mig
    assert "MIG" in found.notes[0]


@pytest.mark.parametrize(("code", "note"), [
    (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "NVML: driver library not found"),
    (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "NVML: Driver Not Loaded"),
])
def test_no_driver_is_no_error_but_a_note(tmp_path: Path, code: int, note: str) -> None:
    nvml = FakeNvml()
    nvml.fail["nvmlInit"] = code
    found = detect.detect(nvml, machine(tmp_path))
    assert found.gpus == ()
    assert found.notes == (note,)
    assert found.host_memory_bytes == 64 * GIB


def test_nvml_that_fails_after_it_began_is_closed_and_noted(tmp_path: Path) -> None:
    nvml = FakeNvml()
    nvml.fail["nvmlDeviceGetCount"] = pynvml.NVML_ERROR_UNKNOWN
    assert detect.detect(nvml, machine(tmp_path)).notes == ("NVML: Unknown Error",)
    assert nvml.initialised == 0


def test_a_free_machine_has_all_of_itself(tmp_path: Path) -> None:
    found = detect.detect(FakeNvml(), machine(tmp_path))
    assert (found.host_memory_bytes, found.host_available_bytes, found.cpus) == (64 * GIB, 40 * GIB, 9.0)


def test_cgroup_2_limits_memory_and_processors(tmp_path: Path) -> None:
    found = detect.detect(FakeNvml(), machine(tmp_path, {
        "sys/fs/cgroup/memory.max": f"{16 * GIB}\n", "sys/fs/cgroup/memory.current": f"{10 * GIB}\n",
        "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {4 * GIB}\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}))
    assert found.host_memory_bytes == 16 * GIB
    assert found.host_available_bytes == 10 * GIB  # 6 used, without the 4 of file cache
    assert found.cpus == 2.5


def test_the_tightest_group_above_counts(tmp_path: Path) -> None:
    found = detect.detect(FakeNvml(), machine(tmp_path, {
        "sys/fs/cgroup/a/memory.max": f"{8 * GIB}\n", "sys/fs/cgroup/a/memory.current": "0\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, cgroup="0::/a/b"))
    assert found.host_memory_bytes == 8 * GIB
    assert found.cpus == 9.0


def test_the_hosts_path_inside_a_container_leads_to_the_top(tmp_path: Path) -> None:
    found = detect.detect(FakeNvml(), machine(
        tmp_path, {"sys/fs/cgroup/memory.max": f"{8 * GIB}\n"}, cgroup="0::/docker/0123"))
    assert found.host_memory_bytes == 8 * GIB


@pytest.mark.parametrize(("cgroup", "folder", "name"), [
    ("0::/", "", "memory.events"), ("4:memory:/", "memory", "memory.oom_control")])
def test_processes_that_the_kernel_killed_for_memory_are_counted(tmp_path: Path, cgroup: str, folder: str,
                                                                 name: str) -> None:
    assert host.memory_kills(tmp_path) == 0
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{cgroup}\n")
    group = tmp_path / "sys/fs/cgroup" / folder
    group.mkdir(parents=True)
    (group / name).write_text("oom 3\noom_kill 2\n")
    assert host.memory_kills(tmp_path) == 2


def test_cgroup_1_limits_memory_and_processors(tmp_path: Path) -> None:
    found = detect.detect(FakeNvml(), machine(tmp_path, {
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{12 * GIB}\n",
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{5 * GIB}\n",
        "sys/fs/cgroup/memory/box/memory.stat": f"total_inactive_file {GIB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, cgroup="4:memory:/box\n2:cpu,cpuacct:/\n0::/"))
    assert (found.host_memory_bytes, found.host_available_bytes, found.cpus) == (12 * GIB, 8 * GIB, 1.5)


def test_nothing_readable_is_noted_not_guessed(tmp_path: Path) -> None:
    found = detect.detect(FakeNvml(), tmp_path)
    assert (found.host_memory_bytes, found.host_available_bytes, found.cpus) == (0, 0, 1.0)
    assert len(found.notes) == 2


def test_this_machine_can_be_read() -> None:
    found = detect.detect()
    assert found.host_memory_bytes >= found.host_available_bytes > 0
    assert found.cpus > 0


def test_a_capture_survives_json(tmp_path: Path) -> None:
    found = detect.detect(FakeNvml(), machine(tmp_path))
    assert Hardware.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_disk_free_looks_at_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert disk.disk_free(tmp_path / "not" / "yet") > 0


def test_disk_used_counts_the_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "part").write_bytes(b"123")
    (tmp_path / "a" / "whole").write_bytes(b"4567")
    assert disk.disk_used(tmp_path / "a") == 7
    assert disk.disk_used(tmp_path / "gone") == 0


@pytest.mark.parametrize("name", captured.machines())
def test_of_a_card_as_sold_a_little_less_is_planned_with_than_it_has(name: str) -> None:
    gpu = captured.machine(name).gpus[0]
    assert 0.987 <= gpu_specs.total_of_sold(float(name.split("-")[1]), gpu.name) / gpu.total_bytes <= 1
    assert gpu_specs.total_of_sold(0.1, gpu.name) == 0
