"""Mounts of the kernel's mount table: detects anonymous volumes and machine-local locks.

Format: proc_pid_mountinfo(5).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_TABLE = Path("/proc/self/mountinfo")
_ANONYMOUS = re.compile(r"/volumes/[0-9a-f]{64}(?:/_data)?")
_LOCAL_LOCKS = {"nfs": ("nolock", "local_lock=all", "local_lock=flock"), "cifs": ("nobrl",), "smb3": ("nobrl",)}


@dataclass(frozen=True)
class Mount:
    """One mount.

    Attributes:
        root: folder of the mounted file system that appears at `point`.
        kind: type of the file system.
    """

    root: str
    point: str
    kind: str
    options: frozenset[str]

    @property
    def is_anonymous(self) -> bool:
        """True for an anonymous container volume, which is deleted with its container."""
        return bool(_ANONYMOUS.search(self.root))

    @property
    def local_locks(self) -> str:
        """The mount option that makes file locks invisible to other machines, or ""."""
        kind = "nfs" if self.kind == "nfs4" else self.kind
        return next((option for option in _LOCAL_LOCKS.get(kind, ()) if option in self.options), "")


def find_mount(folder: Path, table: Path = _TABLE) -> Mount | None:
    """Return the mount that contains `folder`; None if the mount table is unreadable."""
    try:
        lines = table.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    path = folder.resolve()
    innermost = None
    for line in lines:
        mount_part, _, system_part = line.partition(" - ")
        fields, system = mount_part.split(), system_part.split()
        if len(fields) < 6 or len(system) < 3:
            continue
        options = frozenset([*fields[5].split(","), *system[2].split(",")])
        mount = Mount(_unescape(fields[3]), _unescape(fields[4]), system[0], options)
        if path.is_relative_to(mount.point) and (innermost is None or len(mount.point) >= len(innermost.point)):
            innermost = mount
    return innermost


def _unescape(path: str) -> str:
    """Decode the three octal digits by which the kernel writes blanks and the like."""
    return re.sub(r"\\([0-7]{3})", lambda digits: chr(int(digits[1], 8)), path)
