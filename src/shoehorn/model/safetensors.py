"""A checkpoint's files: names, ranges of bytes, and the tensors that safetensors headers describe.

Rules: no weights are read, one short range per safetensors file, so that a model can be looked at on its hub; nothing
in a file is believed before it was checked: a header that lies about its length, a tensor's place or its size is a
`ModelUnavailableError` that names the file.

Format: https://github.com/huggingface/safetensors (8 bytes of header length, little endian; JSON; data).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.model.files import Files, damaged, read_json

DTYPE_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "BF16": 16, "F16": 16, "I16": 16,
              "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4}
_FIRST_READ_BYTES = 128 << 10
_MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class Tensor:
    """One tensor as its header describes it; `dtype` as in safetensors, `begin` the file's byte at which it starts."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    begin: int = 0

    @property
    def elements(self) -> int:
        """The number of stored elements."""
        return math.prod(self.shape)


def shards(files: Files, names: Mapping[str, int]) -> list[str]:
    """The safetensors files that the engine would load, in order.

    Raises:
        ModelUnavailableError: there are none, or the index names one that is not there.
    """
    index = "model.safetensors.index.json"
    if index in names:
        weight_map = read_json(files, names, index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise damaged(index, "has no weight_map")
        shards = sorted({str(shard) for shard in weight_map.values()})
        for shard in shards:
            if shard not in names:
                raise damaged(shard, f"is named by {index} but not there")
        return shards
    shards = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    shards = [name for name in shards if not name.startswith("consolidated")] or shards
    if not shards:
        raise ModelUnavailableError("The model holds no *.safetensors files, and other formats are not used.",
                                    "Choose another MODEL_ID: one whose files end in .safetensors.")
    return shards


def header(files: Files, name: str, size: int) -> list[Tensor]:
    """The tensors of one safetensors file, checked against its size."""
    start = files.read(name, 0, min(size, _FIRST_READ_BYTES))
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or not 2 <= length <= min(size - 8, _MOST_HEADER_BYTES):
        raise damaged(name, f"says that its header has {length} bytes, in a file of {size}")
    text = start[8:8 + length]
    if len(text) < length:
        text += files.read(name, 8 + len(text), length - len(text))
    try:
        header = json.loads(text.decode())
        header.pop("__metadata__", None)
        tensors = [_tensor(tensor_name, entry, 8 + length) for tensor_name, entry in header.items()]
        ends = [entry["data_offsets"][1] for entry in header.values()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(name, f"has a header that cannot be understood ({error})") from error
    data = size - 8 - length
    if max(ends, default=0) > data or sum(tensor.bytes for tensor in tensors) > data:
        raise damaged(name, "has a header that describes more data than the file holds")
    return tensors


def _tensor(name: str, entry: Mapping[str, Any], data: int) -> Tensor:
    """One entry of a header; the data start at byte `data`. Raises ValueError, KeyError or TypeError for nonsense."""
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(type(number) is int and 0 <= number < 1 << 50 for number in (*shape, begin, end)):
        raise ValueError(f"{name}: a size or place is no plain number")
    bits = DTYPE_BITS.get(entry["dtype"])  # a number format that came later is taken at its word
    if end < begin or (bits and end - begin != (math.prod(shape) * bits + 7) // 8):
        raise ValueError(f"{name}: {end - begin} bytes do not hold {entry['dtype']} of shape {list(shape)}")
    return Tensor(name, str(entry["dtype"]), shape, end - begin, data + begin)
