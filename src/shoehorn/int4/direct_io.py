"""Reading and writing whole files past the page cache (O_DIRECT), by many threads at once.

A conversion touches every byte once. Through the page cache that can cost more processor time than the compiled
arithmetic, drives out what others keep there, and a read-back would show the cache and not the disk.
Rules:
- only whole blocks go past the cache; the rest of a block at either end goes through it, so that neighbours may write
  the two halves of one block at the same time;
- each thread has its own memory for it, used again from call to call;
- a file system without O_DIRECT (tmpfs, some network ones) is read and written through the cache.
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

BLOCK = mmap.PAGESIZE
"""What a direct transfer is aligned to, in the file and in memory; no page of the cache spans two of these."""

_LARGE = 2 << 20
_memory = threading.local()
_libc = ctypes.CDLL(None, use_errno=True)  # posix_fallocate, which Python has, writes zeros where there is no such call


class DirectFile:
    """An open file; the threads of a process may share it.

    Args:
        writable: open it for reading and writing; it must exist.
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
        """`length` bytes from byte `begin`, valid until this thread's next `read`.

        Raises:
            EOFError: the file ends before.
        """
        lead = begin % BLOCK
        view = _own("read", lead + length)
        got = 0
        while got < lead + length:
            got -= got % BLOCK  # what is asked for again after a short read begins with a block
            many = self._transfer(os.preadv, [view[got:]], begin - lead + got)
            if got + many < lead + length and many < BLOCK:
                raise EOFError(f"ends before byte {begin + length}")
            got += many
        return view[lead:lead + length]

    def write(self, data: memoryview, place: int) -> None:
        """Write at byte `place`."""
        lead = min(-place % BLOCK, len(data))
        whole = (len(data) - lead) // BLOCK * BLOCK
        _through_cache(self._cached, data[:lead], place)
        _through_cache(self._cached, data[lead + whole:], place + lead + whole)
        if not whole:
            return
        view = _own("write", whole)[:whole]
        view[:] = data[lead:lead + whole]
        put = 0
        while put < whole:
            put += self._transfer(os.pwritev, [view[put:]], place + lead + put)
            if put % BLOCK:  # a disk that is almost full takes a part of a block
                _through_cache(self._cached, view[put:], place + lead + put)
                return

    def reserve(self, size: int) -> None:
        """Make the file `size` bytes long and take the room for them, so that threads need not wait for each other.

        Raises:
            OSError: there is no such room.
        """
        if _libc.fallocate(self._cached, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
            number = ctypes.get_errno()
            if number != errno.EOPNOTSUPP:
                raise OSError(number, os.strerror(number))
            os.truncate(self._cached, size)

    def sync(self) -> None:
        """Return once all of it is on the disk; what is read then comes from there."""
        os.fsync(self._cached)
        os.posix_fadvise(self._cached, 0, 0, os.POSIX_FADV_DONTNEED)

    def _transfer(self, call: Callable[[int, list[memoryview], int], int], parts: list[memoryview], place: int) -> int:
        """One system call; some file systems say only here that they have no O_DIRECT."""
        try:
            return call(self._direct, parts, place)
        except OSError as error:
            flags = fcntl.fcntl(self._direct, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            fcntl.fcntl(self._direct, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            return call(self._direct, parts, place)


def _own(use: str, size: int) -> memoryview:
    """This thread's memory for a use: whole blocks, at least `size` bytes, aligned."""
    view: memoryview | None = getattr(_memory, use, None)
    if view is None or len(view) < size:
        memory = mmap.mmap(-1, -(-max(size, 1) // _LARGE) * _LARGE)
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)  # fewer pages to look up at each transfer
        view = memoryview(memory)
        setattr(_memory, use, view)
    return view


def _through_cache(descriptor: int, data: memoryview, place: int) -> None:
    put = 0
    while put < len(data):
        put += os.pwrite(descriptor, data[put:], place + put)
