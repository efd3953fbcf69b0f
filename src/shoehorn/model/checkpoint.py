"""Reader of `config.json` and safetensors headers -> `ModelShape`: bytes of real tensors, never the model's name.

Rules: every tensor counts in exactly one group; attention, experts and compressed caches follow from the config, which
its class's defaults and the tensors complete; an unsupported property is noted in `notes` and counted as resident,
unquantized and at full length, which overestimates.

Sources: config classes of transformers, and the models and kv_cache_interface.py of vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from shoehorn.model import task
from shoehorn.model.cache_reader import is_latent, read_caches
from shoehorn.model.compared import is_compared
from shoehorn.model.config_names import read_text, text_section
from shoehorn.model.context import context_limits
from shoehorn.model.divisibility import column_groups
from shoehorn.model.division import read_division
from shoehorn.model.encoders import PROCESSOR, read_encoders, with_tensors
from shoehorn.model.files import WEIGHTS_SUFFIXES, Files, not_understood, read_json
from shoehorn.model.kv_dtype import kv_cache_dtype
from shoehorn.model.overrides import apply_overrides, complete_overrides
from shoehorn.model.quantization import other_files, read_quantization
from shoehorn.model.rotary import rotary_entries
from shoehorn.model.safetensors import Tensor, header, shards
from shoehorn.model.shape import Experts, ModelShape, TensorBytes
from shoehorn.model.tensor_groups import TextSizes, group_tensors, is_beyond
from shoehorn.model.tensor_names import EMBEDDING_PACKED
from shoehorn.model.tensor_sizes import complete_from_tensors
from shoehorn.model.tower_quantization import as_loaded

_EXPERT_WIDTH = 128
"""The kernel of packed experts (Marlin) pads matrices whose sides are not multiples of this."""


def read(files: Files, overrides: Mapping[str, Any] | None = None) -> ModelShape:
    """Read the shape of a checkpoint.

    Args:
        overrides: the user's changes of config.json (`hf-overrides`).

    Raises:
        ModelUnavailableError: a file is missing or damaged; names the file.
    """
    names = files.names()
    config = read_json(files, names, "config.json")
    weights = shards(files, names)
    tensors = [tensor for name in weights for tensor in header(files, name, names[name])]
    disk = sum(size for name, size in names.items()
               if name in weights or (not name.endswith(WEIGHTS_SUFFIXES) and "/" not in name))
    pooling = task.read(files, architecture_of(config)).is_pooling
    others = other_files(files, names)
    if PROCESSOR in names:
        others[PROCESSOR] = read_json(files, names, PROCESSOR)
    shape = shape_of(config, tensors, disk, overrides or {}, others, pooling)
    limit = task.sentence_limit(files, names)
    return replace(shape, max_position=limit) if limit else shape


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the name of the architecture; "unknown" without one."""
    architectures = config.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else "unknown"


