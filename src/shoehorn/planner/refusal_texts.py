"""Texts of refusals: causes and remedies by stable code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shoehorn.common.units import format_size

CAUSES: Mapping[str, str] = {
    "disk-too-small": "Disk space: the model's files take {needed}, and {directory} has {free} free.",
    "gpu-memory-too-small": "GPU memory: the model needs {needed} on each GPU, and may use {limit}; {short} are "
                            "missing. The largest parts are {largest}.{others}",
    "kv-cache-too-small": "KV cache: {cache} are too small for one request of {context} tokens; {short} are missing.",
    "host-memory-too-small": "Host memory: the start needs {needed}{offloaded}, and this container has {available}.",
}
"""Text by code; `str.format` fills in the parameters."""

REMEDIES: Mapping[str, Callable[[Any], str]] = {
    "set": lambda settings: "set " + " and ".join(f"{name}={_quoted(value)}" for name, value in settings.items()),
    "free-disk": lambda size: f"free {format_size(size)} of disk space",
    "larger-volume": lambda size: "mount a larger volume at MODELS_DIR",
    "larger-gpu": lambda gpu: f"use {'a GPU' if gpu['count'] == 1 else '{} GPUs'.format(gpu['count'])} with "
                              f"{gpu['gib']:g} GiB or more",
    "more-gpu-memory": lambda size: f"use a GPU with {format_size(size)} more",
    "more-host-memory": lambda size: f"give the container {format_size(size)} more memory",
    "smaller-model": lambda nothing: "use a smaller model",
}
"""Text of a remedy's value by code."""


def _quoted(value: str) -> str:
    return f"'{value}'" if value.startswith("-") else value


@dataclass(frozen=True)
class Remedy:
    """A change that would let the model fit.

    Attributes:
        code: key of `REMEDIES`.
        value: what the code needs: settings by name, bytes, or None.
    """

    code: str
    value: Any = None

    @property
    def text(self) -> str:
        """The remedy as an imperative phrase."""
        return REMEDIES[self.code](self.value)
