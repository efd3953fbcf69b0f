"""`shoehorn doctor`: every check passes or has a remedy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from fakes.nvml import FakeNvml, example, example_gpu
from shoehorn.commands import doctor
from shoehorn.hardware import detect, requirements
from shoehorn.hardware.types import Hardware


def _checks(machine: Hardware, **environment: str) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine(environment, machine)}


@pytest.fixture
def no_gpu(tmp_path: Path) -> Hardware:
    return Hardware(gpus=(), driver_version="", host_memory_bytes=1 << 34, host_available_bytes=1 << 34, cpus=2.0,
                    notes=("NVML: driver library not found",))


def test_invalid_settings_are_the_only_check(no_gpu: Hardware) -> None:
    checks = _checks(no_gpu, PORT="high")
    assert list(checks) == ["settings"]
    assert not checks["settings"].passed
    assert "PORT: 'high'" in checks["settings"].found


def test_gpu_is_required_except_for_the_cpu_profile(no_gpu: Hardware, tmp_path: Path) -> None:
    assert not _checks(no_gpu)["gpu"].passed
    assert "VRAM_PROFILE=cpu" in _checks(no_gpu)["gpu"].remedy
    assert "driver library not found" in _checks(no_gpu)["gpu"].found
    assert _checks(no_gpu, VRAM_PROFILE="cpu")["gpu"].passed


def test_gpu_is_described() -> None:
    machine = detect.detect(nvml=FakeNvml(example(example_gpu())))
    assert machine.gpus[0].name in _checks(machine)["gpu"].found


def test_unusable_gpus_are_named_and_fail_where_no_other_is_left() -> None:
    old = {**example_gpu(1, "Tesla P4"), "nvmlDeviceGetCudaComputeCapability": [6, 1]}
    both = requirements.usable(detect.detect(nvml=FakeNvml(example(example_gpu(), old))))
    assert _checks(both)["gpu"].passed
    assert "Tesla P4) is not used" in _checks(both)["gpu"].found
    alone = _checks(requirements.usable(detect.detect(nvml=FakeNvml(example(old)))))["gpu"]
    assert not alone.passed
    assert "Turing" in alone.remedy


def test_volume_has_to_exist_and_be_writable(no_gpu: Hardware, tmp_path: Path) -> None:
    absent = _checks(no_gpu, MODELS_DIR=str(tmp_path / "absent"))["volume"]
    assert not absent.passed
    assert "MODELS_DIR" in absent.remedy
    assert _checks(no_gpu, MODELS_DIR=str(tmp_path))["volume"].passed


def test_missing_program_is_named(no_gpu: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not _checks(no_gpu)["nginx"].passed


def test_small_shared_memory_is_reported(no_gpu: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.disk, "disk_free", lambda _: 64 << 20)
    assert "--shm-size" in _checks(no_gpu)["shared memory"].remedy
    monkeypatch.setattr(doctor.disk, "disk_free", lambda _: 1 << 30)
    assert _checks(no_gpu)["shared memory"].passed


def test_json_has_every_check_and_failure_an_exit_code(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = doctor.run(argparse.Namespace(json=True), {"VRAM_PROFILE": "cpu", "MODELS_DIR": str(tmp_path / "absent")})
    checks = json.loads(capsys.readouterr().out)
    assert code == 2
    assert {"name", "passed", "found", "remedy"} == set(checks[0])
    assert [check["name"] for check in checks if not check["passed"]][:1] == ["volume"]
