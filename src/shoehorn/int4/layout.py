"""Layout of an INT4 conversion: config, files, tensors and their offsets, without data.

Rules:
- linear layers of the decoder layers, including experts, get 4 bits in groups; embedding and head as in `BitWidths`;
- all other tensors (norms, biases, routers, vision) are copied; matrices among them are listed in `ignore`;
- each shard is converted to one shard of the same name; the same input results in the same bytes;
- an unsupported model is an error that names the reason.

Format: compressed-tensors `pack-quantized`, which unmodified vLLM 0.32.0 reads (model_executor/layers/quantization/
compressed_tensors/): it matches the embedding by class and the head by name.
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
from shoehorn.model.shape import PLAIN
from shoehorn.model.tensor_names import COLUMNS, EMBEDDING, IN_LAYER, LM_HEAD

GROUPS = (128, 64, 32)
"""Weights that share a scale."""

INDEX = "model.safetensors.index.json"
CALIBRATION_FOLDER = "calibration"
"""Folder in that of a conversion with the state of an unfinished calibration."""

_FLOATS = ("BF16", "F16", "F32")
_LINEAR = re.compile(r".*\.(?:[qkvo]_proj|qkv_proj|(?:gate|up|down|gate_up)_proj|w[123]|q_[ab]_proj|kv_a_proj_with_mqa|"
                     r"kv_b_proj)\.weight")
_BLOCK = 4096
"""Tensors of complete blocks come first, aligned to blocks, so that they are written block by block; the others follow
by the size of their elements, so that each is aligned."""

_SHARED_COLUMNS = re.compile(rf".*\.{COLUMNS}\.weight")


@dataclass(frozen=True)
class BitWidths:
    """BitWidths of the weights of embedding and head: 4, 8, or 16 for unquantized."""

    embedding: int
    head: int


UNQUANTIZED = BitWidths(16, 16)
"""Required on the CPU: vLLM 0.32 loads a quantized embedding there and fails at the first request."""

MAX_BIT_WIDTHS = BitWidths(8, 8)
"""Assumed for estimates before the quantization error decides between 4 and 8 bits."""


@dataclass(frozen=True)
class TensorLayout:
    """One tensor of a shard, or some of its rows, and its position in the converted shard.

    Attributes:
        source: the tensor in the original.
        bits: 4 or 8; 16 for a copy.
        offsets: first byte of each part in the converted shard, by name of the part.
    """

    source: Tensor
    bits: int
    offsets: Mapping[str, int]


@dataclass(frozen=True)
class ShardLayout:
    """One converted shard.

    Attributes:
        header: all bytes before the data.
        size: of the file in bytes.
    """

    name: str
    header: bytes
    size: int
    tensors: tuple[TensorLayout, ...]

    @property
    def source_bytes(self) -> int:
        """Bytes of the original tensors."""
        return sum(item.source.bytes for item in self.tensors)


@dataclass(frozen=True)
class Layout:
    """A converted checkpoint.

    Attributes:
        config: the new config.json.
        index: the new index; None if the checkpoint has none.
        group: weights that share a scale.
    """

    config: dict[str, Any]
    index: dict[str, Any] | None
    bits: BitWidths
    group: int
    shards: tuple[ShardLayout, ...]


def layout(files: Files, bits: BitWidths, group: int | None = None) -> Layout:
    """Derive the layout from config and headers.

    Args:
        group: one of GROUPS, or None for the largest that divides all matrices.

    Raises:
        SettingsError: the model cannot be converted; gives the reason.
        ModelUnavailableError: a file is missing or damaged.
    """
    names = files.names()
    config = read_json(files, names, "config.json")
    _require_supported(config)
    tensors = {name: header(files, name, names[name]) for name in shards(files, names)}
    all_tensors = [tensor for each in tensors.values() for tensor in each]
    for tensor in all_tensors:
        if IN_LAYER.fullmatch(tensor.name) and ".experts." in tensor.name and len(tensor.shape) > 2:
            raise SettingsError(f"QUANTIZATION=int4: unsupported tensor {tensor.name}: all experts of a layer.",
                                "Set QUANTIZATION=auto, or choose a quantized checkpoint.",
                                code="int4_unsupported_tensor")
    if bits.embedding != 16 and not any(LM_HEAD.fullmatch(tensor.name) for tensor in all_tensors):
        bits = UNQUANTIZED  # the head shares the weights of the embedding
    group = group or _group(all_tensors)
    bits_of = {tensor.name: _bits(tensor, bits, group) for tensor in all_tensors}
    if 4 not in bits_of.values():
        raise SettingsError(f"QUANTIZATION=int4: groups of {group} weights divide no linear layer of this model.",
                            "Set QUANTIZATION=auto.", code="int4_no_linear_layer")
    converted = tuple(_shard(name, each, bits, group) for name, each in tensors.items())
    index = None
    if INDEX in names:
        weight_map = {part: each.name for each in converted for part in _part_names(each, group)}
        index = {"metadata": {"total_size": sum(each.size - len(each.header) for each in converted)},
                 "weight_map": dict(sorted(weight_map.items()))}
    ignore = sorted({tensor.name.removesuffix(".weight") for tensor in all_tensors
                     if bits_of[tensor.name] == 16 and len(tensor.shape) == 2 and tensor.name.endswith(".weight")
                     and not EMBEDDING.fullmatch(tensor.name)})
    return Layout({**config, "quantization_config": _quantization(bits, group, ignore)}, index, bits, group, converted)


def shard(files: Files, name: str, bits: BitWidths, group: int) -> ShardLayout:
    """Derive the layout of one shard without the others, which may have been deleted."""
    return _shard(name, header(files, name, files.names()[name]), bits, group)


def peak_pair_bytes(sizes: Iterable[int]) -> int:
    """Return the largest sum of two consecutive sizes: a shard is verified while the next one is written."""
    return max((sum(pair) for pair in pairwise([0, *sizes])), default=0)


def kind(tensor: Tensor) -> str:
    """Return `embedding`, `head`, `linear`, or "" for tensors that are always copied."""
    if len(tensor.shape) != 2 or tensor.dtype not in _FLOATS or not tensor.elements:
        return ""
    if EMBEDDING.fullmatch(tensor.name):
        return "embedding"
    if LM_HEAD.fullmatch(tensor.name):
        return "head"
    return "linear" if IN_LAYER.fullmatch(tensor.name) and _LINEAR.fullmatch(tensor.name) else ""


class PlannedFiles:
    """The files of a planned conversion: config, index and headers, no data."""

    def __init__(self, source: Files, plan: Layout) -> None:
        self._sizes = dict(source.names())
        self._texts = {"config.json": json.dumps(plan.config).encode()}
        self._texts |= {each.name: each.header for each in plan.shards}
        if plan.index:
            self._texts[INDEX] = json.dumps(plan.index).encode()
        self._sizes |= {name: len(text) for name, text in self._texts.items()}
        self._sizes |= {each.name: each.size for each in plan.shards}

    def names(self) -> Mapping[str, int]:
        """Return the size in bytes by file name."""
        return self._sizes

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Read from the planned part of a file."""
        return self._texts[name][start:None if length is None else start + length]


