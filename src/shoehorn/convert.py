"""A checkpoint in bf16, fp16 or fp32 -> the same in INT4, as unmodified vLLM reads it.

Rules:
- rows are read, quantized and written by workers, a few MiB at a time: memory does not grow with the model;
- a shard is written beside its place, synced, read back, hashed and renamed, then noted in the journal; a killed
  conversion goes on with the shard that it was at, and its result has the same bytes;
- with KEEP_ORIGINAL=no an original shard is removed once its successor is noted, and not before;
- the manifest is completed last: nothing half converted is ever served.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from shoehorn import converted, hardware, int4_layout, inventory, manifest, store, volume
from shoehorn.converted import Journal
from shoehorn.errors import ModelUnavailableError
from shoehorn.files import sync_directory, write_atomic
from shoehorn.int4_layout import INDEX, KEPT, Bits, Item, Shard
from shoehorn.manifest import Manifest, ModelFile
from shoehorn.progress import Report, reported
from shoehorn.settings import Settings
from shoehorn.tensor_files import LocalFiles, Tensor, header, shards

log = logging.getLogger("convert")

ACCEPTABLE_ERROR = 0.12
"""The relative error up to which embedding and head get 4 bits: normally distributed weights have 0.097."""

_CHUNK_ELEMENTS = 1 << 22
_COPY_BYTES = 8 << 20
_WORKER_BYTES = 400 << 20
_MOST_BYTES = 3 << 30
_SAMPLED_ROWS = 2048
_NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5",
               "*.msgpack", "*.incomplete", "config.json", converted.JOURNAL)


@dataclass(frozen=True)
class Wish:
    """What a person asked for; None leaves it to the measured error (`embedding`, for the head too) or the model."""

    embedding: int | None = None
    group: int | None = None


@dataclass(frozen=True)
class Job:
    """Some rows of one tensor, for a worker: what to read, what to make of it, and where that goes.

    Attributes:
        begin: the byte of `source` that the rows start at; `length` bytes are read.
        places: the bytes of `target` that the packed rows and the scales start at; the first one for a copy.
    """

    source: str
    target: str
    name: str
    dtype: str
    begin: int
    length: int
    columns: int
    bits: int
    group: int
    places: tuple[int, ...]


def convert(settings: Settings, wish: Wish, report: Report) -> Path:
    """Convert the model that the settings name, and return the new folder. One that is complete is left as it is.

    Raises:
        ModelUnavailableError: the original is not there, the volume fails, or memory ran out.
        SettingsError: it cannot be converted.
    """
    try:
        if found := converted.locate(settings):
            return found
        with volume.only_writer(converted.target(settings)), _held(settings):
            return converted.locate(settings) or _convert(settings, wish, report)
    except OSError as error:
        raise volume.trouble(settings.models_dir, error) from error
    except BrokenProcessPool as error:
        raise ModelUnavailableError("A worker of the conversion was killed, most often because memory ran out.",
                                    "Free memory or give the container more, then start again: what is done is kept "
                                    "and gone on with.") from error


def _convert(settings: Settings, wish: Wish, report: Report) -> Path:
    source = store.pull(settings, report) if settings.model_source == "local" else converted.source(settings)
    directory = converted.folder(settings)
    journal = converted.read_journal(directory)
    if journal and source and _is_wanted(journal, settings, wish):
        journal = _checked(journal, directory, report)
    else:
        journal = None
    if source is None or (journal and not _is_left(journal, source)):
        raise ModelUnavailableError(f"{settings.model_id} is not complete in {settings.models_dir}.",
                                    f"Type: shoehorn pull {settings.model_id}")
    journal = journal or _begin(settings, wish, source, directory)
    files = LocalFiles(source)
    left = [name for name in journal.source["shards"] if name not in journal.shards]
    made = [int4_layout.shard(files, name, journal.bits, journal.group) for name in left]
    sizes = [shard.size for shard in made]
    if not settings.keep_original:
        _make_way(settings, source, journal)  # a kill can have come between the note and the removal
    volume.require_space(directory, sum(sizes) if settings.keep_original else max(sizes, default=0))
    done = 0

    def count(job: Job) -> None:
        nonlocal done
        done += job.length

    with reported("converting", sum(shard.source_bytes for shard in made), lambda: done, report), _workers() as pool, \
            ThreadPoolExecutor(1) as sealer:
        sealed: Future[Journal] | None = None
        for shard in made:  # one is sealed while the next one is made
            lost = _make(pool, shard, source, directory, journal.group, count)
            journal = sealed.result() if sealed else journal
            sealed = sealer.submit(_seal, settings, journal, shard, lost, source, directory)
        journal = sealed.result() if sealed else journal
    return _complete(settings, directory, journal)


def _held(settings: Settings) -> AbstractContextManager[None]:
    """Keeps the original from being removed meanwhile."""
    if settings.model_source == "local":
        return nullcontext()
    return inventory.used(settings.models_dir, settings.model_id)


def _is_wanted(journal: Journal, settings: Settings, wish: Wish) -> bool:
    """Whether what was begun is what is wanted now."""
    known = manifest.read(settings)
    same = (journal.source["model"], journal.source["revision"], journal.source["commit"]) == (
        settings.model_id, settings.model_revision, known.commit if known else "")
    return same and wish.embedding in (None, journal.embedding) and wish.group in (None, journal.group)


def _is_left(journal: Journal, source: Path) -> bool:
    """Whether the original still has every shard that is not made."""
    return set(journal.source["shards"]) <= LocalFiles(source).names().keys() | journal.shards.keys()


def _checked(journal: Journal, directory: Path, report: Report) -> Journal:
    """The journal with those of its shards that are still what was made, every byte."""
    there = LocalFiles(directory).names()
    left = {name: entry for name, entry in journal.shards.items() if there.get(name) == entry["size"]}
    kept, hashed = {}, 0
    with reported("verifying", sum(entry["size"] for entry in left.values()), lambda: hashed, report):
        for name, entry in left.items():
            with (directory / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]:
                    kept[name] = entry
                else:
                    log.warning("%s is not what was made, and is made again", name)
            hashed += entry["size"]
    return replace(journal, shards=kept)


def _begin(settings: Settings, wish: Wish, source: Path, directory: Path) -> Journal:
    """Decide, and write what is known before the weights: config, index, tokenizer, journal, manifest."""
    files = LocalFiles(source)
    names = files.names()
    int4_layout.layout(files, KEPT, wish.group)  # refuses what cannot be converted
    bits = _chosen(files, settings, wish)
    made = int4_layout.layout(files, bits, wish.group)
    known = manifest.read(settings)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    hashes = {file.path: file.sha256 for file in known.files} if known else {}
    journal = Journal({"model": settings.model_id, "revision": settings.model_revision,
                       "commit": known.commit if known else "",
                       "shards": {name: hashes.get(name, "") for name in shards(files, names)}},
                      made.bits.embedding, made.bits.head, made.group)
    manifest.write(converted.target(settings), _manifest(settings, known, (), complete=False))
    for name in names:
        if not any(fnmatchcase(name, pattern) for pattern in _NOT_COPIED):
            shutil.copyfile(source / name, directory / name)
    write_atomic(directory / "config.json", json.dumps(made.config, indent=1) + "\n")
    if made.index:
        write_atomic(directory / INDEX, json.dumps(made.index, indent=1) + "\n")
    journal.write(directory)
    log.info("converting %s: groups of %d, embedding %d bits, head %d bits", settings.model_id, journal.group,
             journal.embedding, journal.head)
    return journal


def _chosen(files: LocalFiles, settings: Settings, wish: Wish) -> Bits:
    """The bits of embedding and head: as asked for, as the engine can read, or by their error."""
    if wish.embedding:
        return Bits(wish.embedding, wish.embedding)
    if settings.vram_profile == "cpu":
        return KEPT
    bits = {"embedding": 16, "head": 16}
    group = wish.group or int4_layout.layout(files, KEPT).group
    for name, size in files.names().items():
        for tensor in header(files, name, size) if name.endswith(".safetensors") else ():
            kind = int4_layout.kind(tensor)
            if kind in bits and not tensor.shape[1] % group:
                error = _sampled_error(files, name, tensor, group)
                bits[kind] = 4 if error <= ACCEPTABLE_ERROR else 8
                log.info("%s: relative error %.3f with 4 bits, so it gets %d", tensor.name, error, bits[kind])
    return Bits(**bits)


def _sampled_error(files: LocalFiles, name: str, tensor: Tensor, group: int) -> float:
    """The relative error of a matrix with 4 bits, from rows evenly spread over it."""
    from shoehorn import int4  # torch is loaded only where weights are touched

    rows, columns = tensor.shape
    width = tensor.bytes // rows
    blocks = min(16, rows)
    each = min(rows // blocks, _SAMPLED_ROWS // blocks)
    lost = whole = 0.0
    for block in range(blocks):
        data = files.read(name, tensor.begin + rows * block // blocks * width, each * width)
        found = int4.quantize(int4.from_bytes(data, tensor.dtype, columns), 4, group, int4.DTYPES["BF16"])
        lost, whole = lost + found.lost, whole + found.whole
    return float((lost / whole) ** 0.5) if whole else 0.0


def _make(pool: Executor, shard: Shard, source: Path, directory: Path, group: int, count: Callable[[Job], None],
          ) -> dict[str, float]:
    """Write a shard beside its place; returns the relative error by tensor."""
    partial = directory / f"{shard.name}.partial"
    with partial.open("wb") as file:
        file.truncate(shard.size)
        file.write(shard.header)
    jobs = {pool.submit(work, job): job for item in shard.items
            for job in _jobs(item, source / shard.name, partial, group)}
    try:
        for future in as_completed(jobs):
            job = jobs[future]
            future.result()
            count(job)
    except ValueError as error:
        raise ModelUnavailableError(f"{shard.name}: {job.name} {error}.", "The checkpoint is damaged: choose another "
                                    "MODEL_ID or MODEL_REVISION.") from error
    finally:
        for future in jobs:
            future.cancel()
    lost: defaultdict[str, float] = defaultdict(float)
    whole: defaultdict[str, float] = defaultdict(float)
    for future, job in jobs.items():  # in order, so that the same sums come out every time
        lost[job.name] += future.result()[0]
        whole[job.name] += future.result()[1]
    return {item.source.name: float(f"{(lost[item.source.name] / (whole[item.source.name] or 1.0)) ** 0.5:.5g}")
            for item in shard.items if item.bits != 16}


def _jobs(item: Item, source: Path, target: Path, group: int) -> Iterator[Job]:
    tensor, places = item.source, item.places
    if item.bits == 16:
        for start in range(0, tensor.bytes, _COPY_BYTES):
            yield Job(str(source), str(target), tensor.name, tensor.dtype, tensor.begin + start,
                      min(_COPY_BYTES, tensor.bytes - start), 0, 16, group, (places[tensor.name] + start,))
        return
    rows, columns = tensor.shape
    width = tensor.bytes // rows
    base = tensor.name.removesuffix(".weight")
    packed, scale = places[f"{base}.weight_packed"], places[f"{base}.weight_scale"]
    with target.open("r+b") as file:
        file.seek(places[f"{base}.weight_shape"])
        file.write(rows.to_bytes(8, "little") + columns.to_bytes(8, "little"))
    step = max(1, _CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        many = min(step, rows - start)
        yield Job(str(source), str(target), tensor.name, tensor.dtype, tensor.begin + start * width, many * width,
                  columns, item.bits, group,
                  (packed + start * columns * item.bits // 8, scale + start * (columns // group) * 2))


def work(job: Job) -> tuple[float, float]:
    """Do one job; returns |w - w'|^2 and |w|^2, both 0 for a copy. Runs in a worker."""
    with open(job.source, "rb", buffering=0) as file:
        data = _read(file.fileno(), job.begin, job.length)
    with open(job.target, "r+b", buffering=0) as file:
        if job.bits == 16:
            _write(file.fileno(), data, job.places[0])
            return 0.0, 0.0
        from shoehorn import int4  # torch is loaded only where weights are touched

        weight = int4.from_bytes(data, job.dtype, job.columns).to(int4.device())
        found = int4.quantize(weight, job.bits, job.group, int4.DTYPES["F16" if job.dtype == "F16" else "BF16"])
        _write(file.fileno(), int4.to_bytes(found.packed), job.places[0])
        _write(file.fileno(), int4.to_bytes(found.scale), job.places[1])
        return found.lost, found.whole


