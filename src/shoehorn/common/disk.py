"""A disk that is full under state, keys or logs: told in words and waited for, instead of crashing in circles."""

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

_ROOM_BYTES = 256 << 10
_LOOK_SECONDS = 2.0


def wait_for(*folders: Path) -> None:
    """Return once a little can be written in each of the folders."""
    said = None
    while full := [folder for folder in folders if _is_full(folder)]:
        if full != said:
            log.error("%s is full, so nothing can be served. It goes on by itself once there is room.",
                      " and ".join(map(str, full)))
            said = full
        time.sleep(_LOOK_SECONDS)


def _is_full(folder: Path) -> bool:
    probe = folder / ".room"
    try:
        write_atomic(probe, "x" * _ROOM_BYTES)
        probe.unlink()
    except OSError as error:  # others are not for waiting: what follows will name them
        return error.errno in FULL
    return False


def disk_free(path: Path) -> int:
    """Free bytes on the file system of `path`, or of its nearest parent that exists."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def disk_used(path: Path) -> int:
    """Bytes of all files in a folder, which need not exist; a model that was pulled in part is not pulled anew."""
    total = 0
    for file in path.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue  # a pull that runs beside us has just renamed it
    return total


_SPARE = 1.02
_LOOK_SECONDS = 5.0
_DENIED = (errno.EACCES, errno.EPERM)


def trouble(models_dir: Path, error: OSError) -> ModelUnavailableError:
    """What an error of the file system means for the volume, in words."""
    if error.errno in FULL:
        return ModelUnavailableError(f"The volume {models_dir} is full.",
                                     "Free space there or mount a larger volume at MODELS_DIR, then start again; "
                                     "what has arrived is kept.")
    if error.errno == errno.EROFS:
        return ModelUnavailableError(f"The volume {models_dir} is mounted read-only, and the model has to be written.",
                                     "Mount it writable (without :ro), or use a folder that is complete with "
                                     "MODEL_SOURCE=local.")
    if error.errno in _DENIED:
        user = os.geteuid()
        return ModelUnavailableError(f"{error.filename or models_dir} cannot be written by user {user}.",
                                     f"On the host: sudo chown -R {user} FOLDER, where FOLDER is what is mounted at "
                                     f"{models_dir}.")
    return ModelUnavailableError(f"The volume {models_dir} fails: {error}.",
                                 "Check the disk, and that a volume is mounted at MODELS_DIR.")


def require_space(directory: Path, needed_bytes: int) -> None:
    """Check the free space, with 2 % to spare.

    Raises:
        ModelUnavailableError: less is free.
    """
    status = os.statvfs(directory)
    needed, free = round(needed_bytes * _SPARE), status.f_bavail * status.f_frsize
    if needed > free:
        raise ModelUnavailableError(
            f"The volume is too small: {format_size(needed)} are still needed, {format_size(free)} are free.",
            "Free space there, or mount a larger volume at MODELS_DIR.")


class Watch:
    """Looks from time to time, while something is fetched, whether the rest of it still has room.

    Args:
        left: bytes that are still to come.
        clock: seconds.
    """

    def __init__(self, directory: Path, left: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        self._directory, self._left, self._clock = directory, left, clock
        self._lock = threading.Lock()
        self._looked_at = clock()

    def look(self) -> None:
        """Cheap, but every few seconds.

        Raises:
            OSError: ENOSPC, since the volume will be full before the end: others write to it too.
        """
        with self._lock:
            if self._clock() - self._looked_at < _LOOK_SECONDS:
                return
            self._looked_at = self._clock()
        status = os.statvfs(self._directory)
        left, free = self._left(), status.f_bavail * status.f_frsize
        if left > free:
            log.warning("%s are still to come, and %s are free: it stops now instead of filling the volume",
                        format_size(left), format_size(free))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._directory))
