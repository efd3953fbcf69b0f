"""File locks and file stamps."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shoehorn.common import locks
from shoehorn.common.file_stamp import stamp

HOLDER = """
import sys, time
from pathlib import Path
from shoehorn.common import locks
with locks.exclusive(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_an_exclusive_lock_refuses_all_others(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.exclusive(path):
        assert locks.is_locked(path)
        with pytest.raises(BlockingIOError), locks.exclusive(path, wait=False):
            pass
    assert not locks.is_locked(path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_shared_locks_admit_each_other_and_no_exclusive_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.shared(path), locks.shared(path):
        assert locks.is_locked(path)
        with pytest.raises(BlockingIOError), locks.exclusive(path, wait=False):
            pass


def test_is_locked_creates_no_file(tmp_path: Path) -> None:
    assert not locks.is_locked(tmp_path / "lock")
    assert not list(tmp_path.iterdir())


def test_a_killed_holder_leaves_no_lock_and_a_waiting_process_is_notified(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        waits: list[bool] = []

        def kill_holder() -> None:
            waits.append(locks.is_locked(path))
            holder.send_signal(signal.SIGKILL)

        with locks.exclusive(path, on_wait=kill_holder):
            assert waits == [True]


def test_a_lock_is_not_inherited_by_programs(tmp_path: Path) -> None:
    descriptor = locks.acquire(tmp_path / "lock")
    try:
        assert not os.get_inheritable(descriptor)
    finally:
        os.close(descriptor)


def test_file_system_without_locks_is_reported_and_leaks_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                      ) -> None:
    def refuse(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(locks.LocksUnsupportedError) as caught:
        locks.acquire(tmp_path / "lock")
    assert caught.value.errno == errno.ENOLCK
    assert len(os.listdir("/proc/self/fd")) == before


def test_stamp_changes_with_content_size_mode_and_identity(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert stamp(path) is None
    path.write_text("one")
    first = stamp(path)
    assert first is not None
    assert first == stamp(path)
    os.utime(path, ns=(1, first.mtime_ns + 1))
    second = stamp(path)
    assert second is not None
    other = tmp_path / "other"
    other.write_text("one")
    other.replace(path)
    os.utime(path, ns=(1, second.mtime_ns))
    third = stamp(path)
    assert third is not None
    assert (third.size_bytes, third.mtime_ns) == (second.size_bytes, second.mtime_ns)
    assert len({first, second, third}) == 3
