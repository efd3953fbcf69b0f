"""One shard of a checkpoint -> the same in INT4, as `int4_layout` lays it out, and the proof that it is on the disk.

Rules:
- rows are read, quantized and written by threads, a few MiB at a time: memory does not grow with the model;
- every part that is written has a checksum of what was made, in memory; the shard counts once the disk gives back a
  file in which each part has it, with nothing between the parts.
"""

from __future__ import annotations

import errno
import hashlib
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from math import gcd
from pathlib import Path

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.hardware import detect
from shoehorn.int4.direct_io import BLOCK, DirectFile
from shoehorn.int4.layout import Item, Shard
from shoehorn.model.files import LocalFiles
from shoehorn.model.safetensors import header

_CHUNK_ELEMENTS = 1 << 22
_COPY_BYTES = 8 << 20
_MOST_BYTES = 3 << 30
_BASE_BYTES = 1 << 30
_WORKER_BYTES = 64 << 20
_WORKERS_ON_GPU = 8
_WORKERS_A_CORE = 4
_READERS = 4


@dataclass(frozen=True)
class Part:
    """Bytes of a new file: where they start, how many, and the CRC-32 of what they have to be."""

    place: int
    length: int
    crc: int


@dataclass(frozen=True)
class Made:
    """A shard that is written. `errors` has |w - w'| / |w| by tensor, `parts` all of its bytes."""

    errors: dict[str, float]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class _Job:
    """Some rows of one tensor: what to read, what to make of it, and where that goes.

    Attributes:
        begin: the byte of the source that the rows start at; `length` bytes are read.
        places: the bytes of the target that the packed rows and the scales start at; the first one for a copy.
    """

    item: Item
    begin: int
    length: int
    places: tuple[int, ...]


@dataclass(frozen=True)
class _Done:
    """|w - w'|^2 and |w|^2, both 0 for a copy."""

    lost: float
    whole: float
    parts: tuple[Part, ...]


