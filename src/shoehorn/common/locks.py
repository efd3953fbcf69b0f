"""File locks (flock) that the kernel releases when their holder ends, so that a crash leaves none behind."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class LocksUnsupportedError(OSError):
    """The file system has no locks."""


@contextmanager
def exclusive(path: Path, *, wait: bool = True, on_wait: Callable[[], None] | None = None) -> Iterator[int]:
    """Hold the lock alone; yields its file descriptor. The file is created where it does not exist.

    Args:
        wait: for other holders; else the lock is refused at once.
        on_wait: called before waiting for another holder.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is false.
        LocksUnsupportedError: the file system has no locks.
        OSError: the file cannot be opened.
    """
    descriptor = acquire(path, fcntl.LOCK_EX, wait=wait, on_wait=on_wait)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def shared(path: Path) -> Iterator[int]:
    """Hold the lock together with other shared holders; waits for an exclusive one. Raises as `exclusive`."""
    descriptor = acquire(path, fcntl.LOCK_SH)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def acquire(path: Path, operation: int = fcntl.LOCK_EX, *, wait: bool = True,
            on_wait: Callable[[], None] | None = None) -> int:
    """Take a lock until its file descriptor, which is returned, is closed. Raises as `exclusive`."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            if on_wait:
                on_wait()
            fcntl.flock(descriptor, operation)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError as error:
        os.close(descriptor)
        raise LocksUnsupportedError(error.errno, error.strerror, str(path)) from error
    return descriptor


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock. Needs no permission to write; False where the file cannot be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)
