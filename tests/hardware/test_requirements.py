"""Minimum requirements: unsupported machines are rejected, unknown values pass."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoehorn.common.errors import DoesNotFitError
from shoehorn.hardware import requirements
from shoehorn.hardware.types import Gpu, Hardware

GIB = 1 << 30
GPU = Gpu(0, "GPU-0", "NVIDIA GeForce RTX 3060", 12 * GIB, 12 * GIB, (8, 6), 4, 16, False)
MACHINE = Hardware((GPU,), "580.95.05", 32 * GIB, 32 * GIB, 8.0)


@pytest.mark.parametrize("machine", [
    MACHINE, replace(MACHINE, driver_version=""), replace(MACHINE, gpus=(replace(GPU, compute_capability=(0, 0)),)),
    replace(MACHINE, gpus=(), driver_version="470.1")])
def test_supported_and_unknown_machines_pass(machine: Hardware) -> None:
    requirements.check(machine)


@pytest.mark.parametrize(("machine", "code", "facts", "remedy"), [
    (replace(MACHINE, driver_version="570.172.08"), "driver_too_old", r"570\.172\.08.*580", "nvidia-driver-580"),
    (replace(MACHINE, gpus=(replace(GPU, name="Tesla V100", compute_capability=(7, 0)),)), "gpu_too_old",
     r"Tesla V100 \(GPU 0\).*7\.0.*7\.5", "Turing"),
    (replace(MACHINE, gpus=(GPU, replace(GPU, index=1, free_bytes=GIB // 2))), "gpu_in_use",
     r"\(GPU 1\).*512 MiB of 12", "nvidia-smi"),
])
def test_unsupported_machine_is_rejected_with_a_remedy(machine: Hardware, code: str, facts: str, remedy: str) -> None:
    with pytest.raises(DoesNotFitError, match=facts) as caught:
        requirements.check(machine)
    assert (caught.value.code, caught.value.exit_code) == (code, 3)
    assert remedy in caught.value.remedy
