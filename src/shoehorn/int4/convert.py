"""Conversion of a bf16, fp16 or fp32 checkpoint to INT4 for unmodified vLLM.

Rules:
- a shard is written under a partial name, synced, verified on disk, renamed and recorded in the journal; a killed
  conversion resumes with the interrupted shard and results in the same bytes;
- with KEEP_ORIGINAL=no an original shard is deleted only after its conversion is recorded;
- the manifest is completed last: an incomplete conversion is never served.
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
from pathlib import Path

from shoehorn.common import disk
from shoehorn.common.atomic_file import sync_directory, write_atomic
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.common.progress import Report, report_progress
from shoehorn.config.settings import Settings
from shoehorn.hub.files import ModelFile
from shoehorn.int4 import artifact, calibrated, layout, shard_writer
from shoehorn.int4 import journal as journal_module
from shoehorn.int4.journal import UNLIMITED, Journal, Limits
from shoehorn.int4.layout import INDEX, UNQUANTIZED, BitWidths, ShardLayout
from shoehorn.int4.shard_writer import WrittenShard
from shoehorn.model.files import WEIGHTS_SUFFIXES, LocalFiles
from shoehorn.model.reference import ModelRef
from shoehorn.model.safetensors import Tensor, header, shards
from shoehorn.store import inventory, locks, manifest, pull
from shoehorn.store.manifest import Manifest
from shoehorn.store.reference import model_reference

log = logging.getLogger("convert")

ACCEPTABLE_ERROR = 0.12
"""Maximum relative error for 4 bits in embedding and head: normally distributed weights have 0.097."""

_SAMPLED_ROWS = 2048
_NOT_COPIED = (*WEIGHTS_SUFFIXES, ".safetensors.index.json", ".incomplete")
_REWRITTEN = ("config.json", journal_module.JOURNAL)


@dataclass(frozen=True)
class ConversionOptions:
    """Options of a conversion.

    Attributes:
        embedding: bits of embedding and head; None to decide by the measured error.
        group: weights that share a scale; None to decide by the model.
        limits: of a calibration.
    """

    embedding: int | None = None
    group: int | None = None
    limits: Limits = UNLIMITED


def convert(settings: Settings, options: ConversionOptions, cpu_workers: int, report: Report) -> Path:
    """Convert the model of the settings and return its folder; do nothing if the conversion is complete.

    Args:
        cpu_workers: number of threads, if no GPU is used.

    Raises:
        ModelUnavailableError: the original is incomplete, or the volume failed.
        SettingsError: the model cannot be converted.
    """
    ref, models_dir = model_reference(settings), settings.models_dir
    try:
        if directory := artifact.locate(models_dir, ref):
            _log_existing(settings, directory)
            return directory
        with locks.write_lock(models_dir, ref.converted.stored_id), _original_in_use(models_dir, ref):
            return artifact.locate(models_dir, ref) or _convert(settings, ref, options, cpu_workers, report)
    except OSError as error:
        raise disk.volume_error(settings.models_dir, error) from error


def _log_existing(settings: Settings, directory: Path) -> None:
    journal = journal_module.read_journal(directory)
    if journal and journal.calibration is None and settings.calibration not in ("auto", "off"):
        log.warning("Using the conversion without calibration; to calibrate: shoehorn models rm, then convert again "
                    "path=%s", directory)


def _convert(settings: Settings, ref: ModelRef, options: ConversionOptions, cpu_workers: int, report: Report) -> Path:
    models_dir = settings.models_dir
    source = pull.pull(settings, report) if ref.is_local else artifact.source(models_dir, ref)
    directory = artifact.folder(models_dir, ref)
    journal = journal_module.read_journal(directory)
    if journal and source and _is_resumable(journal, settings, ref, options):
        journal = _verified_journal(journal, directory, report)
    else:
        journal = None
    if source is None or (journal and not _has_remaining_shards(journal, source)):
        raise ModelUnavailableError(f"{ref.id}: not complete in {models_dir}.", f"Run: shoehorn pull {ref.id}",
                                    code="incomplete_model")
    journal = journal or _begin(settings, ref, options, source)
    files = LocalFiles(source)
    remaining = [layout.shard(files, name, journal.bits, journal.group) for name in journal.source["shards"]
                 if name not in journal.shards]
    sizes = [shard.size for shard in remaining]
    if not settings.keep_original:
        _delete_converted(models_dir, ref, source, journal)  # a kill between record and deletion leaves originals
    disk.require_space(directory, sum(sizes) if settings.keep_original else layout.peak_pair_bytes(sizes))
    work = _Work(sum(shard.source_bytes for shard in remaining), journal, source)
    with report_progress("converting", work.total, lambda: work.done, report), \
            shard_writer.workers(cpu_workers) as pool, ThreadPoolExecutor(1) as verifier:
        calibration = calibrated.start(journal, source, directory, remaining, work.count_calibration)
        recorded: Future[Journal] | None = None
        for shard in remaining:  # one is verified while the next one is written
            calibration.advance(shard)
            written = shard_writer.write_shard(pool, shard, source, directory, journal.group, work.count, calibration)
            journal = recorded.result() if recorded else journal
            calibration.release(journal.shards)
            recorded = verifier.submit(_record, settings, ref, journal, shard, written, source)
        journal = recorded.result() if recorded else journal
        journal = calibration.complete(journal)
    journal.write(directory)
    return _complete(models_dir, ref, journal)


class _Work:
    """Progress of a conversion in bytes: of each remaining shard once, and of the linear layers again if calibrated."""

    def __init__(self, shard_bytes: int, journal: Journal, source: Path) -> None:
        self._calibrated_bytes = calibrated.source_bytes(source) if journal.calibration else 0
        self.total, self.done = shard_bytes + self._calibrated_bytes, 0

    def count(self, source_bytes: int) -> None:
        """Count bytes of a shard."""
        self.done += source_bytes

    def count_calibration(self, share: float) -> None:
        """Count a share of the calibration."""
        self.done += round(share * self._calibrated_bytes)


def _original_in_use(models_dir: Path, ref: ModelRef) -> AbstractContextManager[None]:
    """Prevent the deletion of the original."""
    if ref.is_local:
        return nullcontext()
    return inventory.use_lock(models_dir, ref.stored_id)


def _is_resumable(journal: Journal, settings: Settings, ref: ModelRef, options: ConversionOptions) -> bool:
    """Return whether the journal is that of this original with these options."""
    known = manifest.read(settings.models_dir, ref)
    same_source = (journal.source["model"], journal.source["revision"], journal.source["commit"]) == (
        ref.id, ref.revision, known.commit if known else "")
    same_options = options.embedding in (None, journal.bits.embedding) and options.group in (None, journal.group)
    text = (journal.calibration or {"text": "off"})["text"]
    same_text = settings.calibration in ("auto", text) or (settings.calibration, text) == ("on", "packaged")
    return same_source and same_options and same_text and not artifact.has_changed(journal, ref)


def _has_remaining_shards(journal: Journal, source: Path) -> bool:
    """Return whether the original has every shard that is not converted yet."""
    return set(journal.source["shards"]) <= LocalFiles(source).names().keys() | journal.shards.keys()


def _verified_journal(journal: Journal, directory: Path, report: Report) -> Journal:
    """Return the journal with the shards whose checksums match."""
    for path in directory.glob(f".{journal_module.JOURNAL}.*"):
        path.unlink()  # left by a kill while the journal was written
    sizes = LocalFiles(directory).names()
    candidates = {name: entry for name, entry in journal.shards.items() if sizes.get(name) == entry["size"]}
    valid, hashed = {}, 0
    with report_progress("verifying", sum(entry["size"] for entry in candidates.values()), lambda: hashed, report):
        for name, entry in candidates.items():
            with (directory / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]:
                    valid[name] = entry
                else:
                    log.warning("Checksum mismatch, converting again shard=%s", name)
            hashed += entry["size"]
    return replace(journal, shards=valid)


def _begin(settings: Settings, ref: ModelRef, options: ConversionOptions, source: Path) -> Journal:
    """Choose the bit widths and write all files but the weights: config, index, tokenizer, journal, manifest."""
    models_dir, files = settings.models_dir, LocalFiles(source)
    directory = artifact.folder(models_dir, ref)
    names = files.names()
    layout.layout(files, UNQUANTIZED, options.group)  # raises for unsupported models
    bits = _choose_bits(files, settings, options)
    plan = layout.layout(files, bits, options.group)
    known = manifest.read(models_dir, ref)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    hashes = {file.path: file.sha256 for file in known.files} if known else artifact.stamps(source)
    journal = Journal({"model": ref.id, "revision": ref.revision, "commit": known.commit if known else "",
                       "shards": {name: hashes.get(name, "") for name in shards(files, names)}},
                      plan.bits, plan.group, calibration=calibrated.describe(
                          settings.calibration, source, directory, options.limits))
    manifest.write(models_dir, ref.converted, _manifest(ref, known, (), complete=False))
    for name in names:
        if name not in _REWRITTEN and not name.endswith(_NOT_COPIED):
            shutil.copyfile(source / name, directory / name)
    write_atomic(directory / "config.json", json.dumps(plan.config, indent=1) + "\n")
    if plan.index:
        write_atomic(directory / INDEX, json.dumps(plan.index, indent=1) + "\n")
    journal.write(directory)
    log.info("Converting to INT4 model=%s group=%d embedding_bits=%d head_bits=%d", ref.id, journal.group,
             journal.bits.embedding, journal.bits.head)
    return journal


def _choose_bits(files: LocalFiles, settings: Settings, options: ConversionOptions) -> BitWidths:
    """Choose the bits of embedding and head: from the options, for the CPU, or by their error."""
    if options.embedding:
        return BitWidths(options.embedding, options.embedding)
    if settings.vram_profile == "cpu":
        return UNQUANTIZED
    bits = {"embedding": 16, "head": 16}
    group = options.group or layout.layout(files, UNQUANTIZED).group
    for name, size in files.names().items():
        for tensor in header(files, name, size) if name.endswith(".safetensors") else ():
            kind = layout.kind(tensor)
            if kind in bits and not tensor.shape[1] % group:
                error = _sampled_error(files, name, tensor, group)
                bits[kind] = 4 if error <= ACCEPTABLE_ERROR else 8
                log.info("Chose bit width tensor=%s error_with_4_bits=%.3f bits=%d", tensor.name, error, bits[kind])
    return BitWidths(**bits)


def _sampled_error(files: LocalFiles, name: str, tensor: Tensor, group: int) -> float:
    """Measure the relative error of a matrix with 4 bits, in evenly spread rows."""
    from shoehorn.int4 import quantizer  # imports torch, which only a conversion needs

    rows, columns = tensor.shape
    width = tensor.bytes // rows
    blocks = min(16, rows)
    block_rows = min(rows // blocks, _SAMPLED_ROWS // blocks)
    squared_error = squared_norm = 0.0
    for block in range(blocks):
        data = files.read(name, tensor.begin + rows * block // blocks * width, block_rows * width)
        weight = quantizer.from_bytes(bytearray(data), tensor.dtype, columns)
        quantized = quantizer.quantize(weight, 4, group, quantizer.DTYPES["BF16"])
        squared_error += quantized.squared_error
        squared_norm += quantized.squared_norm
    return float((squared_error / squared_norm) ** 0.5) if squared_norm else 0.0


def _record(settings: Settings, ref: ModelRef, journal: Journal, shard: ShardLayout, written: WrittenShard,
            source: Path) -> Journal:
    """Verify and rename a written shard, record it in the journal, then delete its original if permitted."""
    directory = artifact.folder(settings.models_dir, ref)
    sha256 = shard_writer.verify(shard, written, directory)
    os.replace(directory / shard_writer.partial_name(shard), directory / shard.name)
    sync_directory(directory)
    entry = {"size": shard.size, "sha256": sha256, "errors": written.errors}
    journal = replace(journal, shards={**journal.shards, shard.name: entry})
    journal.write(directory)
    if not settings.keep_original:
        _delete_converted(settings.models_dir, ref, source, journal)
    return journal


def _delete_converted(models_dir: Path, ref: ModelRef, source: Path, journal: Journal) -> None:
    """Delete the original of each recorded shard, after marking the original as incomplete."""
    paths = [source / name for name in journal.shards if (source / name).exists()]
    if paths and (known := manifest.read(models_dir, ref)):
        manifest.write(models_dir, ref, replace(known, complete=False))
    for path in paths:
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
    calibrated.remove(directory)
    return directory


def _manifest(ref: ModelRef, known: Manifest | None, files: tuple[ModelFile, ...], *, complete: bool) -> Manifest:
    target = ref.converted
    return Manifest(target.stored_id, target.revision, known.endpoint if known else "", complete, files,
                    known.commit if known else "", target.stored_source)
