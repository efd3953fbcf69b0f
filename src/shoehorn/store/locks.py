"""The models volume: is it there, writable, large enough; and one writer for each model.

Every trouble with it ends in one `ModelUnavailableError` that says what to type.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoehorn.common import locks, mounts
from shoehorn.common.disk import volume_error
from shoehorn.common.errors import ModelUnavailableError

log = logging.getLogger("store")


def lock_path(models_dir: Path, model: str) -> Path:
    """The lock of the one writer of a model."""
    return models_dir / ".shoehorn" / "locks" / f"{model.replace('/', '--')}.lock"


@contextmanager
def only_writer(models_dir: Path, model: str) -> Iterator[None]:
    """Hold the model's lock. The kernel drops it with the process, so that a crash leaves none behind.

    Raises:
        ModelUnavailableError: the volume is absent, cannot be written, or knows no locks that hold for all.
    """
    if not models_dir.is_dir():
        raise ModelUnavailableError(f"MODELS_DIR={models_dir} does not exist.",
                                    f"Mount a volume there, or: mkdir -p {models_dir}")
    mount = mounts.find_mount(models_dir)
    if mount and mount.local_locks:
        raise ModelUnavailableError(
            f"{models_dir} is a {mount.kind} volume mounted with {mount.local_locks}: its locks hold on this machine "
            "only, so nothing keeps two machines from writing the same model.",
            f"Mount it without {mount.local_locks}, then start again; NFS 4 has locks of its own.")
    path = lock_path(models_dir, model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = locks.acquire(path, on_wait=lambda: log.info("another process pulls %s; waiting for it", model))
    except locks.LocksUnsupportedError as error:
        raise ModelUnavailableError(f"The file system of {models_dir} has no locks ({error.strerror}).",
                                    "Mount a volume at MODELS_DIR whose file system has them.") from error
    except OSError as error:
        raise volume_error(models_dir, error) from error
    try:
        yield
    finally:
        os.close(lock)
