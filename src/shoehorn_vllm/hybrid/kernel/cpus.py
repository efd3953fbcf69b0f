"""The CPUs that the kernel's threads are pinned to: a pure choice from what the kernel's file systems say.

Rules:
- one thread a physical core: a second one on its hyperthread reads no faster;
- fast cores before efficient ones, so that what is left free is slow;
- never more threads than a cgroup's quota gives CPUs;
- `reserved` cores stay free for the API server and the engine's own threads, but one thread is always there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Choice:
    """CPUs in the order in which threads are pinned to them, and how they came to be.

    Attributes:
        allowed: CPUs among which they were chosen.
    """

    cpus: tuple[int, ...]
    physical_cores: int
    quota_cpus: float | None
    nodes: tuple[int, ...]
    allowed: frozenset[int] = field(default=frozenset(), compare=False)


def parse_list(text: str) -> tuple[int, ...]:
    """Read a list of CPUs such as `0-3,8`."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return tuple(numbers)


def choose(allowed: Iterable[int], reserved: int, root: Path = Path("/"), nodes: Iterable[int] | None = None) -> Choice:
    """Choose one CPU of each physical core.

    Args:
        allowed: CPUs of the process, as `os.sched_getaffinity` returns them.
        reserved: cores to leave free.
        root: where `sys` and `proc` are mounted.
        nodes: NUMA nodes to stay on; all without.
    """
    sysfs = root / "sys/devices/system"
    usable = set(allowed)
    node_of = {cpu: int(path.name.removeprefix("node")) for path in sysfs.glob("node/node[0-9]*")
               for cpu in parse_list(_read(path / "cpulist"))}
    if nodes is not None:
        selected = set(nodes)
        usable = {cpu for cpu in usable if node_of.get(cpu, 0) in selected} or usable
    slow = set(parse_list(_read(root / "sys/devices/cpu_atom/cpus")))
    cores = {_siblings(sysfs, cpu, usable)[0] for cpu in usable}
    ordered = sorted(cores, key=lambda cpu: (cpu in slow, cpu))
    quota = quota_cpus(root)
    limit = len(ordered) if quota is None else min(len(ordered), max(1, math.floor(quota)))
    count = max(1, limit - reserved)
    chosen = tuple(ordered[:count])
    return Choice(chosen, len(ordered), quota, tuple(sorted({node_of.get(cpu, 0) for cpu in chosen})),
                  frozenset(usable))


def _siblings(sysfs: Path, cpu: int, usable: set[int]) -> list[int]:
    listed = parse_list(_read(sysfs / f"cpu/cpu{cpu}/topology/thread_siblings_list"))
    return sorted(usable & set(listed)) or [cpu]


def quota_cpus(root: Path = Path("/")) -> float | None:
    """The CPU quota of this process's cgroup and of those above it; None without a limit."""
    quotas: list[float] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        base = root / "sys/fs/cgroup" / ("" if not controllers else "cpu" if "cpu" in controllers.split(",") else "-")
        relative = Path(path.lstrip("/"))
        for directory in (base / parent for parent in (relative, *relative.parents)):
            limit, _, period = _read(directory / "cpu.max").strip().partition(" ")
            if not limit:
                limit, period = _read(directory / "cpu.cfs_quota_us").strip(), _read(directory / "cpu.cfs_period_us")
            if limit.isdecimal() and period.strip().isdecimal():
                quotas.append(int(limit) / int(period))
    return min(quotas, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # not there on this kernel, or not for this account
        return ""


def present() -> frozenset[int]:
    """The CPUs of this process now, before the engine pins its threads."""
    return frozenset(os.sched_getaffinity(0))
