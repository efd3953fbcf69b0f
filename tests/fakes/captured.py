"""Captured models and machines: true configs, tensor names, shapes and sizes of public models, without their weights.

A model is one file of tests/captures/models: `source` (what it was checked against), `total_size` (bytes of all tensors
as published; null where unknown), `files_size` (likewise of all files, headers included), `config` (config.json) and
`tensors`: name -> [number format, shape], where `{a-b}` in a name stands for every number from a to b.
NAME@unordered is the model NAME as it would be without activation order, which the engine no longer reads.
A machine is one file of tests/captures/machines, in the form of `Hardware.to_json`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from shoehorn.hardware.types import Hardware
from shoehorn.int4.layout import Bits, Outline, layout
from shoehorn.model.safetensors import DTYPE_BITS, Tensor

CAPTURES = Path(__file__).resolve().parents[1] / "captures"
MODELS, MACHINES = CAPTURES / "models", CAPTURES / "machines"
SHARD_BYTES = 5_000_000_000
"""The most bytes of tensors in a file, as transformers' save_pretrained deals them."""

INT4 = Bits(4, 4)
"""Embedding and head too."""

_RANGE = re.compile(r"\{(\d+)-(\d+)\}")
_READ_AHEAD_BYTES = 128 << 10


class CapturedFiles:
    """Files in memory: what they begin with, and how long they are. Reading on into the weights fails the test.

    `reads` keeps name and bytes of every read, so that a test can count what a plan moves.
    """

    def __init__(self, heads: Mapping[str, bytes], tails: Mapping[str, int]) -> None:
        self._heads = dict(heads)
        self._tails = dict(tails)
        self.reads: list[tuple[str, int]] = []

    def names(self) -> Mapping[str, int]:
        """Size in bytes by file name."""
        return {name: len(head) + self._tails.get(name, 0) for name, head in self._heads.items()}

    def head(self, name: str) -> bytes:
        """What the file begins with, up to its weights."""
        return self._heads[name]

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Up to `length` bytes from `start`, all when None; weights read as zeros, as far as a first guess reaches."""
        head = self._heads[name]
        size = len(head) + self._tails.get(name, 0)
        end = size if length is None else min(size, start + length)
        assert end - len(head) <= _READ_AHEAD_BYTES, f"weights of {name} were read"
        self.reads.append((name, end - start))
        return head[start:end] + bytes(max(0, end - max(start, len(head))))


def names() -> tuple[str, ...]:
    """The captured models."""
    return tuple(sorted(path.stem for path in MODELS.glob("*.json")))


def document(name: str) -> dict[str, Any]:
    """A model's capture as it is stored, or its variant."""
    stored, _, variant = name.partition("@")
    found = dict(json.loads((MODELS / f"{stored}.json").read_text(encoding="utf-8")))
    if variant:
        assert variant == "unordered"
        quantized = found["config"]["quantization_config"]
        if "desc_act" in quantized:
            quantized["desc_act"] = False
        for group in quantized.get("config_groups", {}).values():
            group["weights"]["actorder"] = None
        found["tensors"] = {tensor: kind for tensor, kind in found["tensors"].items()
                            if not tensor.endswith("weight_g_idx")}
    return found


def config(name: str) -> dict[str, Any]:
    """A model's config.json."""
    return dict(document(name)["config"])


def tensors(name: str) -> list[Tensor]:
    """All tensors of a model, in the order of their capture."""
    return list(_tensors(name))


def files(name: str, shard_bytes: int = SHARD_BYTES) -> CapturedFiles:
    """The checkpoint as it lies on a hub: config, index and safetensors files, whose weights nobody may read."""
    heads = {"config.json": json.dumps(config(name)).encode(), "tokenizer.json": b"{}"}
    tails: dict[str, int] = {}
    weight_map: dict[str, str] = {}
    parts = split(_tensors(name), shard_bytes)
    for file, part in parts.items():
        heads[file] = header(part)
        tails[file] = sum(tensor.bytes for tensor in part)
        weight_map |= dict.fromkeys((tensor.name for tensor in part), file)
    if len(parts) > 1:
        heads["model.safetensors.index.json"] = index(weight_map, sum(tails.values()))
    return CapturedFiles(heads, tails)


def converted(name: str, bits: Bits = INT4) -> Outline:
    """The checkpoint that `shoehorn convert` makes of a model: config, index and headers."""
    source = files(name)
    return Outline(source, layout(source, bits))


def machines() -> tuple[str, ...]:
    """The captured machines."""
    return tuple(sorted(path.stem for path in MACHINES.glob("*.json")))


def machine(name: str) -> Hardware:
    """A captured machine."""
    return Hardware.from_json(json.loads((MACHINES / f"{name}.json").read_text(encoding="utf-8")))


def split(tensors: Sequence[Tensor], shard_bytes: int = SHARD_BYTES) -> dict[str, list[Tensor]]:
    """Tensors by file name, in order, with at most `shard_bytes` a file unless a single tensor has more."""
    parts: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if parts[-1] and filled + tensor.bytes > shard_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(tensor)
        filled += tensor.bytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, 1)}


def header(tensors: Sequence[Tensor]) -> bytes:
    """What a safetensors file of these tensors begins with: the header's length, then the header, padded to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """model.safetensors.index.json."""
    return json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=2).encode()


@cache
def _tensors(name: str) -> tuple[Tensor, ...]:
    found = []
    for pattern, (dtype, shape) in document(name)["tensors"].items():
        size = (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8
        found += [Tensor(expanded, dtype, tuple(shape), size) for expanded in _expand(pattern)]
    return tuple(found)


def _expand(pattern: str) -> Iterator[str]:
    found = _RANGE.search(pattern)
    if not found:
        yield pattern
        return
    for number in range(int(found[1]), int(found[2]) + 1):
        yield from _expand(pattern[:found.start()] + str(number) + pattern[found.end():])
