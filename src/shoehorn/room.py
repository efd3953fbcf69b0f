"""A disk that is full under state, keys or logs: told in words and waited for, instead of crashing in circles."""

from __future__ import annotations

import errno
import logging
import time
from pathlib import Path

from shoehorn.files import write_atomic

log = logging.getLogger("engine")

FULL = (errno.ENOSPC, errno.EDQUOT)

_ROOM_BYTES = 256 << 10
_LOOK_SECONDS = 2.0


def wait_for(*folders: Path) -> None:
    """Return once a little can be written in each of the folders."""
    said = None
    while full := [folder for folder in folders if _is_full(folder)]:
        if full != said:
            log.error("%s is full, so nothing can be served. It goes on by itself once there is room.",
                      " and ".join(map(str, full)))
            said = full
        time.sleep(_LOOK_SECONDS)


def _is_full(folder: Path) -> bool:
    probe = folder / ".room"
    try:
        write_atomic(probe, "x" * _ROOM_BYTES)
        probe.unlink()
    except OSError as error:  # others are not for waiting: what follows will name them
        return error.errno in FULL
    return False
