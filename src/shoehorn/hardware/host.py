"""Host memory and CPUs within the cgroup limits of this container."""

from __future__ import annotations

from pathlib import Path

_V1_UNLIMITED = 1 << 62
"""cgroup v1 reports a number close to 2^63 if no limit is set."""


def memory_kills(root: Path = Path("/")) -> int:
    """Count the processes of this cgroup that the kernel killed for memory; 0 if unreadable."""
    counts = [_fields(group / name).get("oom_kill", 0)
              for group in _groups(root, "memory") for name in ("memory.events", "memory.oom_control")]
    return max(counts, default=0)


def memory(root: Path, notes: list[str]) -> tuple[int, int]:
    """Return (total, available) bytes; (0, 0) if /proc/meminfo is unreadable."""
    fields = _fields(root / "proc/meminfo")
    try:
        total, available = fields["MemTotal:"] * 1024, fields.get("MemAvailable:", fields["MemFree:"]) * 1024
    except KeyError:
        notes.append("/proc/meminfo: unreadable; host memory counted as 0")
        return 0, 0
    for group in _groups(root, "memory"):
        v1 = (group / "memory.limit_in_bytes").exists()
        limit = _number(group / ("memory.limit_in_bytes" if v1 else "memory.max"))
        if limit is None or limit >= _V1_UNLIMITED:
            continue
        used = _number(group / ("memory.usage_in_bytes" if v1 else "memory.current")) or 0
        cache = _fields(group / "memory.stat").get("total_inactive_file" if v1 else "inactive_file", 0)
        total = min(total, limit)
        available = min(available, max(0, limit - max(0, used - cache)))
    return total, available


def cpus(root: Path, notes: list[str]) -> float:
    """Return the CPU time in CPUs; 1 if unreadable."""
    count = float(_affinity(root))
    if not count:
        notes.append("/proc/self/status: CPUs unreadable; counted as 1")
        count = 1.0
    for group in _groups(root, "cpu"):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota is None:
            words = text(group / "cpu.max").split()
            quota, period = (int(words[0]), int(words[1])) if len(words) == 2 and words[0] != "max" else (None, None)
        if quota and period and quota > 0:
            count = min(count, quota / period)
    return count


def _affinity(root: Path) -> int:
    """Return the number of CPUs that this process may run on; 0 if unknown."""
    for line in text(root / "proc/self/status").splitlines():
        if line.startswith("Cpus_allowed_list:"):
            ranges = [part.split("-") for part in line.split(":")[1].strip().split(",")]
            return sum(int(each[-1]) - int(each[0]) + 1 for each in ranges)
    return 0


def _groups(root: Path, controller: str) -> list[Path]:
    """Return the folders of this process's cgroup and of all its ancestors, whose limits also apply.

    In a container /proc/self/cgroup may contain the host's path, which does not exist there: the root of the mount is
    then the container's cgroup.
    """
    folders: list[Path] = []
    for line in text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        inner = Path(path.lstrip("/"))
        folders += [top / inner, *(top / parent for parent in inner.parents)]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _fields(path: Path) -> dict[str, int]:
    """Lines of `name number ...` as numbers by name."""
    words = (line.split() for line in text(path).splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}


def _number(path: Path) -> int | None:
    try:
        return int(text(path))
    except ValueError:
        return None


def text(path: Path) -> str:
    """Return the text of a file; empty if unreadable."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
