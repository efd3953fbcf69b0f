"""Sizes: integers in bytes inside the code; GB and GiB only in text for users."""

from __future__ import annotations

import re

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_UNITS = {"": 1, "b": 1, "k": KIB, "kib": KIB, "kb": 1000, "m": MIB, "mib": MIB, "mb": 1000**2,
          "g": GIB, "gib": GIB, "gb": 1000**3, "t": 1 << 40, "tib": 1 << 40, "tb": 1000**4}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")


def parse_size(text: str) -> int:
    """Parse a size like `7GiB`, `7 GB`, `512M`, `1073741824`; single letters are binary units.

    Raises:
        ValueError: invalid size, or zero.
    """
    match = _SIZE.fullmatch(text)
    if not match or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write it like 7GiB, 8GB or 512MiB")
    size = round(float(match[1]) * _UNITS[match[2].lower()])
    if size <= 0:
        raise ValueError(f"{text!r} is zero; write a size like 7GiB")
    return size


def parse_memory(text: str) -> int:
    """Parse a size of memory: as `parse_size`, but a small number needs a unit, for it would count bytes.

    Raises:
        ValueError: invalid size, zero, or less than 1 MiB without a unit.
    """
    size = parse_size(text)
    if size < MIB and text.strip().replace(".", "", 1).isdigit():
        raise ValueError(f"{text!r} has no unit; write {text.strip()}GiB")
    return size


def format_size(size_bytes: int) -> str:
    """Format a size in binary units: `6.93 GiB`, `512 MiB`, `17 KiB`."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size_bytes) >= unit:
            value = size_bytes / unit
            return f"{value:.2f} {name}" if unit == GIB else f"{value:.0f} {name}"
    return f"{size_bytes} B"


def ceil_div(dividend: int, divisor: int) -> int:
    """Divide integers and round up."""
    return -(-dividend // divisor)