def _require_supported(config: Mapping[str, Any]) -> None:
    quantized = config.get("quantization_config") or config.get("compression_config")
    if isinstance(quantized, Mapping):
        method = quantized.get("quant_method")
        raise SettingsError(f"QUANTIZATION=int4: the checkpoint is already quantized ({method}).",
                            "Set QUANTIZATION=auto, or choose the model's unquantized checkpoint.",
                            code="int4_already_quantized")
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else "unknown"
    if name not in PLAIN:
        raise SettingsError(f"QUANTIZATION=int4: unsupported architecture {name}.",
                            f"Set QUANTIZATION=auto, or choose a model of one of: {', '.join(sorted(PLAIN))}.",
                            code="int4_unsupported_architecture")


def _bits(tensor: Tensor, bits: BitWidths, group: int) -> int:
    width = {"embedding": bits.embedding, "head": bits.head, "linear": 4}.get(kind(tensor), 16)
    return 16 if width != 16 and tensor.shape[1] % group else width


def _group(tensors: Iterable[Tensor]) -> int:
    """Return the largest group that divides every converted matrix; the largest of GROUPS if none does.

    vLLM divides the columns of some matrices over GPUs and rejects partial groups. So 64 is preferred to 128 if only 64
    divides their halves; 32 is not, since its scales are a ninth of the model.
    """
    linear = [tensor for tensor in tensors if kind(tensor) == "linear"]
    columns = {tensor.shape[1] for tensor in linear}
    halves = {tensor.shape[1] / 2 for tensor in linear if _SHARED_COLUMNS.fullmatch(tensor.name)}
    for counts, groups in ((columns | halves, GROUPS[:-1]), (columns, GROUPS)):
        for group in groups:
            if not any(count % group for count in counts):
                return group
    return GROUPS[0]


def _parts(tensor: Tensor, bits: int, group: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of the converted tensors, by name."""
    if bits == 16:
        return {tensor.name: (tensor.dtype, tensor.shape)}
    rows, columns = tensor.shape
    base = tensor.name.removesuffix(".weight")
    return {f"{base}.weight_packed": ("I32", (rows, columns * bits // 32)),
            f"{base}.weight_scale": ("F16" if tensor.dtype == "F16" else "BF16", (rows, columns // group)),
            f"{base}.weight_shape": ("I64", (2,))}


def _part_names(converted: ShardLayout, group: int) -> list[str]:
    return [name for item in converted.tensors for name in _parts(item.source, item.bits, group)]


def _shard(name: str, tensors: list[Tensor], bits: BitWidths, group: int) -> ShardLayout:
    parts = [(tensor, part, dtype, shape) for tensor in tensors
             for part, (dtype, shape) in _parts(tensor, _bits(tensor, bits, group), group).items()]
    parts.sort(key=lambda entry: (bool(_bytes(entry[0], *entry[2:]) % _BLOCK), -DTYPE_BITS.get(entry[2], 8), entry[1]))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, dict[str, int]] = {}
    end = 0
    for tensor, part, dtype, shape in parts:
        begin, end = end, end + _bytes(tensor, dtype, shape)
        entries[part] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        offsets.setdefault(tensor.name, {})[part] = begin
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _BLOCK)
    start = 8 + len(text)
    layouts = tuple(TensorLayout(tensor, _bits(tensor, bits, group),
                       {part: start + begin for part, begin in offsets[tensor.name].items()}) for tensor in tensors)
    return ShardLayout(name, len(text).to_bytes(8, "little") + text, start + end, layouts)


def _bytes(tensor: Tensor, dtype: str, shape: tuple[int, ...]) -> int:
    if dtype == tensor.dtype and shape == tensor.shape:
        return tensor.bytes
    count = 1
    for number in shape:
        count *= number
    return count * DTYPE_BITS[dtype] // 8


def _quantization(bits: BitWidths, group: int, ignore: list[str]) -> dict[str, Any]:
    targets: dict[int, list[str]] = {4: ["Linear"]}
    if bits.head != 16:
        targets.setdefault(bits.head, []).append(r"re:.*lm_head$")
        ignore = [name for name in ignore if not LM_HEAD.fullmatch(f"{name}.weight")]
    if bits.embedding != 16:
        targets.setdefault(bits.embedding, []).append("Embedding")
    groups = {f"group_{number}": {
        "targets": names, "input_activations": None, "output_activations": None, "format": "pack-quantized",
        "weights": {"num_bits": each, "type": "int", "symmetric": True, "strategy": "group", "group_size": group,
                    "dynamic": False, "actorder": None, "observer": "mse"}}
        for number, (each, names) in enumerate(targets.items())}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": groups, "ignore": ignore, "kv_cache_scheme": None}
