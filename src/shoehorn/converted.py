"""Where a model's INT4 conversion lies, how far it is, and what planning may expect of it before it is made.

Rules:
- it is a model of its own in the volume, `OWNER/NAME.int4`, with a manifest like every other: complete last of all;
- the journal in its folder, `conversion.json`, holds what it is made from, what was decided and, shard by shard, what
  is done and how much was lost; it stays there as the record.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from shoehorn import __version__, checkpoint, hardware, int4_layout, manifest, store
from shoehorn.checkpoint import ModelShape
from shoehorn.errors import ModelUnavailableError
from shoehorn.files import write_atomic
from shoehorn.int4_layout import BOUND, KEPT, Bits, Outline
from shoehorn.settings import Settings
from shoehorn.tensor_files import LocalFiles, shards

log = logging.getLogger("convert")

JOURNAL = "conversion.json"
VERSION = 1


@dataclass(frozen=True)
class Journal:
    """How far a conversion is.

    Attributes:
        source: model, revision and commit, and by the name of each shard its SHA-256, or for one's own folder its size
            and time of change.
        embedding, head: bits, 16 for as they are; group: weights that share a scale.
        shards: by name, what is done: size, sha256, and the relative error |w - w'| / |w| by tensor.
    """

    source: Mapping[str, Any]
    embedding: int
    head: int
    group: int
    tool: str = f"shoehorn {__version__}"
    shards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def bits(self) -> Bits:
        """As `int4_layout` takes it."""
        return Bits(self.embedding, self.head)

    def write(self, directory: Path) -> None:
        """Replace the journal; durable when it returns."""
        write_atomic(directory / JOURNAL, json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n")


def read_journal(directory: Path) -> Journal | None:
    """The journal of a conversion; None where there is none that can be understood."""
    try:
        document = json.loads((directory / JOURNAL).read_text(encoding="utf-8"))
        if document.pop("version") != VERSION:
            return None
        found = Journal(**document)
        known, sizes = dict(found.source["shards"]), [entry["size"] for entry in found.shards.values()]
        if not set(found.shards) <= set(known) or not all(type(size) is int for size in sizes):
            raise ValueError("its shards are none of the source's")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be used (%s); the conversion begins anew", directory / JOURNAL, error)
        return None


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
    found = store.locate(target(settings))
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


def served(settings: Settings) -> Path | None:
    """The complete folder that the engine will load by these settings, or None."""
    return locate(settings) if settings.quantization == "int4" else store.locate(settings)


def source(settings: Settings) -> Path | None:
    """The original's folder, when all of it that is not converted yet is there as it was checked; else None."""
    whole = store.locate(settings)
    if whole or settings.model_source == "local":
        return whole
    known, journal = manifest.read(settings), read_journal(folder(settings))
    if not known or not known.is_of(settings) or not journal or not _same(journal, settings, known.commit):
        return None
    directory = settings.models_dir / settings.model_id
    left = [file for file in known.files if file.path not in journal.shards]
    return directory if all(manifest.unchanged(directory, file) for file in left) else None


def room(settings: Settings) -> int:
    """Bytes on the volume for what the settings ask for: what an earlier pull or conversion left counts as free."""
    there = hardware.disk_used(settings.models_dir / settings.model_id)
    if settings.quantization == "int4":
        there += hardware.disk_used(folder(settings))
    return hardware.disk_free(settings.models_dir) + there


def _same(journal: Journal, settings: Settings, commit: str) -> bool:
    made = journal.source
    return bool((made["model"], made["revision"], made["commit"]) == (settings.model_id, settings.model_revision,
                                                                     commit))


def shape(settings: Settings, directory: Path | None) -> ModelShape:
    """What will be served: the model in `directory`, or else what the settings will make of it.

    Args:
        directory: as `served` found it.

    Raises:
        SettingsError: QUANTIZATION=int4 and the model cannot be converted.
        ModelUnavailableError: the model cannot be had.
    """
    if directory:
        return checkpoint.read(LocalFiles(directory))
    files = store.hub_files(settings)
    if settings.quantization != "int4":
        return checkpoint.read(files)
    made = int4_layout.layout(files, KEPT if settings.vram_profile == "cpu" else BOUND)
    found = checkpoint.read(Outline(files, made))
    sizes = files.names()
    more = sum(sizes[name] for name in shards(files, sizes))
    if not settings.keep_original:  # each original shard makes way for more than its own
        new = [shard.size for shard in made.shards]
        more += int4_layout.two_in_turn(new) - sum(new)
    return replace(found, disk_bytes=found.disk_bytes + more)
