"""The model that will be served: its directory, its shape, and the disk space for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shoehorn.common import disk
from shoehorn.config.settings import Settings
from shoehorn.int4 import layout
from shoehorn.int4.artifact import folder, locate
from shoehorn.int4.layout import BOUND, KEPT, Outline
from shoehorn.model import checkpoint
from shoehorn.model.files import LocalFiles
from shoehorn.model.safetensors import shards
from shoehorn.model.shape import ModelShape
from shoehorn.store import pull


def served(settings: Settings) -> Path | None:
    """The complete folder that the engine will load by these settings, or None."""
    return locate(settings) if settings.quantization == "int4" else pull.locate(settings)


def room(settings: Settings) -> int:
    """Bytes on the volume for what the settings ask for: what an earlier pull or conversion left counts as free."""
    there = disk.disk_used(settings.models_dir / settings.model_id)
    if settings.quantization == "int4":
        there += disk.disk_used(folder(settings))
    return disk.disk_free(settings.models_dir) + there


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
    files = pull.hub_files(settings)
    if settings.quantization != "int4":
        return checkpoint.read(files)
    made = layout.layout(files, KEPT if settings.vram_profile == "cpu" else BOUND)
    found = checkpoint.read(Outline(files, made))
    sizes = files.names()
    more = sum(sizes[name] for name in shards(files, sizes))
    if not settings.keep_original:  # each original shard makes way for more than its own
        new = [shard.size for shard in made.shards]
        more += layout.two_in_turn(new) - sum(new)
    return replace(found, disk_bytes=found.disk_bytes + more)
