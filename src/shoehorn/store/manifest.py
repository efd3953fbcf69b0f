"""Manifest of a model: its files and the results of their verification.

Rules:
- it is written atomically, and `complete` only after every file was verified and synced: only a complete model is
  served;
- it lists obsolete files until they are deleted;
- users may edit the volume: an invalid manifest counts as missing, and every path in it is validated.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.file_stamp import stamp
from shoehorn.config.models_dir import ModelsDir
from shoehorn.hub.files import ModelFile, is_plain
from shoehorn.model.reference import ModelRef

log = logging.getLogger("store")

VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """Content of a model's folder.

    Attributes:
        revision: requested branch, tag or commit.
        endpoint: base URL of the hub that the files came from.
        commit: commit of `revision` on that hub; "" if unknown.
        source: requested value of MODEL_SOURCE.
    """

    model: str
    revision: str
    endpoint: str
    complete: bool
    files: tuple[ModelFile, ...]
    commit: str = ""
    source: str = "modelscope"

    def matches(self, ref: ModelRef) -> bool:
        """Return whether the manifest is that of this model, revision and source."""
        return (self.model, self.revision, self.source) == (ref.stored_id, ref.revision, ref.stored_source)


def location(models_dir: Path, ref: ModelRef) -> Path:
    """Return the path of the model's manifest."""
    return ModelsDir(models_dir).manifest(ref.stored_id)


def read(models_dir: Path, ref: ModelRef) -> Manifest | None:
    """Return the manifest; None if missing or invalid."""
    path = location(models_dir, ref)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.pop("version") != VERSION:
            return None
        return _parse(document)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("Invalid manifest, verifying the model again path=%s error=%s", path, error)
        return None


def _parse(document: dict[str, Any]) -> Manifest:
    files = tuple(ModelFile(**entry) for entry in document.pop("files"))
    for file in files:
        if (not is_plain(file.path) or type(file.size_bytes) is not int or type(file.sha256) is not str
                or type(file.blob_id) is not str):
            raise ValueError(f"invalid entry {file.path!r}")
    manifest = Manifest(**document, files=files)
    if type(manifest.complete) is not bool or (manifest.complete and not files):
        raise ValueError("complete without files")
    return manifest


def write(models_dir: Path, ref: ModelRef, manifest: Manifest) -> None:
    """Replace the manifest durably."""
    path = location(models_dir, ref)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"version": VERSION, **asdict(manifest)}, indent=1) + "\n")


def is_unchanged(directory: Path, file: ModelFile) -> bool:
    """Return whether a verified file still has its size and modification time."""
    current = stamp(directory / file.path)
    return current is not None and (current.size_bytes, current.mtime_ns) == (file.size_bytes, file.mtime_ns)
