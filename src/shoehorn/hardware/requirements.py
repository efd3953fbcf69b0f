"""Minimum requirements of the engine: driver, GPU generation and free memory, checked before a download.

Rules: pure; an unknown value passes; each error states the value, the requirement and the remedy.
"""

from __future__ import annotations

from shoehorn.common.errors import DoesNotFitError, SettingsError
from shoehorn.common.units import GIB, format_size
from shoehorn.hardware.types import Gpu, Hardware

MINIMUM_DRIVER = 580
"""First driver for CUDA 13, which the image contains (CUDA 13.0 release notes)."""

MINIMUM_CAPABILITY = (7, 5)
"""Oldest generation (Turing) for which torch 2.13 for CUDA 13 contains kernels."""

_CONTEXT_BYTES = GIB
"""Memory for the CUDA context and a first layer."""


def check(hardware: Hardware) -> None:
    """Check the driver and each GPU.

    Raises:
        DoesNotFitError: the engine cannot run on this machine.
    """
    major = hardware.driver_version.split(".")[0]
    if hardware.gpus and major.isdecimal() and int(major) < MINIMUM_DRIVER:
        raise DoesNotFitError(
            f"NVIDIA driver {hardware.driver_version}: unsupported; CUDA 13 requires {MINIMUM_DRIVER} or newer.",
            f"On the host: sudo apt-get install nvidia-driver-{MINIMUM_DRIVER} (or the package of its distribution), "
            "then reboot. The container needs no change.", code="driver_too_old")
    for gpu in hardware.gpus:
        if (0, 0) < gpu.compute_capability < MINIMUM_CAPABILITY:
            actual, minimum = (".".join(map(str, pair)) for pair in (gpu.compute_capability, MINIMUM_CAPABILITY))
            raise DoesNotFitError(
                f"{gpu.name} (GPU {gpu.index}) has compute capability {actual}: unsupported; CUDA 13 requires "
                f"{minimum} or newer.",
                "Use a GPU of the Turing generation or newer (RTX 20, T4). If the machine has another GPU, pass only "
                "that one: docker run --gpus device=N, or `device_ids` in docker-compose.yml.", code="gpu_too_old")
        if gpu.free_bytes < _CONTEXT_BYTES:
            raise DoesNotFitError(
                f"{gpu.name} (GPU {gpu.index}): out of memory; {format_size(gpu.free_bytes)} of "
                f"{format_size(gpu.total_bytes)} free, the rest is used by other processes.",
                "List them with `nvidia-smi` on the host and terminate them, or pass another GPU.", code="gpu_in_use")


def require_gpus(hardware: Hardware, profile: str, count: int = 1) -> tuple[Gpu, ...]:
    """Return the GPUs, at least `count`.

    Raises:
        SettingsError: too few GPUs; says how to pass one to a container.
    """
    if len(hardware.gpus) >= count:
        return hardware.gpus
    reasons = f" ({'; '.join(hardware.notes)})" if hardware.notes and not hardware.gpus else ""
    raise SettingsError(
        f"VRAM_PROFILE={profile} needs {count} GPU{'s' * (count > 1)}: this container has "
        f"{len(hardware.gpus) or 'none'}{reasons}.",
        "Pass the GPU to the container: `docker compose up` does so if the NVIDIA Container Toolkit is installed on "
        "the host, `docker run` needs --gpus all. To run small models without a GPU, set VRAM_PROFILE=cpu.",
        code="too_few_gpus" if hardware.gpus else "no_gpu")
