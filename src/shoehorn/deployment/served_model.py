"""The model that is served: its reference, folder, shape and disk space, and the steps that fetch it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from shoehorn.common import disk
from shoehorn.common.errors import ShoehornError
from shoehorn.common.progress import Report
from shoehorn.config import vllm_options
from shoehorn.config.profiles import Profile
from shoehorn.config.settings import Settings
from shoehorn.int4 import artifact, layout
from shoehorn.int4.layout import MAX_BIT_WIDTHS, UNQUANTIZED, PlannedFiles
from shoehorn.model import checkpoint
from shoehorn.model.files import Files, LocalFiles
from shoehorn.model.reference import ModelRef
from shoehorn.model.safetensors import shards
from shoehorn.model.shape import ModelShape
from shoehorn.store import digest, inventory, pull
from shoehorn.store.reference import model_reference

FetchStep = Literal["pull", "convert"]
"""The `shoehorn` command of one step."""


def served_reference(settings: Settings) -> ModelRef:
    """Return the reference of the model that is served: its INT4 conversion with QUANTIZATION=int4."""
    ref = model_reference(settings)
    return ref.converted if settings.quantization == "int4" else ref


def served_folder(models_dir: Path, ref: ModelRef) -> Path | None:
    """Return the complete folder that the engine will load, or None."""
    return artifact.locate(models_dir, ref) if ref.is_int4 else pull.locate(models_dir, ref)


def model_files(settings: Settings, ref: ModelRef) -> Files:
    """Return the served model's files, or the original's at the hub until it is complete."""
    directory = served_folder(settings.models_dir, ref)
    return LocalFiles(directory) if directory else pull.hub_files(settings, ref.original)


def available_bytes(models_dir: Path, ref: ModelRef) -> int:
    """Return the free bytes on the volume plus those that an earlier pull or conversion of the model occupies."""
    occupied = disk.disk_used(ref.original.directory(models_dir))
    if ref.is_int4:
        occupied += disk.disk_used(ref.directory(models_dir))
    return disk.disk_free(models_dir) + occupied


def fetch_steps(models_dir: Path, ref: ModelRef) -> tuple[FetchStep, ...]:
    """Return the steps after which the model is complete; the last one prints its folder."""
    if not ref.is_int4:
        return ("pull",)
    return ("convert",) if artifact.source(models_dir, ref) else ("pull", "convert")


def config_overrides(settings: Settings, profile: Profile) -> Mapping[str, Any]:
    """Return the user's changes of config.json: `hf-overrides` of VLLM_EXTRA_ARGS, else of the profile."""
    overrides = {**profile.engine, **vllm_options.parse_arguments(settings.vllm_extra_args)}.get("hf-overrides")
    return overrides if isinstance(overrides, dict) else {}


def models_digest(models_dir: Path, refs: Iterable[ModelRef], report: Report) -> str:
    """Return the digest of complete models together.

    Args:
        report: gets the progress of reading folders that have no manifest.
    """
    digests = []
    for ref in refs:
        directory = served_folder(models_dir, ref)
        if directory is None:
            raise ValueError(f"{ref.id}: incomplete")
        digests.append(digest.model_digest(models_dir, ref, directory, report))
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


@contextmanager
def in_use(models_dir: Path, refs: Iterable[ModelRef]) -> Iterator[None]:
    """Mark models as in use, so that `shoehorn models rm` refuses to remove them."""
    with ExitStack() as stack:
        for ref in refs:
            if not ref.is_local:
                stack.enter_context(inventory.use_lock(models_dir, ref.stored_id))
        yield


class ShapeReader:
    """Reads each model's shape once, however many plans are made of it.

    Args:
        settings: access to the hub, and KEEP_ORIGINAL.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._shapes: dict[tuple[ModelRef, Path | None, bool, str], ModelShape | ShoehornError] = {}

    def read(self, ref: ModelRef, directory: Path | None, *, on_cpu: bool = False,
             overrides: Mapping[str, Any] | None = None) -> ModelShape:
        """Return the shape of a model as the engine will load it.

        Args:
            directory: its complete folder; None reads the headers at the hub, or derives the conversion's from them.
            on_cpu: a conversion keeps embedding and head for the CPU engine.
            overrides: the user's changes of config.json (`hf-overrides`).

        Raises:
            SettingsError: the model cannot be converted to INT4.
            ModelUnavailableError: the model is unavailable.
        """
        key = (ref, directory, on_cpu and ref.is_int4, json.dumps(overrides or {}, sort_keys=True))
        if key not in self._shapes:
            try:
                self._shapes[key] = self._read(ref, directory, on_cpu, overrides or {})
            except ShoehornError as error:
                self._shapes[key] = error  # an unreachable hub is asked once
        shape = self._shapes[key]
        if isinstance(shape, ShoehornError):
            raise shape
        return shape

    def _read(self, ref: ModelRef, directory: Path | None, on_cpu: bool, overrides: Mapping[str, Any]) -> ModelShape:
        if directory:
            shape = checkpoint.read(LocalFiles(directory), overrides)
            summary = artifact.summary(directory) if ref.is_int4 else ""
            return replace(shape, notes=(*shape.notes, summary)) if summary else shape
        if ref.is_int4:
            return self._conversion(ref, on_cpu, overrides)
        return checkpoint.read(pull.hub_files(self._settings, ref), overrides)

    def _conversion(self, ref: ModelRef, on_cpu: bool, overrides: Mapping[str, Any]) -> ModelShape:
        """Derive the shape of a future conversion; `disk_bytes` is the peak while it is written."""
        files = pull.hub_files(self._settings, ref.original)
        conversion = layout.layout(files, UNQUANTIZED if on_cpu else MAX_BIT_WIDTHS)
        shape = checkpoint.read(PlannedFiles(files, conversion), overrides)
        sizes = files.names()
        original_bytes = sum(sizes[name] for name in shards(files, sizes))
        if not self._settings.keep_original:  # each original shard is removed once its conversion is written
            new = [shard.size for shard in conversion.shards]
            original_bytes += layout.peak_pair_bytes(new) - sum(new)
        return replace(shape, disk_bytes=shape.disk_bytes + original_bytes)
