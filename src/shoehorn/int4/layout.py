"""What a checkpoint becomes when it is converted to INT4: config, files, tensors and their places, without the data.

Rules:
- linear layers of the decoder layers, experts too, get codes of 4 bits in groups; embedding and head as `Bits` says;
- what else there is (norms, biases, routers, vision) is copied as it is, and matrices among it are named in `ignore`;
- a shard becomes one shard of the same name; the same input gives the same bytes;
- models that would not be served so are refused by name.

Format: compressed-tensors `pack-quantized`, which unmodified vLLM 0.32.0 reads (model_executor/layers/quantization/
compressed_tensors/): the embedding is found by its class, the head by its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from shoehorn.common.errors import SettingsError
from shoehorn.model.files import Files, read_json
from shoehorn.model.safetensors import DTYPE_BITS, Tensor, header, shards
from shoehorn.model.shape import KNOWN
from shoehorn.model.tensor_names import COLUMNS, EMBEDDING, IN_LAYER, LM_HEAD

GROUPS = (128, 64, 32)
"""Weights that share a scale."""

INDEX = "model.safetensors.index.json"
_FLOATS = ("BF16", "F16", "F32")
_LINEAR = re.compile(r".*\.(?:[qkvo]_proj|qkv_proj|(?:gate|up|down|gate_up)_proj|w[123]|q_[ab]_proj|kv_a_proj_with_mqa|"
                     r"kv_b_proj)\.weight")
_BLOCK = 4096
"""Tensors of whole blocks come first and begin with one, so that they are written block by block; the others follow by
the size of their numbers, so that each stays aligned."""

_SHARED_COLUMNS = re.compile(rf".*\.{COLUMNS}\.weight")


@dataclass(frozen=True)
class Bits:
    """How many bits the embedding's and the head's weights get: 4, 8, or 16 for as they are."""

    embedding: int
    head: int


KEPT = Bits(16, 16)
"""What an engine on the CPU can serve: vLLM 0.32 there reads a quantized embedding and fails at the first request."""

BOUND = Bits(8, 8)
"""What is counted with before the errors are known that decide between 4 and 8 bits."""


@dataclass(frozen=True)
class Item:
    """One tensor of a shard and what becomes of it.

    Attributes:
        bits: 4 or 8; 16 for a copy.
        places: the byte of the new file at which each part of it starts, by the part's name.
    """

    source: Tensor
    bits: int
    places: Mapping[str, int]


@dataclass(frozen=True)
class Shard:
    """One new file: `header` is all before its data, `size` the whole."""

    name: str
    header: bytes
    size: int
    items: tuple[Item, ...]

    @property
    def source_bytes(self) -> int:
        """What is read for it."""
        return sum(item.source.bytes for item in self.items)


@dataclass(frozen=True)
class Layout:
    """A converted checkpoint.

    Attributes:
        config: the new config.json; index: the new index, None where there is one shard without.
        bits, group: as decided.
    """

    config: dict[str, Any]
    index: dict[str, Any] | None
    bits: Bits
    group: int
    shards: tuple[Shard, ...]


def layout(files: Files, bits: Bits, group: int | None = None) -> Layout:
    """Look at a checkpoint's config and headers.

    Args:
        group: one of GROUPS, or None for the largest that fits.

    Raises:
        SettingsError: it cannot be converted; says why.
        ModelUnavailableError: a file is missing, damaged or lies.
    """
    names = files.names()
    config = read_json(files, names, "config.json")
    _require_known(config)
    tensors = {name: header(files, name, names[name]) for name in shards(files, names)}
    everything = [tensor for found in tensors.values() for tensor in found]
    for tensor in everything:
        if IN_LAYER.fullmatch(tensor.name) and ".experts." in tensor.name and len(tensor.shape) > 2:
            raise SettingsError(f"QUANTIZATION=int4: {tensor.name} holds all experts of a layer in one tensor, which "
                                "is not converted.", "Set QUANTIZATION=auto, or choose a checkpoint that is quantized "
                                "already.")
    if bits.embedding != 16 and not any(LM_HEAD.fullmatch(tensor.name) for tensor in everything):
        bits = KEPT  # the head is the embedding, and stays readable for both uses
    group = group or _group(everything)
    wanted = {tensor.name: _bits(tensor, bits, group) for tensor in everything}
    if 4 not in wanted.values():
        raise SettingsError("QUANTIZATION=int4: no linear layer of this model can be divided into groups of "
                            f"{group} weights.", "Set QUANTIZATION=auto.")
    made = tuple(_shard(name, found, bits, group) for name, found in tensors.items())
    index = None
    if INDEX in names:
        places = {part: each.name for each in made for part in _parts_of(each, group)}
        index = {"metadata": {"total_size": sum(each.size - len(each.header) for each in made)},
                 "weight_map": dict(sorted(places.items()))}
    left = sorted({tensor.name.removesuffix(".weight") for tensor in everything
                   if wanted[tensor.name] == 16 and len(tensor.shape) == 2 and tensor.name.endswith(".weight")
                   and not EMBEDDING.fullmatch(tensor.name)})
    return Layout({**config, "quantization_config": _quantization(bits, group, left)}, index, bits, group, made)


def shard(files: Files, name: str, bits: Bits, group: int) -> Shard:
    """One shard of a layout: the same without a look at the others, which may be gone."""
    return _shard(name, header(files, name, files.names()[name]), bits, group)


def two_in_turn(sizes: Iterable[int]) -> int:
    """Bytes that a conversion needs beside what it replaces: a shard is verified while the next one is made."""
    return max((sum(pair) for pair in pairwise([0, *sizes])), default=0)


def kind(tensor: Tensor) -> str:
    """`embedding`, `head`, `linear`, or empty for what is copied in any case."""
    if len(tensor.shape) != 2 or tensor.dtype not in _FLOATS or not tensor.elements:
        return ""
    if EMBEDDING.fullmatch(tensor.name):
        return "embedding"
    if LM_HEAD.fullmatch(tensor.name):
        return "head"
    return "linear" if IN_LAYER.fullmatch(tensor.name) and _LINEAR.fullmatch(tensor.name) else ""


class Outline:
    """The files of a converted checkpoint that is not made yet, for planning: config, index and headers, no data."""

    def __init__(self, source: Files, made: Layout) -> None:
        self._sizes = dict(source.names())
        self._texts = {"config.json": json.dumps(made.config).encode()}
        self._texts |= {each.name: each.header for each in made.shards}
        if made.index:
            self._texts[INDEX] = json.dumps(made.index).encode()
        self._sizes |= {name: len(text) for name, text in self._texts.items()}
        self._sizes |= {each.name: each.size for each in made.shards}

    def names(self) -> Mapping[str, int]:
        """Size in bytes by file name."""
        return self._sizes

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """What is known of a file."""
        return self._texts[name][start:None if length is None else start + length]


def _require_known(config: Mapping[str, Any]) -> None:
    quantized = config.get("quantization_config") or config.get("compression_config")
    if isinstance(quantized, Mapping):
        raise SettingsError(f"QUANTIZATION=int4: the checkpoint is quantized already, by "
                            f"{quantized.get('quant_method')}.",
                            "Set QUANTIZATION=auto, or choose the model's unquantized checkpoint.")
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else "unknown"
    if name not in KNOWN:
        raise SettingsError(f"QUANTIZATION=int4: the layers of {name} are not understood.",
                            f"Set QUANTIZATION=auto, or choose a model of one of: {', '.join(sorted(KNOWN))}.")


def _bits(tensor: Tensor, bits: Bits, group: int) -> int:
    found = {"embedding": bits.embedding, "head": bits.head, "linear": 4}.get(kind(tensor), 16)
    return 16 if found != 16 and tensor.shape[1] % group else found


def _group(tensors: Iterable[Tensor]) -> int:
    """The largest group that divides every matrix that is to be converted, the largest of all where none does.

    vLLM gives each of several GPUs a share of the columns of some, and refuses a share of half a group. So 64 is taken
    before 128 where only that divides their halves; 32 is not, as its scales are a ninth of the model.
    """
    linear = [tensor for tensor in tensors if kind(tensor) == "linear"]
    whole = {tensor.shape[1] for tensor in linear}
    halves = {tensor.shape[1] / 2 for tensor in linear if _SHARED_COLUMNS.fullmatch(tensor.name)}
    for columns, groups in ((whole | halves, GROUPS[:-1]), (whole, GROUPS)):
        for group in groups:
            if not any(count % group for count in columns):
                return group
    return GROUPS[0]


def _parts(tensor: Tensor, bits: int, group: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that one becomes: number format and shape by name."""
    if bits == 16:
        return {tensor.name: (tensor.dtype, tensor.shape)}
    rows, columns = tensor.shape
    base = tensor.name.removesuffix(".weight")
    return {f"{base}.weight_packed": ("I32", (rows, columns * bits // 32)),
            f"{base}.weight_scale": ("F16" if tensor.dtype == "F16" else "BF16", (rows, columns // group)),
            f"{base}.weight_shape": ("I64", (2,))}


def _parts_of(made: Shard, group: int) -> list[str]:
    return [name for item in made.items for name in _parts(item.source, item.bits, group)]


def _shard(name: str, tensors: list[Tensor], bits: Bits, group: int) -> Shard:
    parts = [(tensor, part, dtype, shape) for tensor in tensors
             for part, (dtype, shape) in _parts(tensor, _bits(tensor, bits, group), group).items()]
    parts.sort(key=lambda entry: (bool(_bytes(entry[0], *entry[2:]) % _BLOCK), -DTYPE_BITS.get(entry[2], 8), entry[1]))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: dict[str, dict[str, int]] = {}
    end = 0
    for tensor, part, dtype, shape in parts:
        begin, end = end, end + _bytes(tensor, dtype, shape)
        entries[part] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        places.setdefault(tensor.name, {})[part] = begin
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _BLOCK)
    start = 8 + len(text)
    items = tuple(Item(tensor, _bits(tensor, bits, group),
                       {part: start + begin for part, begin in places[tensor.name].items()}) for tensor in tensors)
    return Shard(name, len(text).to_bytes(8, "little") + text, start + end, items)


def _bytes(tensor: Tensor, dtype: str, shape: tuple[int, ...]) -> int:
    if dtype == tensor.dtype and shape == tensor.shape:
        return tensor.bytes
    count = 1
    for number in shape:
        count *= number
    return count * DTYPE_BITS[dtype] // 8


def _quantization(bits: Bits, group: int, left: list[str]) -> dict[str, Any]:
    targets: dict[int, list[str]] = {4: ["Linear"]}
    if bits.head != 16:
        targets.setdefault(bits.head, []).append(r"re:.*lm_head$")
        left = [name for name in left if not LM_HEAD.fullmatch(f"{name}.weight")]
    if bits.embedding != 16:
        targets.setdefault(bits.embedding, []).append("Embedding")
    groups = {f"group_{number}": {
        "targets": found, "input_activations": None, "output_activations": None, "format": "pack-quantized",
        "weights": {"num_bits": each, "type": "int", "symmetric": True, "strategy": "group", "group_size": group,
                    "dynamic": False, "actorder": None, "observer": "mse"}}
        for number, (each, found) in enumerate(targets.items())}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": groups, "ignore": left, "kv_cache_scheme": None}
