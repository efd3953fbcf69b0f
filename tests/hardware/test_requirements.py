"""Minimum requirements: unsupported machines are rejected, unknown values pass."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoehorn.common.errors import DoesNotFitError, ShoehornError
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
    (replace(MACHINE, gpus=(replace(GPU, free_bytes=GIB // 2),)), "gpu_in_use", r"\(GPU 0\).*512 MiB of 12",
     "nvidia-smi"),
])
def test_unsupported_machine_is_rejected_with_a_remedy(machine: Hardware, code: str, facts: str, remedy: str) -> None:
    with pytest.raises(DoesNotFitError, match=facts) as caught:
        requirements.check(machine)
    assert (caught.value.code, caught.value.exit_code) == (code, 3)
    assert remedy in caught.value.remedy


OLD = replace(GPU, index=1, uuid="GPU-1", name="Tesla P4", compute_capability=(6, 1))
FULL = replace(GPU, index=2, uuid="GPU-2", free_bytes=GIB // 2)
SLICED = replace(GPU, index=3, uuid="GPU-3", mig=True)


def test_unusable_gpus_among_good_ones_are_left_out_with_a_word() -> None:
    machine = requirements.usable(replace(MACHINE, gpus=(OLD, GPU, FULL, SLICED)))
    assert machine.gpus == (GPU,)
    requirements.check(machine)
    assert [remark.partition(" is not used: ")[::2] for remark in machine.gpu_remarks] == [
        ("GPU 1 (Tesla P4)", "compute capability 6.1 is unsupported; CUDA 13 requires 7.5 or newer"),
        ("GPU 2 (NVIDIA GeForce RTX 3060)", "out of memory; 512 MiB of 12.00 GiB free, the rest is used by "
         "other processes"),
        ("GPU 3 (NVIDIA GeForce RTX 3060)", "divided by MIG, which is unsupported")]


def test_all_unusable_gpus_are_refused_with_the_problem_of_the_first() -> None:
    machine = requirements.usable(replace(MACHINE, gpus=(SLICED, OLD)))
    assert machine.gpus == (SLICED, OLD)
    with pytest.raises(ShoehornError) as caught:
        requirements.check(machine)
    assert (caught.value.code, caught.value.exit_code) == ("unsupported_mig", 2)


def test_first_gpu_may_be_unusable_while_another_is_usable() -> None:
    requirements.check(replace(MACHINE, gpus=(OLD, GPU)))


def test_too_few_gpus_names_those_that_are_left_out() -> None:
    machine = requirements.usable(replace(MACHINE, gpus=(GPU, OLD)))
    with pytest.raises(ShoehornError, match=r"has 1 .*Tesla P4.*not used") as caught:
        requirements.require_gpus(machine, "2x20gb", 2)
    assert caught.value.code == "too_few_gpus"


def test_plan_is_refused_on_the_kind_of_a_gpu_not_on_its_load() -> None:
    requirements.check_kind(replace(MACHINE, gpus=(FULL,)))
    with pytest.raises(ShoehornError) as caught:
        requirements.check_kind(replace(MACHINE, gpus=(OLD,)))
    assert caught.value.code == "gpu_too_old"
