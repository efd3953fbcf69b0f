"""Measured bandwidths are cached by GPU, driver and PCIe link; a failed measurement leaves the datasheet values."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from shoehorn.hardware import gpu_specs
from shoehorn.hardware.bandwidth_probe import importlib as probe_importlib
from shoehorn.hardware.bandwidth_probe import with_measured_bandwidths
from shoehorn.hardware.types import Gpu, Hardware

GIB = 1 << 30
GPU = Gpu(0, "GPU-0", "NVIDIA GeForce RTX 3060", 12 * GIB, 12 * GIB, (8, 6), 4, 16, False)
MACHINE = Hardware((GPU,), "580.95.05", 32 * GIB, 32 * GIB, 8.0)
RESULT = '{"link": 24000000000, "device": 350000000000}'


class Probe:
    """Stand-in for the measuring process; an empty result is a failure."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, result: str) -> None:
        self.commands: list[list[str]] = []
        self.visible: list[str] = []
        self._result = result
        monkeypatch.setattr(probe_importlib.util, "find_spec", lambda _: object())
        monkeypatch.setattr(subprocess, "run", self._run)

    def _run(self, command: list[str], env: dict[str, str], **_: object) -> SimpleNamespace:
        self.commands.append(command)
        self.visible.append(env["CUDA_VISIBLE_DEVICES"])
        if not self._result:
            raise subprocess.CalledProcessError(1, command)
        return SimpleNamespace(stdout=self._result)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "state" / "speed.json"


def test_bandwidths_are_measured_once_for_a_gpu_driver_and_link(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe(monkeypatch, RESULT)
    for _ in range(2):
        measured = with_measured_bandwidths(MACHINE, cache)
        assert (measured.gpus[0].link_bytes_per_second, measured.gpus[0].device_bytes_per_second) == (24e9, 350e9)
    assert probe.commands == [[sys.executable, "-m", "shoehorn.hardware.bandwidth_probe"]]
    assert probe.visible == ["GPU-0"]
    assert gpu_specs.host_to_device_bandwidth(measured.gpus[0]) == (24e9, True)
    assert json.loads(cache.read_text())
    with_measured_bandwidths(replace(MACHINE, driver_version="590.1"), cache)
    with_measured_bandwidths(replace(MACHINE, gpus=(replace(GPU, pcie_width=8),)), cache)
    assert len(probe.commands) == 3


def test_failed_measurement_is_logged_and_datasheet_values_are_used(
        cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    Probe(monkeypatch, "")
    with caplog.at_level(logging.WARNING):
        measured = with_measured_bandwidths(MACHINE, cache)
    assert measured.gpus[0].link_bytes_per_second == 0
    assert gpu_specs.host_to_device_bandwidth(measured.gpus[0]) == (25e9, True)
    assert "gpu=0" in caplog.text
    assert not cache.exists()


def test_gpu_without_free_memory_is_not_measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe(monkeypatch, RESULT)
    full = replace(MACHINE, gpus=(replace(GPU, free_bytes=GIB // 2),))
    assert with_measured_bandwidths(full, cache) == full
    assert probe.commands == []


def test_machine_without_cuda_is_not_measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe(monkeypatch, RESULT)
    monkeypatch.setattr(probe_importlib.util, "find_spec", lambda _: None)
    assert with_measured_bandwidths(MACHINE, cache) == MACHINE
    assert probe.commands == []


def test_damaged_cache_is_measured_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.mkdir()
    cache.write_text("[1]")
    probe = Probe(monkeypatch, RESULT)
    assert with_measured_bandwidths(MACHINE, cache).gpus[0].link_bytes_per_second == 24e9
    assert len(probe.commands) == 1