def _read(descriptor: int, begin: int, length: int) -> bytearray:
    data = bytearray(length)
    view, got = memoryview(data), 0
    while got < length:
        many = os.preadv(descriptor, [view[got:]], begin + got)
        if not many:
            raise ValueError("ends before its header says")
        got += many
    return data


def _write(descriptor: int, data: bytes | bytearray | memoryview, place: int) -> None:
    view, put = memoryview(data), 0
    while put < len(view):
        put += os.pwrite(descriptor, view[put:], place + put)


def _seal(settings: Settings, journal: Journal, shard: Shard, lost: dict[str, float], source: Path, directory: Path,
          ) -> Journal:
    """Make a shard that is written count: synced, read back, hashed, renamed, noted; then its original may go."""
    partial = directory / f"{shard.name}.partial"
    digest = hashlib.sha256()
    with partial.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(_COPY_BYTES):
            digest.update(block)
    header(LocalFiles(directory), partial.name, partial.stat().st_size)
    os.replace(partial, directory / shard.name)
    sync_directory(directory)
    entry = {"size": shard.size, "sha256": digest.hexdigest(), "errors": lost}
    journal = replace(journal, shards={**journal.shards, shard.name: entry})
    journal.write(directory)
    if not settings.keep_original:
        _make_way(settings, source, journal)
    return journal


