"""The models volume: is it there, writable, large enough; and one writer for each model.

Every trouble with it ends in one `ModelUnavailableError` that says what to type.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shoehorn import mounts
from shoehorn.errors import ModelUnavailableError
from shoehorn.room import FULL
from shoehorn.settings import Settings
from shoehorn.units import format_size

log = logging.getLogger("store")

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


def lock_path(models_dir: Path, model: str) -> Path:
    """The lock of the one writer of a model."""
    return models_dir / ".shoehorn" / "locks" / f"{model.replace('/', '--')}.lock"


@contextmanager
def only_writer(settings: Settings) -> Iterator[None]:
    """Hold the model's lock. The kernel drops it with the process, so that a crash leaves none behind.

    Raises:
        ModelUnavailableError: the volume is absent, cannot be written, or knows no locks that hold for all.
    """
    models_dir = settings.models_dir
    if not models_dir.is_dir():
        raise ModelUnavailableError(f"MODELS_DIR={models_dir} does not exist.",
                                    f"Mount a volume there, or: mkdir -p {models_dir}")
    mount = mounts.of(models_dir)
    if mount and mount.local_locks:
        raise ModelUnavailableError(
            f"{models_dir} is a {mount.kind} volume mounted with {mount.local_locks}: its locks hold on this machine "
            "only, so nothing keeps two machines from writing the same model.",
            f"Mount it without {mount.local_locks}, then start again; NFS 4 has locks of its own.")
    path = lock_path(models_dir, settings.model_id)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise trouble(models_dir, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process pulls %s; waiting for it", settings.model_id)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise ModelUnavailableError(f"The file system of {models_dir} has no locks ({error.strerror}).",
                                        "Mount a volume at MODELS_DIR whose file system has them.") from error
        yield
    finally:
        os.close(descriptor)
