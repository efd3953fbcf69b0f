"""Groups of a checkpoint's tensors by their place in the model, which follows from structure and not from prefixes.

Rules: every tensor counts in exactly one group; the decoder layers are the numbered list with as many members as
config.json names layers, the largest of such lists; layers beyond that number, and those for multi-token prediction,
are not loaded; a tensor of unknown purpose counts as whole on every GPU.

Source: parallel layers of vllm/model_executor/models of vLLM 0.32.0, compared by tests/contract/test_oracle.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shoehorn.model.safetensors import Tensor
from shoehorn.model.shape import TensorBytes, TensorGroup
from shoehorn.model.tensor_names import BNB_STATE, PACKED

_NUMBERED = re.compile(r"(.*?)\.(\d+)\.(.+)")
_MULTI_TOKEN = re.compile(r"(?:^|\.)(?:mtp|mtp_layers|mtp_block|nextn_predict_layers)(?:\.|$)")
_TOWER = re.compile(r"(?:^|[._])(?:vision|visual|vit|vpm|audio|image|img|siglip|clip|resampler|speech)(?:[._]|$)")
_TABLE = re.compile(r"(?:^|.*\.)(?:embed\w*|wte|tok_embeddings|word_embeddings)\.weight\w*")
_HEAD = re.compile(r"(?:^|.*\.)(?:lm_head|output_layer|embed_out|output|head)\.\w+")
_PER_LAYER_TABLE = re.compile(r".*embed_tokens_per_layer\.\w+")
_EXPERTS = re.compile(r"(?:^|.*\.)(?:experts|input_linear|output_linear)(?:\.|$).*")
_WHOLE = re.compile(
    r"(?:^|.*\.)(?:gate|router|classifier|shared_expert_gate|q_a_proj|kv_a_proj_with_mqa|wq_a|wkv|weights_proj|"
    r"per_layer_input_gate|per_layer_projection|altup|laurel|indexer|compressor|modality_router)(?:\..*|$)")
"""Modules in the layers that every GPU holds whole (ReplicatedLinear)."""

_KEY_VALUE = re.compile(r"(?:^|.*\.)(?:k_proj|v_proj|wk|wv|key|value)\.(?:weight|qweight|weight_packed)\w*")
_FUSED = re.compile(r"(?:^|.*\.)(?:qkv_proj|query_key_value|Wqkv|wqkv|c_attn|qkv)\.(?:weight|qweight|weight_packed)\w*")
_NOT_DIVIDED = re.compile(r".*(?:embed|position|patch|conv|norm|merger\.ln|probe|queries).*")


@dataclass(frozen=True)
class GroupedTensors:
    """Tensors of a checkpoint by group.

    Attributes:
        prefix: of the decoder layers' names, before the number.
        layers: number of decoder layers in the files, those beyond the configured number included.
        whole_bytes: of the layers' linear layers, those that every GPU holds whole.
        key_value_bytes: of the layers' linear layers, projections of keys and values.
    """

    groups: TensorBytes
    prefix: str
    layers: int
    whole_bytes: int = 0
    key_value_bytes: int = 0
    embedding: Tensor | None = None


@dataclass(frozen=True)
class TextSizes:
    """Sizes of the text model that distinguish its tensors; 0 where unknown."""

    layers: int
    vocab: int
    heads: int = 0
    kv_heads: int = 0
    experts: int = 0


def layer_list(tensors: Iterable[Tensor], layers: int) -> tuple[str, int]:
    """Find the decoder layers: the prefix of their names, and how many there are.

    Args:
        layers: number by config.json; 0 if unknown.
    """
    sizes: defaultdict[str, int] = defaultdict(int)
    numbers: defaultdict[str, set[int]] = defaultdict(set)
    for tensor in tensors:
        match = _NUMBERED.fullmatch(tensor.name)
        if match and not _MULTI_TOKEN.search(match[1]):
            sizes[match[1]] += tensor.bytes
            numbers[match[1]].add(int(match[2]))
    if not sizes:
        return "", 0
    prefix = max(sizes, key=lambda name: (not _TOWER.search(name), len(numbers[name]) >= max(layers, 1), sizes[name]))
    return prefix, len(numbers[prefix])


def group_tensors(tensors: Sequence[Tensor], sizes: TextSizes) -> GroupedTensors:
    """Divide the tensors into groups."""
    prefix, number = layer_list(tensors, sizes.layers)
    bound = sizes.layers or number
    entries_by_kind: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    whole = key_value = 0
    embedding: Tensor | None = None
    kv_share = 2 * sizes.kv_heads / (sizes.heads + 2 * sizes.kv_heads) if sizes.heads else 0
    for tensor in tensors:
        elements = tensor.elements
        match = _NUMBERED.fullmatch(tensor.name)
        in_layer = match[3] if match and match[1] == prefix else ""
        if _MULTI_TOKEN.search(tensor.name) or (match and in_layer and int(match[2]) >= bound):
            kind = "unused"
        elif BNB_STATE.fullmatch(tensor.name):
            kind, elements = "quant_state", elements if tensor.name.endswith(".weight.absmax") else 0
        elif in_layer:
            kind = _layer_kind(tensor, in_layer, sizes)
            if kind == "linears" and _WHOLE.fullmatch(in_layer.rpartition(".")[0]):
                whole += tensor.bytes
            elif kind == "linears":
                share = 1.0 if _KEY_VALUE.fullmatch(in_layer) else kv_share * bool(_FUSED.fullmatch(in_layer))
                key_value += round(share * tensor.bytes)
        else:
            kind = _outside_kind(tensor, sizes, bool(match), embedding)
            if kind == "embedding":
                embedding = embedding or tensor
        entries_by_kind[kind].append((tensor.bytes, elements))
    groups = TensorBytes(**{kind: TensorGroup(sum(size for size, _ in entries), sum(count for _, count in entries))
                            for kind, entries in entries_by_kind.items()})
    return GroupedTensors(groups, prefix, number, whole, key_value, embedding)


def _layer_kind(tensor: Tensor, name: str, sizes: TextSizes) -> str:
    """Return the group of a tensor in a decoder layer."""
    if _EXPERTS.fullmatch(name) and "shared_expert" not in name:
        return "experts"
    if sum(side > 1 for side in tensor.shape) >= 2 or len(tensor.shape) == 2 or PACKED.fullmatch(name):
        return "linears"
    return "other"


def _outside_kind(tensor: Tensor, sizes: TextSizes, numbered: bool, embedding: Tensor | None) -> str:
    """Return the group of a tensor outside the decoder layers."""
    is_tower = bool(_TOWER.search(tensor.name))
    if not is_tower and _HEAD.fullmatch(tensor.name):
        return "lm_head"
    if _PER_LAYER_TABLE.fullmatch(tensor.name):
        return "divided"
    if not is_tower and not numbered and _TABLE.fullmatch(tensor.name) and not re.search(
            r"position|token_type|segment", tensor.name) and _is_vocabulary(tensor, sizes.vocab, embedding):
        return "embedding"
    matrix = len(tensor.shape) >= 2 or (numbered and PACKED.fullmatch(tensor.name))
    if matrix and (numbered or is_tower) and not _NOT_DIVIDED.fullmatch(tensor.name):
        return "divided"
    return "other"


def _is_vocabulary(tensor: Tensor, vocab: int, embedding: Tensor | None) -> bool:
    """Return whether the table has a row per token; parts of a packed table follow its name."""
    if embedding is not None:
        return tensor.name.rpartition(".")[0] == embedding.name.rpartition(".")[0]
    return not vocab or not tensor.shape or len(tensor.shape) < 2 or vocab * 9 // 10 <= tensor.shape[0]
