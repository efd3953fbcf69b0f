"""Captured models and machines: real configs, tensor names, shapes and sizes of public models, without weights.

A model is one file of tests/captures/models: `source` (origin), `total_size` (published bytes of all tensors; null if
unknown), `files_size` (of all files, including headers), `config` (config.json) and `tensors`: name -> [dtype, shape],
where `{a-b}` in a name means every number from a to b.
A name that is not captured is one of tests/captures/oracle, whose tensors were derived (tests/contract/oracle).
NAME@unordered is the model NAME without activation order, which the engine does not support.
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
from shoehorn.int4.layout import BitWidths, PlannedFiles, layout
from shoehorn.model import checkpoint
from shoehorn.model.safetensors import DTYPE_BITS, Tensor
from shoehorn.model.shape import ModelShape

CAPTURES = Path(__file__).resolve().parents[1] / "captures"
MODELS, MACHINES = CAPTURES / "models", CAPTURES / "machines"
SHARD_BYTES = 5_000_000_000
"""Maximum bytes of tensors in a file, as in transformers' save_pretrained."""

INT4 = BitWidths(4, 4)
"""Including embedding and head."""

_RANGE = re.compile(r"\{(\d+)-(\d+)\}")
_READ_AHEAD_BYTES = 128 << 10


class CapturedFiles:
    """Files in memory: headers and sizes. Reading weights fails the test.

    `reads` keeps name and bytes of every read, so that a test can count what a plan moves.
    """

    def __init__(self, heads: Mapping[str, bytes], tails: Mapping[str, int]) -> None:
        self._heads = dict(heads)
        self._tails = dict(tails)
        self.reads: list[tuple[str, int]] = []

    def names(self) -> Mapping[str, int]:
        """Return the size in bytes by file name."""
        return {name: len(head) + self._tails.get(name, 0) for name, head in self._heads.items()}

    def head(self, name: str) -> bytes:
        """Return the bytes before the weights."""
        return self._heads[name]

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Read up to `length` bytes from `start`, all if None; weights within the first read are zeros."""
        head = self._heads[name]
        size = len(head) + self._tails.get(name, 0)
        end = size if length is None else min(size, start + length)
        assert end - len(head) <= _READ_AHEAD_BYTES, f"weights of {name} were read"
        self.reads.append((name, end - start))
        return head[start:end] + bytes(max(0, end - max(start, len(head))))


def names() -> tuple[str, ...]:
    """Return the names of the captured models."""
    return tuple(sorted(path.stem for path in MODELS.glob("*.json")))


def document(name: str) -> dict[str, Any]:
    """Return the capture of a model or variant."""
    stored, _, variant = name.partition("@")
    path = MODELS / f"{stored}.json"
    path = path if path.exists() else CAPTURES / "oracle" / path.name
    expanded = dict(json.loads(path.read_text(encoding="utf-8")))
    if variant:
        assert variant == "unordered"
        quantized = expanded["config"]["quantization_config"]
        if "desc_act" in quantized:
            quantized["desc_act"] = False
        for group in quantized.get("config_groups", {}).values():
            group["weights"]["actorder"] = None
        expanded["tensors"] = {tensor: kind for tensor, kind in expanded["tensors"].items()
                            if not tensor.endswith("weight_g_idx")}
    return expanded


def config(name: str) -> dict[str, Any]:
    """Return the config.json of a model."""
    return dict(document(name)["config"])


def tensors(name: str) -> list[Tensor]:
    """Return all tensors of a model, in captured order."""
    return list(_tensors(name))


def files(name: str, shard_bytes: int = SHARD_BYTES) -> CapturedFiles:
    """Return a checkpoint as on a hub: config, index and safetensors files without readable weights."""
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


def converted(name: str, bits: BitWidths = INT4) -> PlannedFiles:
    """Return the planned INT4 conversion of a model: config, index and headers."""
    source = files(name)
    return PlannedFiles(source, layout(source, bits))


@cache
def shape(name: str) -> ModelShape:
    """Return the shape of a model; of its planned INT4 conversion for NAME@int4."""
    model = name.removesuffix("@int4")
    return checkpoint.read(files(name) if model == name else converted(model))


def machines() -> tuple[str, ...]:
    """Return the names of the captured machines."""
    return tuple(sorted(path.stem for path in MACHINES.glob("*.json")))


def machine(name: str) -> Hardware:
    """Return a captured machine."""
    return Hardware.from_json(json.loads((MACHINES / f"{name}.json").read_text(encoding="utf-8")))


def split(tensors: Sequence[Tensor], shard_bytes: int = SHARD_BYTES) -> dict[str, list[Tensor]]:
    """Distribute tensors over files, in order, at most `shard_bytes` each unless a tensor is larger."""
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
    """Return the begin of a safetensors file: length of the header, then the header, padded to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """Return model.safetensors.index.json."""
    return json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=2).encode()


@cache
def _tensors(name: str) -> tuple[Tensor, ...]:
    tensors = []
    for pattern, (dtype, shape) in document(name)["tensors"].items():
        size = (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8
        tensors += [Tensor(name, dtype, tuple(shape), size) for name in _expand(pattern)]
    return tuple(tensors)


def _expand(pattern: str) -> Iterator[str]:
    span = _RANGE.search(pattern)
    if not span:
        yield pattern
        return
    for number in range(int(span[1]), int(span[2]) + 1):
        yield from _expand(pattern[:span.start()] + str(number) + pattern[span.end():])
