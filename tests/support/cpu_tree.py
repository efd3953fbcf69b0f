"""Files of the kernel that describe CPUs, written by hand."""

from __future__ import annotations

from pathlib import Path


def machine(root: Path, siblings: dict[int, str], slow: str = "", nodes: dict[int, str] | None = None,
            files: dict[str, str] | None = None) -> Path:
    """Write the files below `root`, and return it."""
    written = {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text for cpu, text in siblings.items()}
    written |= {f"sys/devices/system/node/node{node}/cpulist": text for node, text in (nodes or {}).items()}
    written |= {"sys/devices/cpu_atom/cpus": slow, **(files or {})}
    for name, text in written.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root
