"""Where a model's INT4 conversion lies, how far it is, and what planning may expect of it before it is made.

Rules:
- it is a model of its own in the volume, `OWNER/NAME.int4`, with a manifest like every other: complete last of all;
- the journal in its folder, `conversion.json`, holds what it is made from, what was decided and, shard by shard, what
  is done and how much was lost; it stays there as the record.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.config.settings import Settings
from shoehorn.int4.journal import Journal, read_journal
from shoehorn.model.files import LocalFiles
from shoehorn.model.safetensors import shards
from shoehorn.store import manifest, pull

log = logging.getLogger("convert")


def target(settings: Settings) -> Settings:
    """The settings with the converted model in the original's place."""
    name = Path(settings.model_id).resolve().name if settings.model_source == "local" else settings.model_id
    owner = "local/" if settings.model_source == "local" else ""
    return replace(settings, model_id=f"{owner}{name}.int4", model_source="int4", model_fallback=False)


def folder(settings: Settings) -> Path:
    """Where the converted model lies, or will."""
    return settings.models_dir / target(settings).model_id


def locate(settings: Settings) -> Path | None:
    """The complete converted model, or None; `settings` name the original."""
    found = pull.locate(target(settings))
    if found is None:
        return None
    journal = read_journal(found)
    if journal is None or journal.source["model"] != settings.model_id:
        return None
    if has_changed(journal, settings):
        log.warning("%s changed since it was converted; it is converted again", settings.model_id)
        return None
    return found


def stamps(directory: Path) -> dict[str, str]:
    """By the name of each shard of one's own folder, what changes when it does."""
    files = LocalFiles(directory)
    found = {name: (directory / name).stat() for name in shards(files, files.names())}
    return {name: f"{status.st_size} bytes, {status.st_mtime_ns}" for name, status in found.items()}


def has_changed(journal: Journal, settings: Settings) -> bool:
    """Whether one's own folder has other weights now; the hub's have a revision instead."""
    if settings.model_source != "local" or not any(journal.source["shards"].values()):
        return False
    try:
        return stamps(Path(settings.model_id)) != dict(journal.source["shards"])
    except ModelUnavailableError:
        return False  # it is gone, and what was made of it is not


def source(settings: Settings) -> Path | None:
    """The original's folder, when all of it that is not converted yet is there as it was checked; else None."""
    whole = pull.locate(settings)
    if whole or settings.model_source == "local":
        return whole
    known, journal = manifest.read(settings), read_journal(folder(settings))
    if not known or not known.is_of(settings) or not journal or not _same(journal, settings, known.commit):
        return None
    directory = settings.models_dir / settings.model_id
    left = [file for file in known.files if file.path not in journal.shards]
    return directory if all(manifest.unchanged(directory, file) for file in left) else None


def _same(journal: Journal, settings: Settings, commit: str) -> bool:
    made = journal.source
    return bool((made["model"], made["revision"], made["commit"]) == (settings.model_id, settings.model_revision,
                                                                     commit))
