"""Rates of the CPU kernel are measured once for a processor, its CPUs and a version; a failure leaves them unknown."""

from __future__ import annotations

import json
import logging
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from shoehorn.hardware import kernel_probe
from shoehorn.hardware.kernel_probe import with_measured_kernel
from shoehorn.hardware.types import Gpu, Hardware, HostCompute

GIB = 1 << 30
GPU = Gpu(0, "GPU-0", "NVIDIA GeForce RTX 3060", 12 * GIB, 12 * GIB, (8, 6), 4, 16, False)
MACHINE = Hardware((GPU,), "580.95.05", 32 * GIB, 32 * GIB, 8.0)
RESULT = json.dumps({"read": 60e9, "tokens_1": 57e9, "tokens_8": 40e9})
RATES = HostCompute(60e9, 57e9, 40e9)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands of the measuring process, whose stand-in prints RESULT."""
    started: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        started.append(command)
        return SimpleNamespace(stdout=RESULT, stderr="", returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return started


@pytest.fixture(autouse=True)
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the engine's CUDA build is installed."""
    monkeypatch.setattr(kernel_probe.importlib.util, "find_spec", lambda _: object())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nmodel name\t: Xeon A\n")
    return tmp_path


def test_kernel_is_measured_once_for_a_processor(tmp_path: Path, root: Path, commands: list[list[str]]) -> None:
    cache = tmp_path / "state" / "speed.json"
    assert with_measured_kernel(MACHINE, cache, measure=False, root=root).host_compute is None
    for _ in range(2):
        assert with_measured_kernel(MACHINE, cache, root=root).host_compute == RATES
    assert with_measured_kernel(MACHINE, cache, measure=False, root=root).host_compute == RATES
    assert len(commands) == 1
    with_measured_kernel(replace(MACHINE, cpus=16.0), cache, root=root)
    (root / "proc/cpuinfo").write_text("model name\t: Xeon B\n")
    with_measured_kernel(MACHINE, cache, root=root)
    assert len(commands) == 3


@pytest.mark.parametrize("machine", [replace(MACHINE, gpus=()), replace(MACHINE, cpus=2.0),
                                     replace(MACHINE, host_available_bytes=GIB)])
def test_machines_on_which_it_is_not_measured(machine: Hardware, tmp_path: Path, root: Path,
                                              commands: list[list[str]]) -> None:
    assert with_measured_kernel(machine, tmp_path / "speed.json", root=root) == machine
    assert commands == []


def test_bandwidths_of_gpus_stay_in_the_file(tmp_path: Path, root: Path, commands: list[list[str]]) -> None:
    cache = tmp_path / "speed.json"
    cache.write_text('{"GPU-0 580 4x16": {"link": 24e9, "device": 350e9}}')
    with_measured_kernel(MACHINE, cache, root=root)
    assert [set(values) for values in json.loads(cache.read_text()).values()] == [
        {"link", "device"}, {"read", "tokens_1", "tokens_8"}]


@pytest.mark.parametrize("output", ["", "{}", '{"read": 1, "tokens_1": null, "tokens_8": 2}'])
def test_failure_leaves_the_rates_unknown_with_a_warning(
        output: str, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(
        stdout=output, stderr="KernelUnavailableError: no library", returncode=1))
    with caplog.at_level(logging.WARNING):
        assert with_measured_kernel(MACHINE, tmp_path / "speed.json", root=root).host_compute is None
    assert "no library" in caplog.text
    assert not (tmp_path / "speed.json").exists()


@pytest.mark.contract  # two seconds on a quiet machine
def test_the_real_process_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOEHORN_CPU_THREADS", "1")
    figures = kernel_probe._measure()
    assert set(figures) == {"read", "tokens_1", "tokens_8"}
    assert all(value > 1e7 for value in figures.values())
