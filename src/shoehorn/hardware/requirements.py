"""Machines that cannot run this engine, recognised before anything is pulled: driver, generation, a full card.

Rules: pure; what is unknown is not held against the machine; each refusal says what is there, what is needed and what
to type.
"""

from __future__ import annotations

from shoehorn.common.errors import DoesNotFitError, SettingsError
from shoehorn.common.units import GIB, format_size
from shoehorn.hardware.types import Gpu, Hardware

LEAST_DRIVER = 580
"""The first driver with CUDA 13, which this image is made for (CUDA 13.0 release notes)."""

LEAST_CAPABILITY = (7, 5)
"""The oldest generation (Turing) that torch 2.13 for CUDA 13 still carries kernels for."""

_CONTEXT_BYTES = GIB
"""Less than this free, and not even the CUDA context and a first layer fit."""


def check(hardware: Hardware) -> None:
    """Look at driver and cards.

    Raises:
        DoesNotFitError: the engine cannot run here.
    """
    major = hardware.driver_version.split(".")[0]
    if hardware.gpus and major.isdecimal() and int(major) < LEAST_DRIVER:
        raise DoesNotFitError(
            f"The host's NVIDIA driver is {hardware.driver_version}, and the CUDA 13 of this image needs "
            f"{LEAST_DRIVER} or newer.",
            f"On the host: sudo apt-get install nvidia-driver-{LEAST_DRIVER} (or the package of its distribution), "
            "then reboot. The container itself needs no change.")
    for gpu in hardware.gpus:
        if (0, 0) < gpu.compute_capability < LEAST_CAPABILITY:
            have, need = (".".join(map(str, pair)) for pair in (gpu.compute_capability, LEAST_CAPABILITY))
            raise DoesNotFitError(
                f"{gpu.name} (GPU {gpu.index}) has compute capability {have}, and the engine's CUDA 13 carries none "
                f"below {need}: it ended with the Volta generation.",
                "Use a card of the Turing generation or newer (RTX 20, T4). If another card is there, pass only that "
                "one in: docker run --gpus device=N, or `device_ids` in docker-compose.yml.")
        if gpu.free_bytes < _CONTEXT_BYTES:
            raise DoesNotFitError(
                f"{gpu.name} (GPU {gpu.index}) is full: {format_size(gpu.free_bytes)} of "
                f"{format_size(gpu.total_bytes)} are free, other processes hold the rest.",
                "See them with `nvidia-smi` on the host and end them, or pass another card in.")


def require_gpus(hardware: Hardware, profile: str, count: int = 1) -> tuple[Gpu, ...]:
    """The GPUs, of which there are at least `count`.

    Raises:
        SettingsError: there are fewer; says how to pass one into a container.
    """
    if len(hardware.gpus) >= count:
        return hardware.gpus
    seen = f"only {len(hardware.gpus)}" if hardware.gpus else "none"
    why = f" ({'; '.join(hardware.notes)})" if hardware.notes and not hardware.gpus else ""
    raise SettingsError(
        f"VRAM_PROFILE={profile} needs {count} GPU{'s' * (count > 1)}, and this container sees {seen}{why}.",
        "Pass the GPU in: `docker compose up` does it where the NVIDIA Container Toolkit is installed on the host, "
        "`docker run` needs --gpus all. To run small models without a GPU set VRAM_PROFILE=cpu.")
