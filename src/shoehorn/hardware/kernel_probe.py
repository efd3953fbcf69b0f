"""Measurement of the CPU kernel and of host memory: two seconds, cached in the file of measured bandwidths.

Rules: a separate process measures, so that no thread remains; after any failure the rates are unknown, and the plan
uses the CPU for nothing; a result is valid for one processor model, number of CPUs and version of Shoehorn.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from shoehorn import __version__
from shoehorn.common.units import GIB
from shoehorn.hardware import probe_cache
from shoehorn.hardware.host import text
from shoehorn.hardware.types import Hardware, HostCompute

log = logging.getLogger("engine")

LEAST_CPUS = 4
"""CPUs below which the API server and the engine's own threads leave too few for the kernel."""

RESERVED_CORES = 2
"""Physical cores that the kernel leaves to the API server and the engine core."""

_AVAILABLE_BYTES = 4 * GIB
"""Minimum available host memory for a measurement: matrices of 1 GiB, and torch."""

_TIMEOUT_SECONDS = 60.0
_FIGURES = ("read", "tokens_1", "tokens_8")


def with_measured_kernel(hardware: Hardware, cache: Path, *, measure: bool = True, root: Path = Path("/")) -> Hardware:
    """Return the machine with the rates of the CPU kernel, read from the file `cache` or measured now.

    A machine without a GPU, or with the engine's CPU build, is left as it is: there the kernel has no alternative to
    be compared with.

    Args:
        measure: False only reads the cache; unknown rates stay unknown.
        root: contains /proc.
    """
    if not hardware.gpus or hardware.cpus < LEAST_CPUS or importlib.util.find_spec("cuda") is None:
        return hardware
    figures = probe_cache.read(cache)
    key = cache_key(hardware, root)
    if measure and key not in figures and hardware.host_available_bytes >= _AVAILABLE_BYTES \
            and (measurement := _measure()):
        figures[key] = measurement
        probe_cache.save(cache, figures)
    values = [figures.get(key, {}).get(name, 0.0) for name in _FIGURES]
    return replace(hardware, host_compute=HostCompute(*values)) if all(values) else hardware


def cache_key(hardware: Hardware, root: Path = Path("/")) -> str:
    """Return the key of the machine's rates in the file of measured bandwidths."""
    lines = text(root / "proc/cpuinfo").splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"CPU kernel {__version__} {name} {hardware.cpus:g}"


def _measure() -> dict[str, float]:
    """Measure in a child process; empty after a failure."""
    command = [sys.executable, "-m", "shoehorn_vllm.hybrid.kernel.probe", str(RESERVED_CORES)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("Cannot measure the CPU kernel error=%s", error)
        return {}
    try:
        result = json.loads(child.stdout)
        return {name: float(result[name]) for name in _FIGURES}
    except (ValueError, KeyError, TypeError):
        last = (child.stderr.strip().splitlines() or ["no output"])[-1]
        log.warning("Cannot measure the CPU kernel exit_code=%d error=%s", child.returncode, last)
        return {}
