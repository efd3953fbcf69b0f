"""Direct I/O: any range is read and written correctly, on any file system."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoehorn.int4.direct_io import BLOCK, DirectFile

SIZE = 5 * BLOCK + 77
RANDOM = random.Random(0)  # noqa: S311  # nothing secret


@pytest.fixture(params=["direct", "rejected at open", "rejected at the first transfer"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Simulate the support of the file system for O_DIRECT."""
    rejected = OSError(errno.EINVAL, "no O_DIRECT here")
    direct: set[int] = set()
    really_open = os.open

    def opened(path: object, flags: int, *more: object, **named: object) -> int:
        if flags & os.O_DIRECT and request.param == "rejected at open":
            raise rejected
        descriptor = really_open(path, flags, *more, **named)  # type: ignore[arg-type]
        if flags & os.O_DIRECT and request.param != "direct":
            direct.add(descriptor)
        return descriptor

    def once(call: object) -> object:
        def transfer(descriptor: int, *more: object) -> int:
            if descriptor in direct:
                direct.remove(descriptor)
                raise rejected
            return call(descriptor, *more)  # type: ignore[operator,no-any-return]
        return transfer

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "preadv", once(os.preadv))
    monkeypatch.setattr(os, "pwritev", once(os.pwritev))
    return str(request.param)


@pytest.mark.parametrize("begin", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, SIZE - 1])
@pytest.mark.parametrize("length", [0, 1, 100, BLOCK, 2 * BLOCK, 2 * BLOCK + 3])
def test_any_range_is_read_and_written(tmp_path: Path, kind: str, begin: int, length: int) -> None:
    path, content = tmp_path / "file", bytearray(RANDOM.randbytes(SIZE))
    path.write_bytes(content)
    length = min(length, SIZE - begin)
    with DirectFile(path, writable=True) as file:
        assert file.read(begin, length) == content[begin:begin + length]
        content[begin:begin + length] = RANDOM.randbytes(length)
        file.write(memoryview(content)[begin:begin + length], begin)
        file.sync()
        assert file.read(0, SIZE) == content
        assert bool(fcntl.fcntl(file._direct, fcntl.F_GETFL) & os.O_DIRECT) is (kind == "direct")
    assert path.read_bytes() == content


@pytest.mark.usefixtures("kind")
def test_end_of_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    with DirectFile(path) as file, pytest.raises(EOFError, match=f"ends before byte {SIZE + 1}"):
        file.read(3, SIZE - 2)


def test_threads_write_parts_of_one_block_concurrently(tmp_path: Path) -> None:
    path, content = tmp_path / "file", RANDOM.randbytes(400 * BLOCK)
    parts = list(itertools.pairwise([0, *sorted(RANDOM.sample(range(len(content)), 300)), len(content)]))
    RANDOM.shuffle(parts)
    path.touch()
    with DirectFile(path, writable=True) as file, ThreadPoolExecutor(8) as pool:
        file.reserve(len(content))
        list(pool.map(lambda part: file.write(memoryview(content)[part[0]:part[1]], part[0]), parts))
        file.sync()
        assert file.read(0, len(content)) == content
    assert path.read_bytes() == content


def test_reads_bypass_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * BLOCK))
    with DirectFile(path) as file:
        file.sync()
        counts = [_from_disk()]
        for _ in range(3):
            file.read(0, 64 * BLOCK)
            counts.append(_from_disk())
    if counts[0] == counts[-1]:
        pytest.skip("the file system of the tests is in memory")
    assert all(after - before >= 64 * BLOCK for before, after in itertools.pairwise(counts))


def _from_disk() -> int:
    """Return the bytes that this process has read from disks."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])
