"""A checkpoint's `config.json` and safetensors headers -> `ModelShape`: true bytes per tensor, never the model's name.

Rules:
- no weights are read: one short range per safetensors file, so that a model can be looked at on its hub;
- nothing in a file is believed before it was checked: a header that lies about its length, a tensor's place or its
  size is a `ModelUnavailableError` that names the file;
- what is not understood is said in `notes` and counted as resident and unquantized, which is the safe side.

Format: https://github.com/huggingface/safetensors (8 bytes of header length, little endian; JSON; data).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shoehorn.errors import ModelUnavailableError

DENSE = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
"""Architectures whose layers are plain attention and one MLP, all of it linear layers that can be quantized."""

DTYPE_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "BF16": 16, "F16": 16, "I16": 16,
              "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4}
_FIRST_READ_BYTES = 128 << 10
_MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MOST_JSON_BYTES = 64 << 20
_NOT_STORED = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")

_IN_LAYER = re.compile(r"(?:model\.|language_model\.|transformer\.)*(?:layers|h)\.(\d+)\.(.+)")
_EMBEDDING = re.compile(r"(?:model\.|language_model\.|transformer\.)*(?:embed_tokens|wte|tok_embeddings)\.\w+")
_LM_HEAD = re.compile(r"(?:language_model\.)?lm_head\.\w+")
_BNB_STATE = re.compile(r".*\.weight\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*)|.*\.SCB")
_PACKED = re.compile(r".*\.(qweight|qzeros|scales|g_idx|weight_packed|weight_shape|weight_scale(_inv)?|"
                     r"weight_zero_point|input_scale)")


class Files(Protocol):
    """A checkpoint's files, wherever they lie."""

    def names(self) -> Mapping[str, int]:
        """Size in bytes by file name."""

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Up to `length` bytes from `start`; all when None."""


class LocalFiles:
    """The files of a folder, without its subfolders."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def names(self) -> Mapping[str, int]:
        """Size in bytes by file name.

        Raises:
            ModelUnavailableError: the folder cannot be listed.
        """
        try:
            return {path.name: path.stat().st_size for path in sorted(self._directory.iterdir()) if path.is_file()}
        except OSError as error:
            raise ModelUnavailableError(f"The model's folder {self._directory} cannot be read: {error.strerror}.",
                                        "Set MODEL_ID to a folder with config.json and *.safetensors.") from error

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Up to `length` bytes from `start`; all when None.

        Raises:
            ModelUnavailableError: the file cannot be read.
        """
        try:
            with (self._directory / name).open("rb") as file:
                file.seek(start)
                return file.read(-1 if length is None else length)
        except OSError as error:
            raise _damaged(name, f"cannot be read ({error.strerror})") from error


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of one kind: their bytes in the checkpoint, and their elements as stored (packed ones count packed)."""

    bytes: int = 0
    parameters: int = 0


@dataclass(frozen=True)
class TensorBytes:
    """Every tensor in exactly one group.

    Attributes:
        linears: linear layers of the decoder layers, with the scales and zeros of packed formats.
        quant_state: bitsandbytes' own state; `parameters` counts the absmax entries alone.
        other: norms, biases, experts, vision, and whatever else.
    """

    embedding: TensorGroup = TensorGroup()
    lm_head: TensorGroup = TensorGroup()
    linears: TensorGroup = TensorGroup()
    quant_state: TensorGroup = TensorGroup()
    other: TensorGroup = TensorGroup()