def workers() -> Executor:
    """On a GPU a few threads that keep it busy; else some for each core: most wait for the disk while one computes."""
    from shoehorn.int4 import quantizer  # torch is loaded only where weights are touched

    if quantizer.device() != "cpu":
        return ThreadPoolExecutor(_WORKERS_ON_GPU)
    machine = detect.detect()
    memory = min(machine.host_available_bytes or _MOST_BYTES, _MOST_BYTES) - _BASE_BYTES
    many = max(1, min(round(_WORKERS_A_CORE * machine.cpus), memory // _WORKER_BYTES))
    return ThreadPoolExecutor(many, "convert", quantizer.use_one_thread)


def partial(shard: Shard) -> str:
    """The name that a shard has until it counts."""
    return f"{shard.name}.partial"


def make(pool: Executor, shard: Shard, source: Path, directory: Path, group: int, count: Callable[[int], None]) -> Made:
    """Write a shard beside its place.

    Args:
        count: told the bytes of the source that are done, each time some are.

    Raises:
        ModelUnavailableError: the source is damaged.
    """
    path = directory / partial(shard)
    path.write_bytes(b"")
    with DirectFile(source / shard.name) as old, DirectFile(path, writable=True) as new:
        new.reserve(shard.size)
        parts = [_write(new, memoryview(shard.header), 0)]
        parts += [_write_shape(new, item) for item in shard.items if item.bits != 16]
        jobs = {pool.submit(_work, job, old, new, group): job for item in shard.items for job in _jobs(item, group)}
        try:
            for future in as_completed(jobs):
                job = jobs[future]
                future.result()
                count(job.length)
        except (ValueError, EOFError) as error:
            raise ModelUnavailableError(f"{shard.name}: {job.item.source.name} {error}.", "The checkpoint is damaged: "
                                        "choose another MODEL_ID or MODEL_REVISION.") from error
        finally:
            for future in jobs:
                future.cancel()
            wait(jobs)  # the files are closed after it
    lost: defaultdict[str, float] = defaultdict(float)
    whole: defaultdict[str, float] = defaultdict(float)
    for future, job in jobs.items():  # in order, so that the same sums come out every time
        done = future.result()
        lost[job.item.source.name] += done.lost
        whole[job.item.source.name] += done.whole
        parts += done.parts
    errors = {name: float(f"{(lost[name] / (whole[name] or 1.0)) ** 0.5:.5g}")
              for name in (item.source.name for item in shard.items if item.bits != 16)}
    return Made(errors, tuple(sorted(parts, key=lambda part: part.place)))


def verified(shard: Shard, made: Made, directory: Path) -> str:
    """Read back a shard that is written; returns its SHA-256 once it is durable and what was made.

    Raises:
        OSError: it is not.
    """
    end = 0
    for part in made.parts:
        if part.place != end:
            raise _other_than_written(shard, end)
        end += part.length
    if end != shard.size:
        raise _other_than_written(shard, end)
    digest = hashlib.sha256()
    ahead: deque[Future[bytes]] = deque()
    with DirectFile(directory / partial(shard)) as file, ThreadPoolExecutor(_READERS, "verify") as readers:
        file.sync()
        for parts in _runs(made.parts):
            ahead.append(readers.submit(_read_back, file, parts, shard))
            if len(ahead) > 2 * _READERS:
                digest.update(ahead.popleft().result())
        for read in ahead:
            digest.update(read.result())
    header(LocalFiles(directory), partial(shard), end)
    return digest.hexdigest()


def _runs(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts that are read at once: the disk has few large requests of the workers to serve, and as many of these."""
    run: list[Part] = []
    for part in parts:
        if run and part.place + part.length - run[0].place > _COPY_BYTES:
            yield run
            run = []
        run.append(part)
    if run:
        yield run


def _read_back(file: DirectFile, parts: list[Part], shard: Shard) -> bytes:
    begin = parts[0].place
    data = file.read(begin, parts[-1].place + parts[-1].length - begin)
    for part in parts:
        if zlib.crc32(data[part.place - begin:part.place - begin + part.length]) != part.crc:
            raise _other_than_written(shard, part.place)
    return bytes(data)


def _other_than_written(shard: Shard, place: int) -> OSError:
    return OSError(errno.EIO, f"{partial(shard)} reads back other than it was written, at byte {place}")


def _jobs(item: Item, group: int) -> Iterator[_Job]:
    tensor, places = item.source, item.places
    if item.bits == 16:
        for start in range(0, tensor.bytes, _COPY_BYTES):
            yield _Job(item, tensor.begin + start, min(_COPY_BYTES, tensor.bytes - start),
                       (places[tensor.name] + start,))
        return
    rows, columns = tensor.shape
    width = tensor.bytes // rows
    packed, scale = places[_part(item, "packed")], places[_part(item, "scale")]
    step = max(1, _CHUNK_ELEMENTS // columns)
    unit = BLOCK // gcd(BLOCK, columns * item.bits // 8, columns // group * 2)  # rows whose parts are whole blocks
    step -= step % unit if step > unit else 0
    for start in range(0, rows, step):
        yield _Job(item, tensor.begin + start * width, min(step, rows - start) * width,
                   (packed + start * columns * item.bits // 8, scale + start * (columns // group) * 2))


def _part(item: Item, what: str) -> str:
    return f"{item.source.name.removesuffix('.weight')}.weight_{what}"


def _work(job: _Job, old: DirectFile, new: DirectFile, group: int) -> _Done:
    """Do one job, in a worker."""
    tensor, bits = job.item.source, job.item.bits
    data = old.read(job.begin, job.length)
    if bits == 16:
        return _Done(0.0, 0.0, (_write(new, data, job.places[0]),))
    from shoehorn.int4 import quantizer  # torch is loaded only where weights are touched

    found = quantizer.quantize_here(quantizer.from_bytes(data, tensor.dtype, tensor.shape[1]), bits, group,
                               quantizer.DTYPES["F16" if tensor.dtype == "F16" else "BF16"])
    return _Done(found.lost, found.whole, tuple(
        _write(new, quantizer.to_bytes(part), place)
        for part, place in zip((found.packed, found.scale), job.places, strict=True)))


def _write(file: DirectFile, data: memoryview, place: int) -> Part:
    file.write(data, place)
    return Part(place, len(data), zlib.crc32(data))


def _write_shape(file: DirectFile, item: Item) -> Part:
    rows, columns = item.source.shape
    return _write(file, memoryview(rows.to_bytes(8, "little") + columns.to_bytes(8, "little")),
                  item.places[_part(item, "shape")])
