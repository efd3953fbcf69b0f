"""Where a model's INT4 conversion lies, how far it is, and what planning may expect of it before it is made.

Rules:
- it is a model of its own in the volume, `OWNER/NAME.int4`, with a manifest like every other: complete last of all;
- the journal in its folder, `conversion.json`, holds what it is made from, what was decided and, shard by shard, what
  is done and how much was lost; it stays there as the record.
"""

from __future__ import annotations

import logging
from pathlib import Path

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.common.file_stamp import stamp
from shoehorn.int4.journal import Journal, read_journal
from shoehorn.model.files import LocalFiles
from shoehorn.model.reference import ModelRef
from shoehorn.model.safetensors import shards
from shoehorn.store import manifest, pull

log = logging.getLogger("convert")


def folder(models_dir: Path, ref: ModelRef) -> Path:
    """Return the folder of the conversion, which need not exist."""
    return ref.converted.directory(models_dir)


def locate(models_dir: Path, ref: ModelRef) -> Path | None:
    """Return the folder of the complete conversion, or None."""
    found = pull.locate(models_dir, ref.converted)
    if found is None:
        return None
    journal = read_journal(found)
    if journal is None or journal.source["model"] != ref.id:
        return None
    if has_changed(journal, ref):
        log.warning("%s changed since it was converted; it is converted again", ref.id)
        return None
    return found


def stamps(directory: Path) -> dict[str, str]:
    """By the name of each shard of one's own folder, what changes when it does."""
    files = LocalFiles(directory)
    found = {name: stamp(directory / name) for name in shards(files, files.names())}
    return {name: f"{each.size_bytes} bytes, {each.mtime_ns}" if each else "missing" for name, each in found.items()}


def has_changed(journal: Journal, ref: ModelRef) -> bool:
    """Whether one's own folder has other weights now; the hub's have a revision instead."""
    if ref.source != "local" or not any(journal.source["shards"].values()):
        return False
    try:
        return stamps(Path(ref.id)) != dict(journal.source["shards"])
    except ModelUnavailableError:
        return False  # it is gone, and what was made of it is not


def source(models_dir: Path, ref: ModelRef) -> Path | None:
    """The original's folder, when all of it that is not converted yet is there as it was checked; else None."""
    original = ref.original
    whole = pull.locate(models_dir, original)
    if whole or original.is_local:
        return whole
    known, journal = manifest.read(models_dir, original), read_journal(folder(models_dir, ref))
    if not known or not known.matches(original) or not journal or not _same(journal, original, known.commit):
        return None
    directory = original.directory(models_dir)
    left = [file for file in known.files if file.path not in journal.shards]
    return directory if all(manifest.is_unchanged(directory, file) for file in left) else None


def _same(journal: Journal, ref: ModelRef, commit: str) -> bool:
    made = journal.source
    return bool((made["model"], made["revision"], made["commit"]) == (ref.id, ref.revision, commit))
