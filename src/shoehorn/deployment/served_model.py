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
from shoehorn.model.reference import ModelRef
from shoehorn.model.safetensors import shards
from shoehorn.model.shape import ModelShape
from shoehorn.store import pull
from shoehorn.store.reference import model_reference


def served_reference(settings: Settings) -> ModelRef:
    """Return the reference of the model that is served: its INT4 conversion with QUANTIZATION=int4."""
    ref = model_reference(settings)
    return ref.converted if settings.quantization == "int4" else ref


def served_folder(models_dir: Path, ref: ModelRef) -> Path | None:
    """Return the complete folder that the engine will load, or None."""
    return locate(models_dir, ref) if ref.is_int4 else pull.locate(models_dir, ref)


def available_bytes(models_dir: Path, ref: ModelRef) -> int:
    """Return the free bytes on the volume plus those that an earlier pull or conversion of the model occupies."""
    occupied = disk.disk_used(ref.original.directory(models_dir))
    if ref.is_int4:
        occupied += disk.disk_used(folder(models_dir, ref))
    return disk.disk_free(models_dir) + occupied


def served_shape(settings: Settings, ref: ModelRef, directory: Path | None) -> ModelShape:
    """Read the shape of the model that is served.

    Args:
        settings: access to the hub, and the settings of a conversion.
        directory: its complete folder; None reads the headers at the hub, or derives the conversion's from them.

    Raises:
        SettingsError: the model cannot be converted to INT4.
        ModelUnavailableError: the model is unavailable.
    """
    if directory:
        return checkpoint.read(LocalFiles(directory))
    files = pull.hub_files(settings, ref.original)
    if not ref.is_int4:
        return checkpoint.read(files)
    conversion = layout.layout(files, KEPT if settings.vram_profile == "cpu" else BOUND)
    shape = checkpoint.read(Outline(files, conversion))
    sizes = files.names()
    peak_bytes = sum(sizes[name] for name in shards(files, sizes))
    if not settings.keep_original:  # each original shard is removed after its conversion, so both never coexist whole
        new = [shard.size for shard in conversion.shards]
        peak_bytes += layout.two_in_turn(new) - sum(new)
    return replace(shape, disk_bytes=shape.disk_bytes + peak_bytes)
