"""What is mounted where a folder lies: the kernel's own table, for traps that no call tells of.

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
    """One mount: the folder of the mounted file system that appears at `point`, its type, and its options."""

    root: str
    point: str
    kind: str
    options: frozenset[str]

    @property
    def is_anonymous(self) -> bool:
        """Whether it is a volume that a container engine made because nobody named one, and that goes with it."""
        return bool(_ANONYMOUS.search(self.root))

    @property
    def local_locks(self) -> str:
        """The option by which its locks hold on this machine only, and not for the others that share it; or ""."""
        kind = "nfs" if self.kind == "nfs4" else self.kind
        return next((option for option in _LOCAL_LOCKS.get(kind, ()) if option in self.options), "")


def of(folder: Path, table: Path = _TABLE) -> Mount | None:
    """The mount that holds `folder`; None where the kernel tells none."""
    try:
        lines = table.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    there = folder.resolve()
    found = None
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, more = before.split(), after.split()
        if len(fields) < 6 or len(more) < 3:
            continue
        mount = Mount(_plain(fields[3]), _plain(fields[4]), more[0], frozenset([*fields[5].split(","),
                                                                                 *more[2].split(",")]))
        if there.is_relative_to(mount.point) and (found is None or len(mount.point) >= len(found.point)):
            found = mount
    return found


def _plain(path: str) -> str:
    """A path as it is; the kernel writes blanks and the like as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda digits: chr(int(digits[1], 8)), path)
