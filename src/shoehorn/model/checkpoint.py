"""A checkpoint's `config.json` and safetensors headers -> `ModelShape`: true bytes per tensor, never the model's name.

Rules: every tensor counts in exactly one group; what the engine does with attention, experts and compressed caches is
read from the config's own keys; what is not understood is said in `notes` and counted as resident, unquantized and at
full length, which is the safe side.

Sources: config classes of transformers, and the models and kv_cache_interface.py of vLLM 0.32.0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from shoehorn.model.files import Files, damaged, read_json
from shoehorn.model.safetensors import Tensor, header, shards
from shoehorn.model.shape import KNOWN, Experts, KvLayers, ModelShape, TensorBytes, TensorGroup
from shoehorn.model.tensor_names import (
    BNB_STATE,
    COLUMN_SCALES,
    EMBEDDING,
    EMBEDDING_PACKED,
    EXPERTS,
    IN_LAYER,
    LM_HEAD,
    PACKED,
)

_NOT_STORED = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


def read(files: Files) -> ModelShape:
    """Look at a checkpoint.

    Raises:
        ModelUnavailableError: a file is missing, damaged or lies; it names the file.
    """
    names = files.names()
    config = read_json(files, names, "config.json")
    weights = shards(files, names)
    tensors = [tensor for name in weights for tensor in header(files, name, names[name])]
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
        notes.append("the model takes more than text; what its other parts need while they work is not estimated")
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else "unknown"
    layers, hidden, heads = (_count(text, key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    embedding = next((tensor for tensor in tensors if EMBEDDING.fullmatch(tensor.name)), None)
    groups = _group(tensors, layers, notes)
    quantized = _section(config, "quantization_config") or _section(config, "compression_config")
    quantization = quantized.get("quant_method")
    if architecture not in KNOWN:
        notes.append(f"{architecture} is none of the known architectures: what is no plain linear layer or expert is "
                     "counted as resident and unquantized, and its activations with half as much again")
    if quantized.get("load_in_8bit"):
        notes.append("8-bit bitsandbytes is not understood: its state is counted as stored")
    kv_heads = _count(text, "num_key_value_heads", heads)
    head_dim = _count(text, "head_dim", _head_dim(tensors, kv_heads) or hidden // heads)
    latent = _count(text, "kv_lora_rank", 0)
    return ModelShape(
        architecture=architecture, layers=layers, hidden=hidden, heads=heads,
        intermediate=_count(text, "intermediate_size", 4 * hidden, notes), kv_heads=kv_heads,
        head_dim=_count(text, "qk_rope_head_dim", 64) if latent else head_dim,
        vocab=_count(text, "vocab_size", embedding.shape[0] if embedding and embedding.shape else None),
        max_position=_max_position(text, notes), rotary_positions=_rotary_positions(text),
        dtype=_dtype(config, text, embedding),
        tied_embeddings=not groups.lm_head.bytes or bool(
            text.get("tie_word_embeddings", config.get("tie_word_embeddings"))),
        quantization=str(quantization) if quantization else None,
        kv_layers=_kv_layers(text, layers, kv_heads, head_dim, latent, notes), tensor_bytes=groups,
        weights_bytes=sum(tensor.bytes for tensor in tensors), disk_bytes=disk_bytes, experts=_experts(text, groups),
        absorbed_parameters=layers * latent * heads * (_count(text, "qk_nope_head_dim", 128)
                                                       + _count(text, "v_head_dim", 128)) if latent else 0,
        notes=tuple(notes), unreadable=_unreadable(quantized),
        packed_embedding=any(EMBEDDING_PACKED.fullmatch(tensor.name) for tensor in tensors),
        column_groups=_column_groups(tensors))


def _column_groups(tensors: list[Tensor]) -> int:
    """The greatest common divisor of the numbers of groups in matrices that several GPUs divide by their columns.

    A group of weights shares a scale, and the engine refuses to divide one; rows may have one scale each, which
    nobody divides. Source: vllm/model_executor/kernels/linear/mixed_precision/marlin.py, can_implement.
    """
    scales = [(tensor.shape, found[1]) for tensor in tensors
              if len(tensor.shape) == 2 and (found := COLUMN_SCALES.fullmatch(tensor.name))]
    return math.gcd(*(groups for groups in (shape[0 if kind == "scales" else 1] for shape, kind in scales)
                      if groups > 1))


def _unreadable(quantized: Mapping[str, Any]) -> str:
    """Why vLLM 0.32 refuses a quantized checkpoint, although it knows the method; empty where it takes it.

    Source: vllm/model_executor/layers/quantization/utils/gptq_utils.py and compressed_tensors/compressed_tensors.py.
    """
    method = quantized.get("quant_method")
    rules = quantized.get("dynamic")
    for rule in (quantized, *(rules.values() if isinstance(rules, Mapping) else ())):
        if method == "gptq" and isinstance(rule, Mapping) and rule.get("desc_act", quantized.get("desc_act")) and \
                rule.get("group_size", quantized.get("group_size")) != -1:
            return "GPTQ with activation order (desc_act: true in its quantization_config)"
    for group in _section(quantized, "config_groups").values():
        order = _section(group, "weights").get("actorder") if isinstance(group, Mapping) else None
        if method == "compressed-tensors" and order in ("group", "dynamic", True):
            return f"quantized with activation order (actorder: {order} in its quantization_config)"
    return ""


def _group(tensors: Iterable[Tensor], layers: int, notes: list[str]) -> TensorBytes:
    groups: dict[str, list[tuple[int, int]]] = {name: [] for name in TensorBytes.__dataclass_fields__}
    seen: set[int] = set()
    for tensor in tensors:
        name, elements = tensor.name, tensor.elements
        layer = IN_LAYER.fullmatch(name)
        if layer:
            seen.add(int(layer[1]))
        if layer and int(layer[1]) >= layers:
            kind = "unused"
        elif BNB_STATE.fullmatch(name):
            kind, elements = "quant_state", elements if name.endswith(".weight.absmax") else 0
        elif EMBEDDING.fullmatch(name):
            kind = "embedding"
        elif LM_HEAD.fullmatch(name):
            kind = "lm_head"
        elif layer and EXPERTS.fullmatch(name):
            kind = "experts"
        elif layer and (len(tensor.shape) == 2 or PACKED.fullmatch(name)):
            kind = "linears"
        else:
            kind = "other"
        groups[kind].append((tensor.bytes, elements))
    if len(seen) < layers:
        notes.append(f"config.json names {layers} layers, the weights hold {len(seen)}")
    return TensorBytes(**{kind: TensorGroup(sum(size for size, _ in found), sum(number for _, number in found))
                          for kind, found in groups.items()})


def _kv_layers(text: Mapping[str, Any], layers: int, kv_heads: int, head_dim: int, latent: int,
               notes: list[str]) -> tuple[KvLayers, ...]:
    """The KV cache of all layers, by kind, those that keep everything first."""
    if latent:
        return (KvLayers(layers, 1, latent + _count(text, "qk_rope_head_dim", 64), latent=True),)
    width = 2 * head_dim
    window = text.get("sliding_window")
    if type(window) is not int or window <= 0 or not text.get("use_sliding_window", True):
        window = 0
    kinds = Counter(_windowed(text, layers, bool(window), notes))
    found = [KvLayers(kinds[False], kv_heads, width)] if kinds[False] else []
    return (*found, KvLayers(kinds[True], kv_heads, width, window)) if kinds[True] else tuple(found)


def _windowed(text: Mapping[str, Any], layers: int, has_window: bool, notes: list[str]) -> list[bool]:
    """Which layers keep a window only, as the models of vLLM decide it."""
    types = text.get("layer_types")
    if isinstance(types, list) and len(types) == layers:
        strange = set(map(str, types)) - {"full_attention", "sliding_attention"}
        if strange:
            notes.append(f"layers of type {', '.join(sorted(strange))} are not understood: their cache is counted as "
                         "that of full attention")
        return [has_window and kind == "sliding_attention" for kind in types]
    if not has_window:
        return [False] * layers
    kind = str(text.get("model_type", ""))
    pattern = text.get("sliding_window_pattern", 6 if kind.startswith("gemma3") else 2 if kind == "gemma2" else None)
    if type(pattern) is int and pattern > 0:
        return [(layer + 1) % pattern != 0 for layer in range(layers)]
    return [True] * layers


def _experts(text: Mapping[str, Any], groups: TensorBytes) -> Experts | None:
    """The mixture that the config describes; None for a dense model."""
    count = next((text[key] for key in ("num_local_experts", "num_experts", "n_routed_experts") if text.get(key)), 0)
    if type(count) is not int or not count or not groups.experts.bytes:
        return None
    return Experts(count, _count(text, "num_experts_per_tok", _count(text, "experts_per_token", 2)),
                   _count(text, "moe_intermediate_size", _count(text, "intermediate_size", 1)))


def _head_dim(tensors: Iterable[Tensor], kv_heads: int) -> int:
    """As the key projection has it, for configs that leave it to their class; 0 where that does not tell."""
    found = next((tensor for tensor in tensors if tensor.name.endswith(".self_attn.k_proj.weight")
                  and len(tensor.shape) == 2 and tensor.dtype in ("BF16", "F16", "F32")), None)
    return found.shape[0] // kv_heads if found else 0


def _dtype(config: Mapping[str, Any], text: Mapping[str, Any], embedding: Tensor | None) -> str:
    for found in (text.get("torch_dtype"), text.get("dtype"), config.get("torch_dtype"), config.get("dtype")):
        if isinstance(found, str):
            return found.removeprefix("torch.")
    return {"F16": "float16", "F32": "float32"}.get(embedding.dtype if embedding else "", "bfloat16")


def _rotary_positions(text: Mapping[str, Any]) -> int:
    """Rows of the tables that vLLM makes (model_executor/layers/rotary_embedding/): scaled ones are longer."""
    longest = _count(text, "max_position_embeddings", 131072 if _is_gemma3(text) else 2048)
    rope = _section(text, "rope_scaling") or _section(text, "rope_parameters")
    kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor") or 1.0
    rows = longest
    if kind in ("linear", "dynamic", "yarn", "deepseek_yarn") and isinstance(factor, int | float) and factor >= 1:
        original = rope.get("original_max_position_embeddings")
        rows = round((original if type(original) is int and kind.endswith("yarn") else longest) * factor)
    return rows + (longest if text.get("rope_local_base_freq") or _is_gemma3(text) else 0)


def _is_gemma3(text: Mapping[str, Any]) -> bool:
    return str(text.get("model_type", "")).startswith("gemma3")


def _max_position(text: Mapping[str, Any], notes: list[str]) -> int:
    """As vLLM 0.32.0 derives it (vllm/config/model.py, _get_and_verify_max_len)."""
    longest = _count(text, "max_position_embeddings", *((131072,) if _is_gemma3(text) else (2048, notes)))
    rope = _section(text, "rope_scaling") or _section(text, "rope_parameters")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if _is_gemma3(text) or kind in (
            "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"):
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
    if value is None and default is not None:
        if notes is not None and default:
            notes.append(f"config.json lacks {key}: {default} is assumed")
        return default
    if type(value) is not int or not 0 < value < 1 << 40:
        raise damaged("config.json", f"gives {key} as {value!r}, not as a positive whole number")
    return value