def shape_of(config: Mapping[str, Any], tensors: Iterable[Tensor], disk_bytes: int,
             overrides: Mapping[str, Any] = MappingProxyType({}),
             files: Mapping[str, Mapping[str, Any]] = MappingProxyType({}), pooling: bool = False) -> ModelShape:
    """Derive the shape from a config and tensors.

    Args:
        files: other JSON files that describe a quantization or the images, by name.
        pooling: the model is for embeddings or ranking, whatever its architecture's name says.

    Raises:
        ModelUnavailableError: config.json and the tensors do not show a required size.
    """
    if overrides:
        overrides = complete_overrides(config, overrides)
        return replace(shape_of(apply_overrides(config, overrides), tensors, disk_bytes, files=files, pooling=pooling),
                       overrides=overrides)
    notes: list[str] = []
    tensors = list(tensors)
    stored_bytes = sum(tensor.bytes for tensor in tensors)
    text = read_text(config)
    architecture = architecture_of(config)
    pooling = pooling or task.of_architecture(architecture).is_pooling
    text = complete_from_tensors(text, tensors, notes)
    layers, hidden, heads = (_count(text, key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    kv_heads = _count(text, "num_key_value_heads", heads)
    has_rotated_part = bool(text.get("kv_lora_rank"))
    head_dim = _count(text, "qk_rope_head_dim", 64) if has_rotated_part else _count(text, "head_dim", hidden // heads)
    quantized = read_quantization(config, {name: file for name, file in files.items() if name != PROCESSOR}, tensors,
                                  notes)
    quantization = quantized.get("quant_method")
    tensors = as_loaded(tensors, quantized)
    caches, limits = read_caches(text, layers, kv_heads, head_dim, notes), context_limits(text, notes)
    division = read_division(config, architecture, heads, kv_heads, caches.states)
    grouped = group_tensors(
        tensors, TextSizes(layers, text.get("vocab_size") or 0, bool(text.get("is_encoder_decoder")), pooling),
        division)
    encoders = with_tensors(read_encoders(config, hidden, files.get(PROCESSOR, {})), tensors, division)
    if text_section(config) is not config and not encoders:
        notes.append("multimodal model: activations of the non-text parts are not estimated")
    groups, embedding = grouped.groups, grouped.embedding
    if grouped.layers < layers:
        notes.append(f"config.json names {layers} layers, the weights contain {grouped.layers}")
    if not is_compared(architecture):
        notes.append(f"architecture {architecture}: its memory was not compared with vLLM's; activation estimate +50 %")
    if quantized.get("load_in_8bit"):
        notes.append("8-bit bitsandbytes is unsupported: its state is counted as stored")
    latent = _count(text, "kv_lora_rank", 0) if is_latent(text) else 0
    experts = _experts(text, groups, quantized, hidden, architecture,
                       (grouped.expert_scale_bytes, grouped.expert_zero_bytes))
    attends = not caches.states or bool(caches.kv)
    return ModelShape(
        architecture=architecture, layers=layers, hidden=hidden, heads=heads if attends else 0,
        intermediate=_count(text, "intermediate_size", 4 * hidden, notes), kv_heads=kv_heads if attends else 0,
        head_dim=_count(text, "global_head_dim", head_dim) if attends else text.get("head_dim") or 0, pooling=pooling,
        vocab=_count(text, "vocab_size", embedding.shape[0] if embedding and embedding.shape else None),
        max_position=limits.default, longest_position=limits.longest,
        rotary_entries=rotary_entries(text, architecture, head_dim),
        dtype=_dtype(config, text, embedding),
        tied_embeddings=not groups.lm_head.bytes or bool(
            text.get("tie_word_embeddings", config.get("tie_word_embeddings"))),
        quantization=str(quantization) if quantization else None,
        encoders=encoders, kv_cache_dtype=kv_cache_dtype(quantized), kv_layers=caches.kv, state_layers=caches.states,
        block_size=caches.block_size, tensor_bytes=groups,
        weights_bytes=stored_bytes, disk_bytes=disk_bytes,
        experts=experts,
        absorbed_parameters=layers * latent * heads * (_count(text, "qk_nope_head_dim", 128)
                                                       + _count(text, "v_head_dim", 128)) if latent else 0,
        notes=tuple(notes), unreadable=_unreadable(quantized),
        packed_embedding=any(EMBEDDING_PACKED.fullmatch(tensor.name) for tensor in tensors),
        symmetric_int4=_is_cpu_kernel_int4(quantized),
        column_groups=column_groups(
            [tensor for tensor in tensors if not is_beyond(tensor.name, grouped.prefix, layers)], quantized,
            experts.intermediate if experts else 0, division) if quantization else 0,
        few_gpus=grouped.few_gpus)


def _unreadable(quantized: Mapping[str, Any]) -> str:
    """Return the reason why vLLM 0.32 rejects a quantized checkpoint of a supported method; "" if it does not.

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


def _experts(text: Mapping[str, Any], groups: TensorBytes, quantized: Mapping[str, Any], hidden: int,
             architecture: str, group_bytes: tuple[int, int]) -> Experts | None:
    """Return the mixture of experts; None for a dense model."""
    count = text.get("num_experts") or 0
    if not count or not groups.experts.bytes:
        return None
    width = _count(text, "moe_intermediate_size", _count(text, "intermediate_size", 1))
    group_size = quantized.get("group_size") if quantized.get("quant_method") in ("awq", "gptq") else 0
    int4 = _is_symmetric_int4(quantized) and not width % _EXPERT_WIDTH and not hidden % _EXPERT_WIDTH
    mxfp4 = quantized.get("quant_method") == "mxfp4" and architecture == "GptOssForCausalLM"
    return Experts(count, _count(text, "num_experts_per_tok", 2), width, int4 or mxfp4,
                   max(0, group_size) if type(group_size) is int else 0, group_bytes[0],
                   group_bytes[1], quantized.get("quant_method") == "gptq" and bool(quantized.get("sym")))


def _is_cpu_kernel_int4(quantized: Mapping[str, Any]) -> bool:
    """Return whether the CPU kernel reads the linear layers: symmetric INT4 in groups of 32, 64 or 128."""
    return _is_symmetric_int4(quantized) and all(
        _section(group, "weights").get("group_size") in (32, 64, 128)
        for group in _section(quantized, "config_groups").values()
        if isinstance(group, Mapping) and "Linear" in group.get("targets", ()))


def _is_symmetric_int4(quantized: Mapping[str, Any]) -> bool:
    """Return whether all linear layers are symmetric INT4 in groups, in the packed format of compressed-tensors."""
    groups = [_section(group, "weights") for name, group in _section(quantized, "config_groups").items()
              if isinstance(group, Mapping) and "Linear" in group.get("targets", ())]
    return quantized.get("quant_method") == "compressed-tensors" and bool(groups) and all(
        weights.get("num_bits") == 4 and weights.get("type") == "int" and weights.get("symmetric")
        and weights.get("strategy") == "group" for weights in groups)


def _dtype(config: Mapping[str, Any], text: Mapping[str, Any], embedding: Tensor | None) -> str:
    for name in (text.get("torch_dtype"), text.get("dtype"), config.get("torch_dtype"), config.get("dtype")):
        if isinstance(name, str):
            return name.removeprefix("torch.")
    return {"F16": "float16", "F32": "float32"}.get(embedding.dtype if embedding else "", "bfloat16")


def _section(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return an object within an object; empty if missing."""
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def _count(text: Mapping[str, Any], key: str, default: int | None = None, notes: list[str] | None = None) -> int:
    """Return a positive integer of config.json, or the default, which is noted in `notes` if given."""
    value = text.get(key)
    if value is None and default is not None:
        if notes is not None and default:
            notes.append(f"{key} missing in config.json: {default} assumed")
        return default
    if type(value) is not int or not 0 < value < 1 << 40:
        raise not_understood(f"{key} is {value!r}, not a positive integer")
    return value
