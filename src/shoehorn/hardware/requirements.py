"""Minimum requirements of the engine: driver, GPU generation and free memory, checked before a download.

Rules: pure; an unknown value passes; each error states the value, the requirement and the remedy; an unusable GPU is
left out with a remark while others are usable.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shoehorn.common.errors import DoesNotFitError, SettingsError
from shoehorn.common.units import GIB, format_size
from shoehorn.hardware.types import Gpu, Hardware

MINIMUM_DRIVER = 580
"""First driver for CUDA 13, which the image contains (CUDA 13.0 release notes)."""

MINIMUM_CAPABILITY = (7, 5)
"""Oldest generation (Turing) for which torch 2.13 for CUDA 13 contains kernels."""

_CONTEXT_BYTES = GIB
"""Memory for the CUDA context and a first layer."""


def usable(hardware: Hardware) -> Hardware:
    """Leave out GPUs that the engine cannot use, each with a remark; all remain where none is usable."""
    problems = {gpu: _problem(gpu) for gpu in hardware.gpus}
    gpus = tuple(gpu for gpu, problem in problems.items() if problem is None)
    if not gpus:
        return hardware
    remarks = tuple(f"{gpu.label} is not used: {problem.fact}" for gpu, problem in problems.items() if problem)
    return replace(hardware, gpus=gpus, gpu_remarks=(*hardware.gpu_remarks, *remarks))


def check(hardware: Hardware) -> None:
    """Check the driver, and that at least one GPU is usable if there are any.

    Raises:
        DoesNotFitError, SettingsError: the engine cannot run on this machine; the problem is that of the first GPU.
    """
    major = hardware.driver_version.split(".")[0]
    if hardware.gpus and major.isdecimal() and int(major) < MINIMUM_DRIVER:
        raise DoesNotFitError(
            f"NVIDIA driver {hardware.driver_version}: unsupported; CUDA 13 requires {MINIMUM_DRIVER} or newer.",
            f"On the host: sudo apt-get install nvidia-driver-{MINIMUM_DRIVER} (or the package of its distribution), "
            "then reboot. The container needs no change.", code="driver_too_old")
    problems = [_problem(gpu) for gpu in hardware.gpus]
    if problems and problems[0] and all(problems):
        gpu, problem = hardware.gpus[0], problems[0]
        error = SettingsError if problem.code == "unsupported_mig" else DoesNotFitError
        raise error(f"{gpu.name} (GPU {gpu.index}): {problem.fact}.", problem.remedy, code=problem.code)


def check_kind(hardware: Hardware) -> None:
    """Check as `check`, except for memory that other processes use, which a plan counts.

    Raises:
        DoesNotFitError, SettingsError: the engine cannot run on this machine.
    """
    check(replace(hardware, gpus=tuple(replace(gpu, free_bytes=gpu.total_bytes) for gpu in hardware.gpus)))


@dataclass(frozen=True)
class _Problem:
    """Reason for which the engine cannot use a GPU."""

    code: str
    fact: str
    remedy: str


def _problem(gpu: Gpu) -> _Problem | None:
    """Return the problem of a GPU, if it has one."""
    if gpu.mig:
        return _Problem("unsupported_mig", "divided by MIG, which is unsupported",
                        "Pass a whole GPU in, or switch MIG off on the host: nvidia-smi -mig 0")
    if (0, 0) < gpu.compute_capability < MINIMUM_CAPABILITY:
        actual, minimum = (".".join(map(str, pair)) for pair in (gpu.compute_capability, MINIMUM_CAPABILITY))
        return _Problem("gpu_too_old", f"compute capability {actual} is unsupported; CUDA 13 requires {minimum} or "
                        "newer", "Use a GPU of the Turing generation or newer (RTX 20, T4).")
    if gpu.free_bytes < _CONTEXT_BYTES:
        return _Problem("gpu_in_use", f"out of memory; {format_size(gpu.free_bytes)} of "
                        f"{format_size(gpu.total_bytes)} free, the rest is used by other processes",
                        "List them with `nvidia-smi` on the host and terminate them, or pass another GPU.")
    return None


def require_gpus(hardware: Hardware, profile: str, count: int = 1) -> tuple[Gpu, ...]:
    """Return the GPUs, at least `count`.

    Raises:
        SettingsError: too few GPUs; says how to pass one to a container.
    """
    if len(hardware.gpus) >= count:
        return hardware.gpus
    known = hardware.gpu_remarks or (() if hardware.gpus else hardware.notes)
    reasons = f" ({'; '.join(known)})" if known else ""
    remedy = ("Pass the GPU to the container: `docker compose up` does so if the NVIDIA Container Toolkit is installed "
              "on the host, `docker run` needs --gpus all. To run small models without a GPU, set VRAM_PROFILE=cpu. To "
              "plan for another machine, type: shoehorn plan --gpu 24GB:RTX4090")
    if hardware.gpu_remarks:
        remedy = "Correct or unset CUDA_VISIBLE_DEVICES, or free the GPUs that are left out."
    raise SettingsError(
        f"VRAM_PROFILE={profile} needs {count} GPU{'s' * (count > 1)}: this container has "
        f"{len(hardware.gpus) or 'none'}{reasons}.", remedy, code="too_few_gpus" if hardware.gpus else "no_gpu")
