"""The file of measured bandwidths: figures in bytes a second, by what they were measured on."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from shoehorn.common.atomic_file import write_atomic

log = logging.getLogger("engine")

Figures = dict[str, dict[str, float]]


def read(path: Path) -> Figures:
    """Return the figures by their key; empty if the file is missing or invalid."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): {name: float(value) for name, value in values.items()} for key, values in document.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def save(path: Path, figures: Mapping[str, Mapping[str, float]]) -> None:
    """Replace the file; a failure is logged, and the next start measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(figures, indent=1) + "\n")
    except OSError as error:
        log.warning("Cannot save measured bandwidths path=%s error=%s", path, error)
