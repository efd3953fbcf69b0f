"""The host as this container sees it: memory and CPUs, within cgroup limits."""

from __future__ import annotations

from pathlib import Path

_V1_UNLIMITED = 1 << 62
"""cgroup v1 writes a number close to 2^63 where there is no limit."""


def memory_kills(root: Path = Path("/")) -> int:
    """How many processes of this one's control group the kernel has killed for memory; 0 where that cannot be read."""
    counts = [_fields(group / name).get("oom_kill", 0)
              for group in _groups(root, "memory") for name in ("memory.events", "memory.oom_control")]
    return max(counts, default=0)


def memory(root: Path, notes: list[str]) -> tuple[int, int]:
    """(total, available) in bytes; (0, 0) when /proc/meminfo cannot be read."""
    fields = _fields(root / "proc/meminfo")
    try:
        total, available = fields["MemTotal:"] * 1024, fields.get("MemAvailable:", fields["MemFree:"]) * 1024
    except KeyError:
        notes.append("/proc/meminfo: cannot be read, so host memory counts as none")
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
    """Processors' worth of time; 1 when nothing can be read."""
    cpus = float(_affinity(root))
    if not cpus:
        notes.append("/proc/self/status: the processors cannot be read, so they count as one")
        cpus = 1.0
    for group in _groups(root, "cpu"):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota is None:
            words = text(group / "cpu.max").split()
            quota, period = (int(words[0]), int(words[1])) if len(words) == 2 and words[0] != "max" else (None, None)
        if quota and period and quota > 0:
            cpus = min(cpus, quota / period)
    return cpus


def _affinity(root: Path) -> int:
    """The number of processors that this process may run on; 0 when unknown."""
    for line in text(root / "proc/self/status").splitlines():
        if line.startswith("Cpus_allowed_list:"):
            ranges = [part.split("-") for part in line.split(":")[1].strip().split(",")]
            return sum(int(each[-1]) - int(each[0]) + 1 for each in ranges)
    return 0


def _groups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control group and of all above it: limits add up.

    Inside a container the path of /proc/self/cgroup may be the host's, which is not there: the mount's top is then
    the container's own group.
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
    """The file's text; empty when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