def _make_way(settings: Settings, source: Path, journal: Journal) -> None:
    """Remove each original whose successor is noted; from the first one on the original is not complete."""
    there = [source / name for name in journal.shards if (source / name).exists()]
    if there and (known := manifest.read(settings)):
        manifest.write(settings, replace(known, complete=False))
    for path in there:
        path.unlink()


def _complete(settings: Settings, directory: Path, journal: Journal) -> Path:
    files = []
    for name, size in LocalFiles(directory).names().items():
        known = journal.shards.get(name)
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())
            sha256 = known["sha256"] if known else hashlib.file_digest(file, "sha256").hexdigest()
        files.append(ModelFile(name, size, sha256, (directory / name).stat().st_mtime_ns))
    sync_directory(directory)
    manifest.write(converted.target(settings),
                   _manifest(settings, manifest.read(settings), tuple(files), complete=True))
    return directory


def _manifest(settings: Settings, known: Manifest | None, files: tuple[ModelFile, ...], *, complete: bool) -> Manifest:
    target = converted.target(settings)
    return Manifest(target.model_id, target.model_revision, known.endpoint if known else "", complete, files,
                    known.commit if known else "", target.model_source)


def _workers() -> Executor:
    """On a GPU a few threads that keep it busy; else a process for each core, as many as memory allows."""
    from shoehorn import int4  # torch is loaded only where weights are touched

    if int4.device() != "cpu":
        return ThreadPoolExecutor(4)
    memory = min(hardware.detect().host_available_bytes or _MOST_BYTES, _MOST_BYTES)
    many = max(1, min(os.cpu_count() or 1, memory // _WORKER_BYTES - 1))
    return ProcessPoolExecutor(many, multiprocessing.get_context("spawn"), _begin_worker, (os.getpid(),))


def _begin_worker(owner: int) -> None:
    """Runs first in a worker: one thread, and an end when the owner was killed."""
    from shoehorn import int4  # as above

    int4.use_one_thread()

    def watch() -> None:
        while os.getppid() == owner:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name="owner", daemon=True).start()
