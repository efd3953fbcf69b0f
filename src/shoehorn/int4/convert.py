"""A checkpoint in bf16, fp16 or fp32 -> the same in INT4, as unmodified vLLM reads it.

Rules:
- a shard is written beside its place (`int4_shards`), synced, read back from the disk, compared with what was made,
  hashed and renamed, then noted in the journal; a killed conversion goes on with the shard that it was at, and its
  result has the same bytes;
- with KEEP_ORIGINAL=no an original shard is removed once its successor is noted, and not before;
- the manifest is completed last: nothing half converted is ever served.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from shoehorn.common import disk
from shoehorn.common.atomic_file import sync_directory, write_atomic
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.common.progress import Report, report_progress
from shoehorn.config.settings import Settings
from shoehorn.hub.files import ModelFile
from shoehorn.int4 import artifact, layout, shard_writer
from shoehorn.int4 import journal as journal_module
from shoehorn.int4.journal import Journal
from shoehorn.int4.layout import INDEX, KEPT, Bits, Shard
from shoehorn.int4.shard_writer import Made
from shoehorn.model.files import LocalFiles
from shoehorn.model.reference import ModelRef
from shoehorn.model.safetensors import Tensor, header, shards
from shoehorn.store import inventory, locks, manifest, pull
from shoehorn.store.manifest import Manifest
from shoehorn.store.reference import model_reference

log = logging.getLogger("convert")

ACCEPTABLE_ERROR = 0.12
"""The relative error up to which embedding and head get 4 bits: normally distributed weights have 0.097."""

_SAMPLED_ROWS = 2048
_NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5",
               "*.msgpack", "*.incomplete", "config.json", journal_module.JOURNAL)


@dataclass(frozen=True)
class Wish:
    """What a person asked for; None leaves it to the measured error (`embedding`, for the head too) or the model."""

    embedding: int | None = None
    group: int | None = None


def convert(settings: Settings, wish: Wish, report: Report) -> Path:
    """Convert the model that the settings name, and return the new folder. One that is complete is left as it is.

    Raises:
        ModelUnavailableError: the original is not there, or the volume fails.
        SettingsError: it cannot be converted.
    """
    ref, models_dir = model_reference(settings), settings.models_dir
    try:
        if found := artifact.locate(models_dir, ref):
            return found
        with locks.only_writer(models_dir, ref.converted.stored_id), _held(models_dir, ref):
            return artifact.locate(models_dir, ref) or _convert(settings, ref, wish, report)
    except OSError as error:
        raise disk.volume_error(settings.models_dir, error) from error


def _convert(settings: Settings, ref: ModelRef, wish: Wish, report: Report) -> Path:
    models_dir = settings.models_dir
    source = pull.pull(settings, report) if ref.is_local else artifact.source(models_dir, ref)
    directory = artifact.folder(models_dir, ref)
    journal = journal_module.read_journal(directory)
    if journal and source and _is_wanted(journal, models_dir, ref, wish):
        journal = _checked(journal, directory, report)
    else:
        journal = None
    if source is None or (journal and not _is_left(journal, source)):
        raise ModelUnavailableError(f"{ref.id} is not complete in {models_dir}.", f"Type: shoehorn pull {ref.id}")
    journal = journal or _begin(settings, ref, wish, source)
    files = LocalFiles(source)
    left = [name for name in journal.source["shards"] if name not in journal.shards]
    made = [layout.shard(files, name, journal.bits, journal.group) for name in left]
    sizes = [shard.size for shard in made]
    if not settings.keep_original:
        _make_way(models_dir, ref, source, journal)  # a kill can have come between the note and the removal
    disk.require_space(directory, sum(sizes) if settings.keep_original else layout.two_in_turn(sizes))
    done = 0

    def count(source_bytes: int) -> None:
        nonlocal done
        done += source_bytes

    with report_progress("converting", sum(shard.source_bytes for shard in made), lambda: done, report), \
            shard_writer.workers() as pool, ThreadPoolExecutor(1) as verifier:
        noted: Future[Journal] | None = None
        for shard in made:  # one is verified while the next one is made
            result = shard_writer.make(pool, shard, source, directory, journal.group, count)
            journal = noted.result() if noted else journal
            noted = verifier.submit(_note, settings, ref, journal, shard, result, source)
        journal = noted.result() if noted else journal
    return _complete(models_dir, ref, journal)


def _held(models_dir: Path, ref: ModelRef) -> AbstractContextManager[None]:
    """Keeps the original from being removed meanwhile."""
    if ref.is_local:
        return nullcontext()
    return inventory.used(models_dir, ref.stored_id)


def _is_wanted(journal: Journal, models_dir: Path, ref: ModelRef, wish: Wish) -> bool:
    """Whether what was begun is what is wanted now."""
    known = manifest.read(models_dir, ref)
    same = (journal.source["model"], journal.source["revision"], journal.source["commit"]) == (
        ref.id, ref.revision, known.commit if known else "")
    as_wished = wish.embedding in (None, journal.embedding) and wish.group in (None, journal.group)
    return same and as_wished and not artifact.has_changed(journal, ref)


def _is_left(journal: Journal, source: Path) -> bool:
    """Whether the original still has every shard that is not made."""
    return set(journal.source["shards"]) <= LocalFiles(source).names().keys() | journal.shards.keys()


def _checked(journal: Journal, directory: Path, report: Report) -> Journal:
    """The journal with those of its shards that are still what was made, every byte."""
    for path in directory.glob(f".{journal_module.JOURNAL}.*"):
        path.unlink()  # a kill while the journal was written left it
    there = LocalFiles(directory).names()
    left = {name: entry for name, entry in journal.shards.items() if there.get(name) == entry["size"]}
    kept, hashed = {}, 0
    with report_progress("verifying", sum(entry["size"] for entry in left.values()), lambda: hashed, report):
        for name, entry in left.items():
            with (directory / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]:
                    kept[name] = entry
                else:
                    log.warning("%s is not what was made, and is made again", name)
            hashed += entry["size"]
    return replace(journal, shards=kept)


def _begin(settings: Settings, ref: ModelRef, wish: Wish, source: Path) -> Journal:
    """Decide, and write what is known before the weights: config, index, tokenizer, journal, manifest."""
    models_dir, files = settings.models_dir, LocalFiles(source)
    directory = artifact.folder(models_dir, ref)
    names = files.names()
    layout.layout(files, KEPT, wish.group)  # refuses what cannot be converted
    bits = _chosen(files, settings, wish)
    made = layout.layout(files, bits, wish.group)
    known = manifest.read(models_dir, ref)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    hashes = {file.path: file.sha256 for file in known.files} if known else artifact.stamps(source)
    journal = Journal({"model": ref.id, "revision": ref.revision, "commit": known.commit if known else "",
                       "shards": {name: hashes.get(name, "") for name in shards(files, names)}},
                      made.bits.embedding, made.bits.head, made.group)
    manifest.write(models_dir, ref.converted, _manifest(ref, known, (), complete=False))
    for name in names:
        if not any(fnmatchcase(name, pattern) for pattern in _NOT_COPIED):
            shutil.copyfile(source / name, directory / name)
    write_atomic(directory / "config.json", json.dumps(made.config, indent=1) + "\n")
    if made.index:
        write_atomic(directory / INDEX, json.dumps(made.index, indent=1) + "\n")
    journal.write(directory)
    log.info("converting %s: groups of %d, embedding %d bits, head %d bits", ref.id, journal.group,
             journal.embedding, journal.head)
    return journal


def _chosen(files: LocalFiles, settings: Settings, wish: Wish) -> Bits:
    """The bits of embedding and head: as asked for, as the engine can read, or by their error."""
    if wish.embedding:
        return Bits(wish.embedding, wish.embedding)
    if settings.vram_profile == "cpu":
        return KEPT
    bits = {"embedding": 16, "head": 16}
    group = wish.group or layout.layout(files, KEPT).group
    for name, size in files.names().items():
        for tensor in header(files, name, size) if name.endswith(".safetensors") else ():
            kind = layout.kind(tensor)
            if kind in bits and not tensor.shape[1] % group:
                error = _sampled_error(files, name, tensor, group)
                bits[kind] = 4 if error <= ACCEPTABLE_ERROR else 8
                log.info("%s: relative error %.3f with 4 bits, so it gets %d", tensor.name, error, bits[kind])
    return Bits(**bits)


def _sampled_error(files: LocalFiles, name: str, tensor: Tensor, group: int) -> float:
    """The relative error of a matrix with 4 bits, from rows evenly spread over it."""
    from shoehorn.int4 import quantizer  # torch is loaded only where weights are touched

    rows, columns = tensor.shape
    width = tensor.bytes // rows
    blocks = min(16, rows)
    each = min(rows // blocks, _SAMPLED_ROWS // blocks)
    lost = whole = 0.0
    for block in range(blocks):
        data = files.read(name, tensor.begin + rows * block // blocks * width, each * width)
        weight = quantizer.from_bytes(bytearray(data), tensor.dtype, columns)
        found = quantizer.quantize(weight, 4, group, quantizer.DTYPES["BF16"])
        lost, whole = lost + found.lost, whole + found.whole
    return float((lost / whole) ** 0.5) if whole else 0.0


def _note(settings: Settings, ref: ModelRef, journal: Journal, shard: Shard, made: Made, source: Path) -> Journal:
    """Make a shard that is written count: verified, renamed, noted; then its original may go."""
    directory = artifact.folder(settings.models_dir, ref)
    sha256 = shard_writer.verified(shard, made, directory)
    os.replace(directory / shard_writer.partial(shard), directory / shard.name)
    sync_directory(directory)
    entry = {"size": shard.size, "sha256": sha256, "errors": made.errors}
    journal = replace(journal, shards={**journal.shards, shard.name: entry})
    journal.write(directory)
    if not settings.keep_original:
        _make_way(settings.models_dir, ref, source, journal)
    return journal


def _make_way(models_dir: Path, ref: ModelRef, source: Path, journal: Journal) -> None:
    """Remove each original whose successor is noted; from the first one on the original is not complete."""
    there = [source / name for name in journal.shards if (source / name).exists()]
    if there and (known := manifest.read(models_dir, ref)):
        manifest.write(models_dir, ref, replace(known, complete=False))
    for path in there:
        path.unlink()


def _complete(models_dir: Path, ref: ModelRef, journal: Journal) -> Path:
    directory, files = artifact.folder(models_dir, ref), []
    for name, size in LocalFiles(directory).names().items():
        known = journal.shards.get(name)
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())
            sha256 = known["sha256"] if known else hashlib.file_digest(file, "sha256").hexdigest()
        files.append(ModelFile(name, size, sha256, (directory / name).stat().st_mtime_ns))
    sync_directory(directory)
    manifest.write(models_dir, ref.converted,
                   _manifest(ref, manifest.read(models_dir, ref), tuple(files), complete=True))
    return directory


def _manifest(ref: ModelRef, known: Manifest | None, files: tuple[ModelFile, ...], *, complete: bool) -> Manifest:
    target = ref.converted
    return Manifest(target.stored_id, target.revision, known.endpoint if known else "", complete, files,
                    known.commit if known else "", target.stored_source)
