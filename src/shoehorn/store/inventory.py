"""The models of a volume, found by their manifests; who uses them; and removing one.

Rules:
- whoever serves a model holds a shared lock on it, which the kernel drops with the process; a removal needs it alone,
  and the lock of the one writer as well;
- reading a list changes nothing and needs no volume that can be written.
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
from shoehorn.hub.files import is_plain
from shoehorn.store import locks

log = logging.getLogger("store")


@dataclass(frozen=True)
class StoredModel:
    """One model of the volume.

    Attributes:
        commit: which `revision` was when it was pulled; "" where the hub told none.
        bytes: on the disk, partial files with them.
        last_used: Unix time at which it was last served; None when never.
        in_use: an appliance serves it now.
    """

    model: str
    revision: str
    bytes: int
    complete: bool
    last_used: float | None
    in_use: bool
    commit: str = ""


def models(models_dir: Path) -> list[StoredModel]:
    """Every model that a pull has begun, by name."""
    found = []
    for path in sorted((models_dir / ".shoehorn" / "manifests").glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            model, revision, complete = document["model"], document["revision"], document["complete"]
            if not isinstance(model, str) or not is_plain(model):
                raise ValueError(f"{model!r} is no model")
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read (%s)", path, error)
            continue
        found.append(StoredModel(model, str(revision), disk.disk_used(models_dir / model), complete is True,
                                 _used(models_dir, model), is_locked(_use_lock(models_dir, model)),
                                 str(document.get("commit", ""))))
    return found


def remove(models_dir: Path, model: str) -> int:
    """Remove a model; returns the bytes that it took.

    Raises:
        ModelUnavailableError: there is none of that name, it is in use or being pulled, or the volume refuses.
    """
    manifest = models_dir / ".shoehorn" / "manifests" / f"{model.replace('/', '--')}.json"
    if not is_plain(model) or not manifest.exists():
        known = ", ".join(each.model for each in models(models_dir)) or "none"
        raise ModelUnavailableError(f"{models_dir} holds no model {model}.", f"There are: {known}.")
    try:
        with _alone(_use_lock(models_dir, model), f"{model} is being served.", "Stop the appliance that serves it."), \
                _alone(locks.lock_path(models_dir, model), f"{model} is being pulled.", "Stop the pull first."):
            freed = disk.disk_used(models_dir / model)
            manifest.unlink()
            shutil.rmtree(models_dir / model, ignore_errors=False)
            _use_lock(models_dir, model).unlink(missing_ok=True)
    except OSError as error:
        raise disk.volume_error(models_dir, error) from error
    return freed


@contextmanager
def used(models_dir: Path, model: str) -> Iterator[None]:
    """Mark a model as served, and note the time. A volume that cannot be written has no mark, and needs none."""
    path = _use_lock(models_dir, model)
    with ExitStack() as stack:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(shared(path))
            os.utime(path)
        yield


@contextmanager
def _alone(path: Path, cause: str, remedy: str) -> Iterator[None]:
    """Hold a lock that nobody else holds, or refuse."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(path, wait=False))
        except BlockingIOError:
            raise ModelUnavailableError(cause, remedy) from None
        yield


def _use_lock(models_dir: Path, model: str) -> Path:
    return models_dir / ".shoehorn" / "locks" / f"{model.replace('/', '--')}.use"


def _used(models_dir: Path, model: str) -> float | None:
    try:
        return _use_lock(models_dir, model).stat().st_mtime
    except OSError:
        return None
