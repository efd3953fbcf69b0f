"""GPUs that CUDA shows to a program: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER.

Rules of CUDA, as torch 2.13 reads them too (torch/cuda/__init__.py, `_parse_visible_devices` and
`_transform_uuid_to_ordinals`):
- unset shows every GPU, an empty value none;
- the first word decides: indices, or UUIDs of which the first digits are enough;
- the first invalid word ends the list, so that `-1` shows none; a repeated word empties it;
- indices count in the order of CUDA_DEVICE_ORDER: `PCI_BUS_ID`, as NVML, or the fastest GPU first, the default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from shoehorn.hardware.types import Gpu

VISIBLE = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"

_NUMBER = re.compile(r"[+-]?[0-9]+")


def select(gpus: Sequence[Gpu], environment: Mapping[str, str]) -> tuple[tuple[Gpu, ...], str]:
    """Return the visible GPUs in CUDA's order, with their ordinals, and a remark about the others ("" if all are).

    Args:
        gpus: of NVML, in its order.
    """
    ordered = _cuda_order(gpus, environment.get(ORDER, ""))
    value = environment.get(VISIBLE)
    if value is None:
        return tuple(replace(gpu, ordinal=ordinal) for ordinal, gpu in enumerate(gpus)), ""
    visible, problem = _parse(ordered, value)
    names = ", ".join(f"GPU {gpu.index}" for gpu in visible) or "none"
    remark = f"{VISIBLE}={value} selects {names} of {len(gpus)}{problem}"
    return (tuple(replace(gpu, ordinal=ordinal) for ordinal, gpu in enumerate(visible)),
            "" if len(visible) == len(gpus) and not problem else remark)


def environment_of(gpus: Sequence[Gpu]) -> dict[str, str]:
    """Return the variables with which CUDA shows exactly these GPUs in this order; empty if one has no UUID."""
    if not gpus or not all(gpu.uuid for gpu in gpus):
        return {}
    return {VISIBLE: ",".join(gpu.uuid for gpu in gpus), ORDER: "PCI_BUS_ID"}


def _cuda_order(gpus: Sequence[Gpu], order: str) -> list[Gpu]:
    """Sort GPUs as CUDA numbers them; equal ones keep NVML's order."""
    if order == "PCI_BUS_ID":
        return list(gpus)
    key = (lambda gpu: -gpu.core_hertz) if all(gpu.core_hertz for gpu in gpus) else _likely_slower
    return sorted(gpus, key=key)


def _likely_slower(gpu: Gpu) -> tuple[int, ...]:
    """Sort key of GPUs of unknown speed: generation, then size."""
    return (*(-part for part in gpu.compute_capability), -gpu.total_bytes)


def _parse(gpus: Sequence[Gpu], value: str) -> tuple[list[Gpu], str]:
    """Return the GPUs that a value selects, and why it selects no more."""
    if value.startswith("MIG-"):
        return [], ": MIG slices are unsupported"
    by_uuid = value.startswith("GPU-")
    chosen: list[Gpu] = []
    for word in value.split(","):
        if by_uuid:
            matches = [gpu for gpu in gpus if gpu.uuid.startswith(word)] if word.startswith("GPU-") else []
        else:
            number = _NUMBER.match(word.strip())
            index = int(number[0]) if number else -1
            matches = [gpus[index]] if 0 <= index < len(gpus) else []
        if len(matches) != 1:
            if value in ("", "-1"):
                return chosen, ", which hides all GPUs"
            return chosen, f"; CUDA ignores {word.strip() or 'an empty word'!r} and everything after it"
        if matches[0] in chosen:
            return [], f"; CUDA ignores a list that repeats a GPU ({word.strip()})"
        chosen.append(matches[0])
    return chosen, ""
