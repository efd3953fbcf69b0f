"""Lock of the process that writes a model; checks that the volume exists, is writable and supports locks."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoehorn.common import locks, mounts
from shoehorn.common.disk import volume_error
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.config.models_dir import ModelsDir

log = logging.getLogger("store")


@contextmanager
def write_lock(models_dir: Path, model: str) -> Iterator[None]:
    """Hold the write lock of a model; wait for another writer.

    Raises:
        ModelUnavailableError: the volume does not exist, is not writable, or supports no locks across machines.
    """
    if not models_dir.is_dir():
        raise ModelUnavailableError(f"MODELS_DIR={models_dir}: not found.",
                                    f"Mount a volume there, or run: mkdir -p {models_dir}", code="volume_not_found")
    mount = mounts.find_mount(models_dir)
    if mount and mount.local_locks:
        raise ModelUnavailableError(
            f"Volume {models_dir}: {mount.kind} mounted with {mount.local_locks}; other machines do not see its locks, "
            "so two machines could write the same model.",
            f"Mount it without {mount.local_locks}, then restart; NFS 4 supports locks.", code="volume_local_locks")
    path = ModelsDir(models_dir).writer_lock(model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = locks.acquire(path, on_wait=lambda: log.info("Waiting for another pull model=%s", model))
    except locks.LocksUnsupportedError as error:
        raise ModelUnavailableError(f"Volume {models_dir}: file locks unsupported ({error.strerror}).",
                                    "Mount a volume at MODELS_DIR whose file system supports them.",
                                    code="volume_no_locks") from error
    except OSError as error:
        raise volume_error(models_dir, error) from error
    try:
        yield
    finally:
        os.close(lock)
