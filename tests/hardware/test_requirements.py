"""Machines that cannot run the engine are recognised by name; unknown ones are not."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from shoehorn.common.errors import DoesNotFitError
from shoehorn.hardware import bandwidth_probe, gpu_specs, requirements
from shoehorn.hardware.types import Gpu, Hardware

GIB = 1 << 30
GPU = Gpu(0, "GPU-0", "NVIDIA GeForce RTX 3060", 12 * GIB, 12 * GIB, (8, 6), 4, 16, False)
MACHINE = Hardware((GPU,), "580.95.05", 32 * GIB, 32 * GIB, 8.0)


def test_a_machine_that_can_is_let_through() -> None:
    requirements.check(MACHINE)
    requirements.check(replace(MACHINE, driver_version=""))
    requirements.check(replace(MACHINE, gpus=(replace(GPU, compute_capability=(0, 0)),)))
    requirements.check(replace(MACHINE, gpus=(), driver_version="470.1"))


@pytest.mark.parametrize(("machine", "cause", "remedy"), [
    (replace(MACHINE, driver_version="570.172.08"), "driver is 570.172.08.*needs 580 or newer", "nvidia-driver-580"),
    (replace(MACHINE, gpus=(replace(GPU, name="Tesla V100", compute_capability=(7, 0)),)),
     r"Tesla V100 \(GPU 0\) has compute capability 7.0.*none below 7.5", "Turing generation or newer"),
    (replace(MACHINE, gpus=(GPU, replace(GPU, index=1, free_bytes=GIB // 2))), r"\(GPU 1\) is full: 512 MiB of 12",
     "nvidia-smi"),
])
def test_what_cannot_run_is_refused_with_what_to_type(machine: Hardware, cause: str, remedy: str) -> None:
    with pytest.raises(DoesNotFitError, match=cause) as caught:
        requirements.check(machine)
    assert remedy in caught.value.remedy
    assert caught.value.exit_code == 3


def ran(monkeypatch: pytest.MonkeyPatch, answer: str, calls: list[list[str]]) -> None:
    """A machine with CUDA, whose probe prints `answer`."""
    def run(command: list[str], **_: object) -> SimpleNamespace:
        calls.append(command)
        if not answer:
            raise subprocess.CalledProcessError(1, command)
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(bandwidth_probe.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(bandwidth_probe.subprocess, "run", run)


def test_the_speed_is_measured_once_and_kept_for_card_driver_and_slot(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    ran(monkeypatch, '{"link": 24000000000, "device": 350000000000}', calls)
    for _ in range(2):
        probed = bandwidth_probe.probed(MACHINE, tmp_path)
        assert (probed.gpus[0].link_bytes_per_second, probed.gpus[0].device_bytes_per_second) == (24e9, 350e9)
    assert calls == [[sys.executable, "-m", "shoehorn.hardware.bandwidth_probe", "0"]]
    assert gpu_specs.link_bytes_per_second(probed.gpus[0]) == (24e9, True)
    assert json.loads((tmp_path / ".shoehorn" / "speed.json").read_text())
    bandwidth_probe.probed(replace(MACHINE, driver_version="590.1"), tmp_path)
    bandwidth_probe.probed(replace(MACHINE, gpus=(replace(GPU, pcie_width=8),)), tmp_path)
    assert len(calls) == 3


def test_a_probe_that_fails_leaves_the_table_and_says_so(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    ran(monkeypatch, "", [])
    with caplog.at_level(logging.WARNING):
        probed = bandwidth_probe.probed(MACHINE, tmp_path)
    assert probed.gpus[0].link_bytes_per_second == 0
    assert gpu_specs.link_bytes_per_second(probed.gpus[0]) == (25e9, True)
    assert "could not be measured" in caplog.text
    assert not (tmp_path / ".shoehorn" / "speed.json").exists()


def test_a_full_card_and_a_machine_without_cuda_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    ran(monkeypatch, '{"link": 1, "device": 1}', calls)
    full = replace(MACHINE, gpus=(replace(GPU, free_bytes=GIB // 2),))
    assert bandwidth_probe.probed(full, tmp_path) == full
    monkeypatch.setattr(bandwidth_probe.importlib.util, "find_spec", lambda _: None)
    assert bandwidth_probe.probed(MACHINE, tmp_path) == MACHINE
    assert calls == []


def test_a_damaged_file_of_speeds_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".shoehorn").mkdir()
    (tmp_path / ".shoehorn" / "speed.json").write_text("[1]")
    calls: list[list[str]] = []
    ran(monkeypatch, '{"link": 24000000000, "device": 350000000000}', calls)
    assert bandwidth_probe.probed(MACHINE, tmp_path).gpus[0].link_bytes_per_second == 24e9
    assert len(calls) == 1
