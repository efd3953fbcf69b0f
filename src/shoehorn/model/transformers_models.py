"""Architectures that the engine serves with transformers' code, as recorded from vLLM 0.32.0.

Source: transformers_models.json, written by tools/record_model_defaults.py.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path


def runs_in_transformers(architecture: str) -> bool:
    """Return whether vLLM serves the architecture with transformers' code, which computes rotary tables as needed."""
    return architecture in _recorded()


def lacks_plan(architecture: str) -> bool:
    """Return whether that code states no division, so that only attention and gated MLPs are divided."""
    return not _recorded().get(architecture, True)


@functools.cache
def _recorded() -> Mapping[str, bool]:
    path = Path(__file__).with_name("transformers_models.json")
    return dict(json.loads(path.read_text(encoding="utf-8")))
