"""Disk space: measuring, requiring and waiting for it; errors of the models volume."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.common.units import format_size

log = logging.getLogger("engine")

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk."""

_DENIED = (errno.EACCES, errno.EPERM)
_PROBE_BYTES = 256 << 10
_WAIT_SECONDS = 2.0
_CHECK_SECONDS = 5.0
_RESERVE_FACTOR = 1.02


def wait_for_free_space(*folders: Path) -> None:
    """Return once a small file can be written in each folder."""
    logged = None
    while full := [folder for folder in folders if _is_full(folder)]:
        if full != logged:
            log.error("No space left on %s; not serving. Resumes automatically when space is freed.",
                      " and ".join(map(str, full)))
            logged = full
        time.sleep(_WAIT_SECONDS)


def _is_full(folder: Path) -> bool:
    probe = folder / ".room"
    try:
        write_atomic(probe, "x" * _PROBE_BYTES)
        probe.unlink()
    except OSError as error:  # waiting solves no other error; the next write reports it
        return error.errno in FULL
    return False


def disk_free(path: Path) -> int:
    """Return the free bytes on the file system of `path`, or of its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def disk_used(path: Path) -> int:
    """Return the bytes of all files in a folder; 0 if it does not exist."""
    total = 0
    for file in path.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue  # renamed by a concurrent pull
    return total


def volume_error(models_dir: Path, error: OSError) -> ModelUnavailableError:
    """Convert an error of the file system to an error with a remedy."""
    if error.errno in FULL:
        return ModelUnavailableError(f"Volume {models_dir}: disk full.",
                                     "Free space there or mount a larger volume at MODELS_DIR, then retry; downloaded "
                                     "data is kept.", code="disk_full")
    if error.errno == errno.EROFS and not models_dir.exists():
        return ModelUnavailableError(f"MODELS_DIR={models_dir}: not found in this container.",
                                     f"Mount a volume there, or unset MODELS_DIR; with docker-compose.yml set "
                                     f"MODELS_VOLUME={models_dir} to mount that folder of the host at /models.",
                                     code="volume_not_mounted")
    if error.errno == errno.EROFS:
        return ModelUnavailableError(f"Volume {models_dir}: mounted read-only; the model must be written.",
                                     "Mount it writable (without :ro), or use a complete folder with "
                                     "MODEL_SOURCE=local.", code="volume_read_only")
    if error.errno in _DENIED:
        user = os.geteuid()
        return ModelUnavailableError(f"{error.filename or models_dir}: permission denied for user {user}.",
                                     f"On the host: sudo chown -R {user} FOLDER, where FOLDER is mounted at "
                                     f"{models_dir}.", code="volume_permission_denied")
    return ModelUnavailableError(f"Volume {models_dir}: {error}.",
                                 "Check the disk, and that a volume is mounted at MODELS_DIR.", code="volume_failed")


def require_space(directory: Path, needed_bytes: int) -> None:
    """Check for free space, with a reserve of 2 %.

    Raises:
        ModelUnavailableError: too little free space.
    """
    status = os.statvfs(directory)
    needed, free = round(needed_bytes * _RESERVE_FACTOR), status.f_bavail * status.f_frsize
    if needed > free:
        raise ModelUnavailableError(
            f"Volume: too little free space; {format_size(needed)} needed, {format_size(free)} free.",
            "Free space there, or mount a larger volume at MODELS_DIR.", code="volume_too_small")


class FreeSpaceMonitor:
    """Periodic check during a download that the remaining bytes still fit.

    Args:
        remaining_bytes: returns the bytes that are not downloaded yet.
        clock: returns seconds.
    """

    def __init__(self, directory: Path, remaining_bytes: Callable[[], int],
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._directory, self._remaining_bytes, self._clock = directory, remaining_bytes, clock
        self._lock = threading.Lock()
        self._checked_at = clock()

    def check(self) -> None:
        """Check if the last check is some seconds old.

        Raises:
            OSError: ENOSPC: the volume would be full before the download ends, since others write to it too.
        """
        with self._lock:
            if self._clock() - self._checked_at < _CHECK_SECONDS:
                return
            self._checked_at = self._clock()
        status = os.statvfs(self._directory)
        remaining, free = self._remaining_bytes(), status.f_bavail * status.f_frsize
        if remaining > free:
            log.warning("Aborting download: %s remaining, only %s free", format_size(remaining), format_size(free))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._directory))
