"""Architectures whose planned weights, caches, states and limits agree with vLLM's own model within 1 %.

Source: compared.json, which the comparison in tests/contract/oracle writes: every recorded model of the architecture,
quantized ones included, on every number of GPUs.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path


def is_compared(architecture: str) -> bool:
    """Return whether the architecture agrees."""
    return architecture in _recorded()


@functools.cache
def _recorded() -> frozenset[str]:
    path = Path(__file__).with_name("compared.json")
    return frozenset(json.loads(path.read_text(encoding="utf-8")))
