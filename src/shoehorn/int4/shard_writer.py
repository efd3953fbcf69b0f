"""Conversion of one shard to INT4 in the given layout, and its verification on disk.

Rules:
- threads read, quantize and write rows of a few MiB: memory use does not grow with the model;
- every written range has a checksum of the data in memory; a shard is valid once the file read back from disk matches
  the checksum of every range, without gaps between ranges.
"""

from __future__ import annotations

import errno
import hashlib
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.int4.calibrated import Codes
from shoehorn.int4.direct_io import BLOCK, DirectFile
from shoehorn.int4.layout import ShardLayout, TensorLayout
from shoehorn.model.files import LocalFiles
from shoehorn.model.safetensors import Tensor, header

_CHUNK_ELEMENTS = 1 << 22
_COPY_BYTES = 8 << 20
_MAX_BYTES = 3 << 30
_BASE_BYTES = 1 << 30
_WORKER_BYTES = 64 << 20
_WORKERS_ON_GPU = 8
_WORKERS_PER_CPU = 4
_READERS = 4


@dataclass(frozen=True)
class ByteRange:
    """A range of a converted file, with the expected CRC-32.

    Attributes:
        begin: first byte.
    """

    begin: int
    length: int
    crc: int


@dataclass(frozen=True)
class WrittenShard:
    """A written shard.

    Attributes:
        errors: |w - w'| / |w| by tensor.
        ranges: all bytes of the file, by position.
    """

    errors: dict[str, float]
    ranges: tuple[ByteRange, ...]


@dataclass(frozen=True)
class ChunkResult:
    """Result of some rows: |w - w'|^2 and |w|^2, both 0 for a copy, and the written ranges."""

    squared_error: float
    squared_norm: float
    ranges: tuple[ByteRange, ...]


