"""Headers of safetensors files: the tensors of a checkpoint, without their data.

Rules: only a short range of each file is read, so that a model on a hub can be inspected; every header is validated:
a wrong length, offset or size is a `ModelUnavailableError` that names the file.

Format: https://github.com/huggingface/safetensors (8 bytes of header length, little endian; JSON; data).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.model.files import Files, invalid_file, read_json

DTYPE_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "BF16": 16, "F16": 16, "I16": 16,
              "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4}
_FIRST_READ_BYTES = 128 << 10
_MAX_HEADER_BYTES = 100_000_000  # limit of the safetensors library


@dataclass(frozen=True)
class Tensor:
    """One tensor of a header.

    Attributes:
        dtype: as in safetensors.
        begin: offset in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    begin: int = 0

    @property
    def elements(self) -> int:
        """Number of stored elements."""
        return math.prod(self.shape)


def shards(files: Files, names: Mapping[str, int]) -> list[str]:
    """Return the safetensors files that the engine loads, in order.

    Raises:
        ModelUnavailableError: none exists, or the index names a missing file.
    """
    index = "model.safetensors.index.json"
    if index in names:
        weight_map = read_json(files, names, index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise invalid_file(index, "weight_map missing")
        shards = sorted({str(shard) for shard in weight_map.values()})
        for shard in shards:
            if shard not in names:
                raise invalid_file(shard, f"not found, but named in {index}")
        return shards
    shards = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    shards = [name for name in shards if not name.startswith("consolidated")] or shards
    if not shards:
        raise ModelUnavailableError("Model: no *.safetensors files; other formats are unsupported.",
                                    "Choose another MODEL_ID: one whose files end in .safetensors.",
                                    code="no_safetensors")
    return shards


def header(files: Files, name: str, size: int) -> list[Tensor]:
    """Read and validate the header of one safetensors file of `size` bytes."""
    start = files.read(name, 0, min(size, _FIRST_READ_BYTES))
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
        raise invalid_file(name, f"invalid header length {length} in a file of {size} bytes")
    text = start[8:8 + length]
    if len(text) < length:
        text += files.read(name, 8 + len(text), length - len(text))
    try:
        header = json.loads(text.decode())
        header.pop("__metadata__", None)
        tensors = [_tensor(tensor_name, entry, 8 + length) for tensor_name, entry in header.items()]
        ends = [entry["data_offsets"][1] for entry in header.values()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise invalid_file(name, f"invalid header ({error})") from error
    data = size - 8 - length
    if max(ends, default=0) > data or sum(tensor.bytes for tensor in tensors) > data:
        raise invalid_file(name, "header describes more data than the file contains")
    return tensors


def _tensor(name: str, entry: Mapping[str, Any], data: int) -> Tensor:
    """Parse one entry; data start at byte `data`. Raises ValueError, KeyError or TypeError if invalid."""
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(type(number) is int and 0 <= number < 1 << 50 for number in (*shape, begin, end)):
        raise ValueError(f"{name}: a size or offset is not an integer")
    bits = DTYPE_BITS.get(entry["dtype"])  # the size of an unknown dtype cannot be checked
    if end < begin or (bits and end - begin != (math.prod(shape) * bits + 7) // 8):
        raise ValueError(f"{name}: {end - begin} bytes do not match {entry['dtype']} of shape {list(shape)}")
    return Tensor(name, str(entry["dtype"]), shape, end - begin, data + begin)
