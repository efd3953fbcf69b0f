"""Inventory of the models in a volume: listing, use locks and deletion.

Rules:
- a process that serves a model holds a shared lock on it; deletion requires that lock exclusively, and the write lock;
- listing changes nothing and works on a read-only volume.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from shoehorn.common import disk
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.common.locks import exclusive, is_locked, shared
from shoehorn.config.models_dir import ModelsDir
from shoehorn.hub.files import is_plain

log = logging.getLogger("store")


@dataclass(frozen=True)
class StoredModel:
    """One model of the volume.

    Attributes:
        commit: commit of `revision` at the time of the pull; "" if unknown.
        bytes: size on disk, including partial files.
        last_used: Unix time of its last use; None if never used.
        in_use: a process serves it now.
    """

    model: str
    revision: str
    bytes: int
    complete: bool
    last_used: float | None
    in_use: bool
    commit: str = ""


def models(models_dir: Path) -> list[StoredModel]:
    """List every model with a manifest, by name."""
    volume, stored = ModelsDir(models_dir), []
    for path in sorted(volume.manifests.glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            model, revision, complete = document["model"], document["revision"], document["complete"]
            if not isinstance(model, str) or not is_plain(model):
                raise ValueError(f"invalid model name {model!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("Cannot read manifest path=%s error=%s", path, error)
            continue
        lock = volume.use_lock(model)
        stored.append(StoredModel(model, str(revision), disk.disk_used(volume.model(model)), complete is True,
                                  _last_used(lock), is_locked(lock), str(document.get("commit", ""))))
    return stored


def remove(models_dir: Path, model: str) -> int:
    """Delete a model and return the freed bytes.

    Raises:
        ModelUnavailableError: not found, in use, being pulled, or the volume failed.
    """
    volume = ModelsDir(models_dir)
    if not is_plain(model) or not volume.manifest(model).exists():
        names = ", ".join(each.model for each in models(models_dir)) or "none"
        raise ModelUnavailableError(f"Model {model}: not found in {models_dir}.", f"Choose one of: {names}.",
                                    code="model_not_found")
    in_use = ModelUnavailableError(f"Model {model}: in use.", "Stop the appliance that serves it.", code="model_in_use")
    pulling = ModelUnavailableError(f"Model {model}: being pulled.", "Stop the pull.", code="model_being_pulled")
    try:
        with _exclusive(volume.use_lock(model), in_use), _exclusive(volume.writer_lock(model), pulling):
            freed = disk.disk_used(volume.model(model))
            volume.manifest(model).unlink()
            shutil.rmtree(volume.model(model), ignore_errors=False)
            volume.use_lock(model).unlink(missing_ok=True)
    except OSError as error:
        raise disk.volume_error(models_dir, error) from error
    return freed


@contextmanager
def use_lock(models_dir: Path, model: str) -> Iterator[None]:
    """Mark a model as in use and record the time. A read-only volume gets no mark, since nothing can be deleted."""
    path = ModelsDir(models_dir).use_lock(model)
    with ExitStack() as stack:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(shared(path))
            os.utime(path)
        yield


@contextmanager
def _exclusive(path: Path, refusal: ModelUnavailableError) -> Iterator[None]:
    """Hold a lock exclusively; raise `refusal` if another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(path, wait=False))
        except BlockingIOError:
            raise refusal from None
        yield


def _last_used(lock: Path) -> float | None:
    try:
        return lock.stat().st_mtime
    except OSError:
        return None
