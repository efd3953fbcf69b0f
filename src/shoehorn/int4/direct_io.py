"""Direct I/O (O_DIRECT) for files that many threads read and write.

A conversion touches every byte once. The page cache can cost more CPU time than the quantizer, evicts other data, and a
verification would read the cache instead of the disk.
Rules:
- only complete blocks bypass the cache; partial blocks at either end use it, so that two threads may write the two
  parts of one block concurrently;
- each thread reuses its own buffers;
- a file system without O_DIRECT (tmpfs, some network file systems) is read and written through the cache.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from shoehorn.common.units import ceil_div

BLOCK = mmap.PAGESIZE
"""Alignment of direct transfers in file and memory; no page of the cache spans two blocks."""

_LARGE = 2 << 20
_memory = threading.local()
_libc = ctypes.CDLL(None, use_errno=True)  # os.posix_fallocate writes zeros if the call is unsupported


class DirectFile:
    """An open file that threads may share.

    Args:
        writable: open the existing file for reading and writing.
    """

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        self._cached = os.open(path, flags)
        try:
            self._direct = os.open(path, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                os.close(self._cached)
                raise
            self._direct = os.dup(self._cached)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        os.close(self._direct)
        os.close(self._cached)

    def read(self, begin: int, length: int) -> memoryview:
        """Read `length` bytes from byte `begin`; valid until this thread's next `read`.

        Raises:
            EOFError: the file is shorter.
        """
        lead = begin % BLOCK
        view = _buffer("read", lead + length)
        received = 0
        while received < lead + length:
            received -= received % BLOCK  # continue a short read at a block
            count = self._transfer(os.preadv, [view[received:]], begin - lead + received)
            if received + count < lead + length and count < BLOCK:
                raise EOFError(f"ends before byte {begin + length}")
            received += count
        return view[lead:lead + length]

    def write(self, data: memoryview, position: int) -> None:
        """Write at byte `position`."""
        lead = min(-position % BLOCK, len(data))
        aligned = (len(data) - lead) // BLOCK * BLOCK
        _through_cache(self._cached, data[:lead], position)
        _through_cache(self._cached, data[lead + aligned:], position + lead + aligned)
        if not aligned:
            return
        view = _buffer("write", aligned)[:aligned]
        view[:] = data[lead:lead + aligned]
        written = 0
        while written < aligned:
            written += self._transfer(os.pwritev, [view[written:]], position + lead + written)
            if written % BLOCK:  # an almost full disk accepts a partial block
                _through_cache(self._cached, view[written:], position + lead + written)
                return

    def reserve(self, size: int) -> None:
        """Allocate `size` bytes, so that writing threads do not wait for each other.

        Raises:
            OSError: too little free space.
        """
        if _libc.fallocate(self._cached, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
            number = ctypes.get_errno()
            if number != errno.EOPNOTSUPP:
                raise OSError(number, os.strerror(number))
            os.truncate(self._cached, size)

    def sync(self) -> None:
        """Sync the file and drop its cached pages, so that later reads come from the disk."""
        os.fsync(self._cached)
        os.posix_fadvise(self._cached, 0, 0, os.POSIX_FADV_DONTNEED)

    def _transfer(self, call: Callable[[int, list[memoryview], int], int], parts: list[memoryview],
                  position: int) -> int:
        """Run a system call; fall back to the cache if O_DIRECT is rejected only now."""
        try:
            return call(self._direct, parts, position)
        except OSError as error:
            flags = fcntl.fcntl(self._direct, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            fcntl.fcntl(self._direct, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            return call(self._direct, parts, position)


def _buffer(use: str, size: int) -> memoryview:
    """Return this thread's buffer for a use: aligned, at least `size` bytes."""
    view: memoryview | None = getattr(_memory, use, None)
    if view is None or len(view) < size:
        memory = mmap.mmap(-1, ceil_div(max(size, 1), _LARGE) * _LARGE)
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)  # fewer page lookups per transfer
        view = memoryview(memory)
        setattr(_memory, use, view)
    return view


def _through_cache(descriptor: int, data: memoryview, position: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], position + written)