@dataclass(frozen=True)
class ModelShape:
    """What planning needs to know of a model.

    Attributes:
        max_position: the longest context, rotary scaling counted as the engine does.
        dtype: the checkpoint's number format, as `bfloat16`.
        tied_embeddings: the output head is the embedding, so no second one is held.
        quantization: the checkpoint's `quantization_config.quant_method`; None where it is not quantized.
        weights_bytes: all tensors; disk_bytes: all files that are kept.
        notes: what was not understood, in words.
    """

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_position: int
    dtype: str
    tied_embeddings: bool
    quantization: str | None
    tensor_bytes: TensorBytes
    weights_bytes: int
    disk_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tensor:
    """One tensor as its header describes it; `dtype` as in safetensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def elements(self) -> int:
        """The number of stored elements."""
        return math.prod(self.shape)


def read(files: Files) -> ModelShape:
    """Look at a checkpoint.

    Raises:
        ModelUnavailableError: a file is missing, damaged or lies; it names the file.
    """
    names = files.names()
    config = _json(files, names, "config.json")
    weights = shards(files, names)
    tensors = [tensor for name in weights for tensor in _header(files, name, names[name])]
    disk = sum(size for name, size in names.items()
               if name in weights or (not name.endswith((*_NOT_STORED, ".safetensors")) and "/" not in name))
    return shape_of(config, tensors, disk)


def shape_of(config: Mapping[str, Any], tensors: Iterable[Tensor], disk_bytes: int) -> ModelShape:
    """The shape that a config and tensors describe.

    Raises:
        ModelUnavailableError: config.json lacks what no plan can do without.
    """
    notes: list[str] = []
    tensors = list(tensors)
    text = _section(config, "text_config") or config
    if text is not config:
        notes.append("the model takes more than text; only its language part is understood")
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else "unknown"
    layers, hidden, heads = (_count(text, key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    embedding = next((tensor for tensor in tensors if _EMBEDDING.fullmatch(tensor.name)), None)
    groups = _group(tensors, layers, notes)
    dtype = text.get("torch_dtype") or text.get("dtype") or config.get("torch_dtype") or config.get("dtype")
    if not isinstance(dtype, str):
        dtype = {"F16": "float16", "F32": "float32"}.get(embedding.dtype if embedding else "", "bfloat16")
    quantized = _section(config, "quantization_config") or _section(config, "compression_config")
    quantization = quantized.get("quant_method")
    if architecture not in DENSE:
        notes.append(f"{architecture} is not one of {', '.join(sorted(DENSE))}: its layers are counted as dense ones "
                     "with full attention, and what is no plain linear layer as resident and unquantized")
    if text.get("sliding_window") and text.get("use_sliding_window", True):
        notes.append("the sliding window is not used: the KV cache is counted at full length")
    if text.get("kv_lora_rank"):
        notes.append("the compressed KV cache (MLA) is not understood: it is counted uncompressed")
    if quantized.get("load_in_8bit"):
        notes.append("8-bit bitsandbytes is not understood: its state is counted as stored")
    return ModelShape(
        architecture=architecture, layers=layers, hidden=hidden, heads=heads,
        intermediate=_count(text, "intermediate_size", 4 * hidden, notes),
        kv_heads=_count(text, "num_key_value_heads", heads), head_dim=_count(text, "head_dim", hidden // heads),
        vocab=_count(text, "vocab_size", embedding.shape[0] if embedding and embedding.shape else 0,
                     notes),
        max_position=_max_position(text, notes), dtype=dtype.removeprefix("torch."),
        tied_embeddings=not groups.lm_head.bytes or bool(
            text.get("tie_word_embeddings", config.get("tie_word_embeddings"))),
        quantization=str(quantization) if quantization else None, tensor_bytes=groups,
        weights_bytes=sum(tensor.bytes for tensor in tensors), disk_bytes=disk_bytes, notes=tuple(notes))


def _group(tensors: Iterable[Tensor], layers: int, notes: list[str]) -> TensorBytes:
    groups: dict[str, list[tuple[int, int]]] = {
        name: [] for name in ("embedding", "lm_head", "linears", "quant_state", "other")}
    seen: set[int] = set()
    for tensor in tensors:
        name, elements = tensor.name, tensor.elements
        layer = _IN_LAYER.fullmatch(name)
        if layer:
            seen.add(int(layer[1]))
        if _BNB_STATE.fullmatch(name):
            kind, elements = "quant_state", elements if name.endswith(".weight.absmax") else 0
        elif _EMBEDDING.fullmatch(name):
            kind = "embedding"
        elif _LM_HEAD.fullmatch(name):
            kind = "lm_head"
        elif layer and ".experts." not in name and (len(tensor.shape) == 2 or _PACKED.fullmatch(name)):
            kind = "linears"
        else:
            kind = "other"
        groups[kind].append((tensor.bytes, elements))
    if len(seen) != layers:
        notes.append(f"config.json names {layers} layers, the weights hold {len(seen)}")
    return TensorBytes(**{kind: TensorGroup(sum(size for size, _ in found), sum(number for _, number in found))
                          for kind, found in groups.items()})


def _max_position(text: Mapping[str, Any], notes: list[str]) -> int:
    """As vLLM 0.32.0 derives it (vllm/config/model.py, _get_and_verify_max_len)."""
    longest = _count(text, "max_position_embeddings", 2048, notes)
    rope = _section(text, "rope_scaling") or _section(text, "rope_parameters")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"):
        return longest
    factor = rope.get("factor") or 1.0
    return int(longest * factor) if isinstance(factor, int | float) and factor >= 1 else longest


def _section(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object within an object; empty where there is none."""
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def _count(text: Mapping[str, Any], key: str, default: int | None = None, notes: list[str] | None = None) -> int:
    """A positive integer of config.json; the default, noted where `notes` is given, when it is absent."""
    value = text.get(key)
    if value is None and default:
        if notes is not None:
            notes.append(f"config.json lacks {key}: {default} is assumed")
        return default
    if type(value) is not int or not 0 < value < 1 << 40:
        raise _damaged("config.json", f"gives {key} as {value!r}, not as a positive whole number")
    return value


