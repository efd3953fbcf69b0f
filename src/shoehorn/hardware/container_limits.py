"""Limits of the container that the engine needs: shared memory and locked memory, checked before a download."""

from __future__ import annotations

import resource
from pathlib import Path

from shoehorn.common import disk
from shoehorn.common.errors import SettingsError
from shoehorn.common.units import MIB, format_size

SHARED_MEMORY_BYTES = 160 * MIB
"""Minimum of vLLM 0.32.0; Docker's default is 64 MiB."""

SHARED_MEMORY_REMEDY = "docker run --shm-size 8g, or shm_size: 8gb in compose"
MEMLOCK_REMEDY = "docker run --ulimit memlock=-1, or ulimits: {memlock: -1} in compose"

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # the mount itself is checked


def free_shared_memory(path: Path = _SHARED_MEMORY) -> int:
    """Return the free bytes of shared memory."""
    return disk.disk_free(path)


def check_shared_memory(path: Path = _SHARED_MEMORY) -> None:
    """Check that the processes of the engine can exchange data.

    Raises:
        SettingsError: too little shared memory.
    """
    free = free_shared_memory(path)
    if free < SHARED_MEMORY_BYTES:
        raise SettingsError(
            f"Shared memory: {format_size(free)} free in {path}; the engine needs {format_size(SHARED_MEMORY_BYTES)}.",
            f"Start the container with more: {SHARED_MEMORY_REMEDY}.", code="shared_memory_too_small")


def locked_memory_limit() -> int | None:
    """Return the bytes of memory that a process may lock; None without a limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft
