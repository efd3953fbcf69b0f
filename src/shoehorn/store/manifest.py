"""The manifest of a model: what belongs to it, and what of that was checked, in `MODELS_DIR/.shoehorn/manifests/`.

Rules:
- it is written atomically, and `complete` only after every file was checked and synced: it is the one mark that a model
  may be served;
- it lists files that do not belong to the model any more until they are gone;
- the volume may have been edited: a manifest that is not understood counts as none, and no path in it is believed.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.file_stamp import stamp
from shoehorn.hub.files import ModelFile, is_plain
from shoehorn.model.reference import ModelRef

log = logging.getLogger("store")

VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What is known of a model's folder.

    Attributes:
        revision: as asked for: a branch, tag or commit.
        endpoint: the address of the hub that the files came from.
        commit: which `revision` was at that hub; "" where it told none.
        source: as asked for: the value of MODEL_SOURCE.
    """

    model: str
    revision: str
    endpoint: str
    complete: bool
    files: tuple[ModelFile, ...]
    commit: str = ""
    source: str = "modelscope"

    def is_of(self, ref: ModelRef) -> bool:
        """Whether it describes this model, revision and source."""
        return (self.model, self.revision, self.source) == (ref.stored_id, ref.revision, ref.stored_source)


def location(models_dir: Path, ref: ModelRef) -> Path:
    """Path of the model's manifest."""
    return models_dir / ".shoehorn" / "manifests" / f"{ref.stored_id.replace('/', '--')}.json"


def read(models_dir: Path, ref: ModelRef) -> Manifest | None:
    """The model's manifest, or None where there is none that can be understood."""
    path = location(models_dir, ref)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.pop("version") != VERSION:
            return None
        return _parse(document)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("the manifest %s cannot be used (%s); the model is checked again", path, error)
        return None


def _parse(document: dict[str, Any]) -> Manifest:
    files = tuple(ModelFile(**entry) for entry in document.pop("files"))
    for file in files:
        if (not is_plain(file.path) or type(file.size_bytes) is not int or type(file.sha256) is not str
                or type(file.blob_id) is not str):
            raise ValueError(f"{file.path!r} is no entry")
    found = Manifest(**document, files=files)
    if type(found.complete) is not bool or (found.complete and not files):
        raise ValueError("it is complete without files")
    return found


def write(models_dir: Path, ref: ModelRef, manifest: Manifest) -> None:
    """Replace the model's manifest; durable when it returns."""
    path = location(models_dir, ref)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"version": VERSION, **asdict(manifest)}, indent=1) + "\n")


def unchanged(directory: Path, file: ModelFile) -> bool:
    """Whether a checked file still has the size and the time at which it was checked."""
    current = stamp(directory / file.path)
    return current is not None and (current.size_bytes, current.mtime_ns) == (file.size_bytes, file.mtime_ns)