def shards(files: Files, names: Mapping[str, int]) -> list[str]:
    """The safetensors files that the engine would load, in order.

    Raises:
        ModelUnavailableError: there are none, or the index names one that is not there.
    """
    index = "model.safetensors.index.json"
    if index in names:
        weight_map = _json(files, names, index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise _damaged(index, "has no weight_map")
        shards = sorted({str(shard) for shard in weight_map.values()})
        for shard in shards:
            if shard not in names:
                raise _damaged(shard, f"is named by {index} but not there")
        return shards
    shards = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    shards = [name for name in shards if not name.startswith("consolidated")] or shards
    if not shards:
        raise ModelUnavailableError("The model holds no *.safetensors files, and other formats are not used.",
                                    "Choose another MODEL_ID: one whose files end in .safetensors.")
    return shards


def _header(files: Files, name: str, size: int) -> list[Tensor]:
    """The tensors of one safetensors file, checked against its size."""
    start = files.read(name, 0, min(size, _FIRST_READ_BYTES))
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or not 2 <= length <= min(size - 8, _MOST_HEADER_BYTES):
        raise _damaged(name, f"says that its header has {length} bytes, in a file of {size}")
    text = start[8:8 + length]
    if len(text) < length:
        text += files.read(name, 8 + len(text), length - len(text))
    try:
        header = json.loads(text.decode())
        header.pop("__metadata__", None)
        tensors = [_tensor(tensor_name, entry) for tensor_name, entry in header.items()]
        ends = [entry["data_offsets"][1] for entry in header.values()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(name, f"has a header that cannot be understood ({error})") from error
    data = size - 8 - length
    if max(ends, default=0) > data or sum(tensor.bytes for tensor in tensors) > data:
        raise _damaged(name, "has a header that describes more data than the file holds")
    return tensors


def _tensor(name: str, entry: Mapping[str, Any]) -> Tensor:
    """One entry of a header. Raises ValueError, KeyError or TypeError where it makes no sense."""
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(type(number) is int and 0 <= number < 1 << 50 for number in (*shape, begin, end)):
        raise ValueError(f"{name}: a size or place is no plain number")
    bits = DTYPE_BITS.get(entry["dtype"])  # a number format that came later is taken at its word
    if end < begin or (bits and end - begin != (math.prod(shape) * bits + 7) // 8):
        raise ValueError(f"{name}: {end - begin} bytes do not hold {entry['dtype']} of shape {list(shape)}")
    return Tensor(name, str(entry["dtype"]), shape, end - begin)


def _json(files: Files, names: Mapping[str, int], name: str) -> dict[str, Any]:
    if name not in names:
        raise _damaged(name, "is not there")
    if names[name] > _MOST_JSON_BYTES:
        raise _damaged(name, f"has {names[name]} bytes, too many for what it should be")
    try:
        document = json.loads(files.read(name).decode())
    except (ValueError, RecursionError) as error:
        raise _damaged(name, f"is no JSON ({error})") from error
    if not isinstance(document, dict):
        raise _damaged(name, "holds no JSON object")
    return document


def _damaged(name: str, what: str) -> ModelUnavailableError:
    return ModelUnavailableError(f"The model's file {name} {what}.",
                                 "Run `shoehorn pull` again, or choose another MODEL_ID or MODEL_REVISION.")