def worker_count(cpus: float, available_bytes: int) -> int:
    """Return the number of CPU worker threads: several per CPU, since most wait for the disk while one computes."""
    memory = min(available_bytes or _MAX_BYTES, _MAX_BYTES) - _BASE_BYTES
    return max(1, min(round(_WORKERS_PER_CPU * cpus), memory // _WORKER_BYTES))


def workers(cpu_workers: int) -> Executor:
    """Return a thread pool: on a GPU enough threads to keep it busy, else `cpu_workers`."""
    from shoehorn.int4 import quantizer  # imports torch, which only a conversion needs

    if quantizer.device() != "cpu":
        return ThreadPoolExecutor(_WORKERS_ON_GPU)
    return ThreadPoolExecutor(cpu_workers, "convert", quantizer.use_one_thread)


def partial_name(shard: ShardLayout) -> str:
    """Return the name of a shard before its verification."""
    return f"{shard.name}.partial"


def write_shard(pool: Executor, shard: ShardLayout, source: Path, directory: Path, group: int,
                count: Callable[[int], None], calibrated: Codes) -> WrittenShard:
    """Write a shard under its partial name.

    Args:
        count: called with the number of source bytes after each chunk.
        calibrated: codes of calibrated weights.

    Raises:
        ModelUnavailableError: the source is damaged.
    """
    path = directory / partial_name(shard)
    path.write_bytes(b"")
    with DirectFile(source / shard.name) as original, DirectFile(path, writable=True) as target:
        target.reserve(shard.size)
        ranges = [_write(target, memoryview(shard.header), 0)]
        ranges += [_write_shape(target, tensor) for tensor in shard.tensors if tensor.bits != 16]
        chunks = {pool.submit(_convert_chunk, chunk, tensor.source, original, target, group, calibrated): chunk
                  for tensor in shard.tensors for chunk in _chunks(tensor, group)}
        try:
            for future in as_completed(chunks):
                chunk = chunks[future]
                future.result()
                count(chunk.source.bytes)
        except (ValueError, EOFError) as error:
            raise ModelUnavailableError(f"{shard.name}: {chunk.source.name}: {error}.",
                                        "The checkpoint is damaged: choose another MODEL_ID or MODEL_REVISION.",
                                        code="invalid_weights") from error
        finally:
            for future in chunks:
                future.cancel()
            wait(chunks)  # before the files are closed
    squared_errors: defaultdict[str, float] = defaultdict(float)
    squared_norms: defaultdict[str, float] = defaultdict(float)
    for future, chunk in chunks.items():  # in a fixed order, so that the sums are reproducible
        result = future.result()
        squared_errors[chunk.source.name] += result.squared_error
        squared_norms[chunk.source.name] += result.squared_norm
        ranges += result.ranges
    errors = {name: float(f"{(squared_errors[name] / (squared_norms[name] or 1.0)) ** 0.5:.5g}")
              for name in (tensor.source.name for tensor in shard.tensors if tensor.bits != 16)}
    return WrittenShard(errors, tuple(sorted(ranges, key=lambda each: each.begin)))


def verify(shard: ShardLayout, written: WrittenShard, directory: Path) -> str:
    """Read a written shard back from disk and return its SHA-256.

    Raises:
        OSError: it is not durable, or differs from the data in memory.
    """
    end = 0
    for each in written.ranges:
        if each.begin != end:
            raise _mismatch_error(shard, end)
        end += each.length
    if end != shard.size:
        raise _mismatch_error(shard, end)
    digest = hashlib.sha256()
    reads: deque[Future[bytes]] = deque()
    with DirectFile(directory / partial_name(shard)) as file, ThreadPoolExecutor(_READERS, "verify") as readers:
        file.sync()
        for run in _runs(written.ranges):
            reads.append(readers.submit(_read_back, file, run, shard))
            if len(reads) > 2 * _READERS:
                digest.update(reads.popleft().result())
        for read in reads:
            digest.update(read.result())
    header(LocalFiles(directory), partial_name(shard), end)
    return digest.hexdigest()


def _runs(ranges: Iterable[ByteRange]) -> Iterator[list[ByteRange]]:
    """Group consecutive ranges that are read together, in requests as large as those of the workers."""
    run: list[ByteRange] = []
    for each in ranges:
        if run and each.begin + each.length - run[0].begin > _COPY_BYTES:
            yield run
            run = []
        run.append(each)
    if run:
        yield run


def _read_back(file: DirectFile, ranges: list[ByteRange], shard: ShardLayout) -> bytes:
    begin = ranges[0].begin
    data = file.read(begin, ranges[-1].begin + ranges[-1].length - begin)
    for each in ranges:
        if zlib.crc32(data[each.begin - begin:each.begin - begin + each.length]) != each.crc:
            raise _mismatch_error(shard, each.begin)
    return bytes(data)


def _mismatch_error(shard: ShardLayout, position: int) -> OSError:
    return OSError(errno.EIO, f"{partial_name(shard)}: data read back differs from data written at byte {position}")


def _chunks(tensor: TensorLayout, group: int) -> Iterator[TensorLayout]:
    """Divide a tensor into rows, or a copied one into bytes, each with its own offsets."""
    source, offsets = tensor.source, tensor.offsets
    if tensor.bits == 16:
        for start in range(0, source.bytes, _COPY_BYTES):
            chunk = replace(source, bytes=min(_COPY_BYTES, source.bytes - start), begin=source.begin + start)
            yield TensorLayout(chunk, 16, {source.name: offsets[source.name] + start})
        return
    rows, columns = source.shape
    row_bytes = source.bytes // rows
    packed, scale = _part(tensor, "packed"), _part(tensor, "scale")
    packed_row, scale_row = columns * tensor.bits // 8, columns // group * 2
    step = max(1, _CHUNK_ELEMENTS // columns)
    unit = BLOCK // gcd(BLOCK, packed_row, scale_row)  # rows whose parts are complete blocks
    step -= step % unit if step > unit else 0
    for start in range(0, rows, step):
        count = min(step, rows - start)
        chunk = replace(source, shape=(count, columns), bytes=count * row_bytes,
                        begin=source.begin + start * row_bytes)
        yield TensorLayout(chunk, tensor.bits, {packed: offsets[packed] + start * packed_row,
                                                scale: offsets[scale] + start * scale_row})


def _part(tensor: TensorLayout, kind: str) -> str:
    return f"{tensor.source.name.removesuffix('.weight')}.weight_{kind}"


def _convert_chunk(chunk: TensorLayout, whole: Tensor, original: DirectFile, target: DirectFile, group: int,
                   calibrated: Codes) -> ChunkResult:
    """Convert and write some rows of a tensor, in a worker thread."""
    source = chunk.source
    data = original.read(source.begin, source.bytes)
    if chunk.bits == 16:
        return ChunkResult(0.0, 0.0, (_write(target, data, chunk.offsets[source.name]),))
    from shoehorn.int4 import quantizer  # imports torch, which only a conversion needs

    weight = quantizer.from_bytes(data, source.dtype, source.shape[1])
    if chunk.bits == 4 and calibrated.has(source.name):
        first = (source.begin - whole.begin) // (whole.bytes // whole.shape[0])
        rows = quantizer.compared(weight, *calibrated.rows(source.name, first, first + len(weight)), chunk.bits)
    else:
        rows = quantizer.quantize_on_device(weight, chunk.bits, group,
                                            quantizer.DTYPES["F16" if source.dtype == "F16" else "BF16"])
    return ChunkResult(rows.squared_error, rows.squared_norm, tuple(
        _write(target, quantizer.to_bytes(data), chunk.offsets[_part(chunk, kind)])
        for kind, data in (("packed", rows.packed), ("scale", rows.scale))))


def _write(file: DirectFile, data: memoryview, begin: int) -> ByteRange:
    file.write(data, begin)
    return ByteRange(begin, len(data), zlib.crc32(data))


def _write_shape(file: DirectFile, tensor: TensorLayout) -> ByteRange:
    rows, columns = tensor.source.shape
    return _write(file, memoryview(rows.to_bytes(8, "little") + columns.to_bytes(8, "little")),
                  tensor.offsets[_part(tensor, "shape")])
