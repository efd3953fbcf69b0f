"""Groups of a checkpoint's tensors by their place in the model, which follows from structure and not from prefixes.

Rules: every tensor counts in exactly one group; the decoder layers are the numbered list with as many members as
config.json names layers, the largest of such lists; layers beyond that number, and those for multi-token prediction,
are not loaded; a tensor of unknown purpose counts as whole on every GPU.

Compared with vLLM 0.32.0 by tests/contract/test_oracle.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shoehorn.model.division import TOWER, Division
from shoehorn.model.safetensors import Tensor
from shoehorn.model.shape import TensorBytes, TensorGroup
from shoehorn.model.tensor_names import BNB_STATE, PACKED

_NUMBERED = re.compile(r"(.*?)\.(\d+)\.(.+)")
_MULTI_TOKEN = re.compile(r"(?:^|\.)(?:mtp|mtp_layers|mtp_block|nextn_predict_layers)(?:\.|$)")
_TABLE = re.compile(r"(?:^|.*\.)(?:embed\w*|wte|tok_embeddings|word_embeddings)\.weight\w*")
_HEAD = re.compile(r"(?:^|.*\.)(?:lm_head|output_layer|embed_out|output|head)\.\w+")
_SCORE = re.compile(r"(?:.*\.)?(?:pooler|classifier|score)\..*")
_BASE_POOLER = re.compile(r"pooler\.dense\.\w+")
"""Of BERT without a task, whose embeddings come from the last layer; a classifier's has a prefix."""

_EXPERTS = re.compile(r"(?:^|.*\.)(?:experts|input_linear|output_linear)(?:\.|$).*")
@dataclass(frozen=True)
class GroupedTensors:
    """Tensors of a checkpoint by group.

    Attributes:
        prefix: of the decoder layers' names, before the number.
        layers: number of decoder layers in the files, those beyond the configured number included.
        few_gpus: bytes of the layers' linear layers that are divided over at most so many GPUs, by that number.
        expert_scale_bytes, expert_zero_bytes: of `experts`, scales and zeros of groups of packed weights.
    """

    groups: TensorBytes
    prefix: str
    layers: int
    few_gpus: tuple[tuple[int, int], ...] = ()
    expert_scale_bytes: int = 0
    expert_zero_bytes: int = 0
    embedding: Tensor | None = None


@dataclass(frozen=True)
class TextSizes:
    """Sizes of the text model that distinguish its tensors; 0 where unknown.

    Attributes:
        whole_table: every GPU holds the whole embedding (models with an encoder for sound).
        pooling: the model is for embeddings or ranking.
    """

    layers: int
    vocab: int
    whole_table: bool = False
    pooling: bool = False


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
    prefix = max(sizes, key=lambda name: (not TOWER.search(name), len(numbers[name]) >= max(layers, 1), sizes[name]))
    return prefix, len(numbers[prefix])


def is_beyond(name: str, prefix: str, layers: int) -> bool:
    """Return whether a tensor belongs to multi-token prediction or to a layer beyond the configured number."""
    match = _NUMBERED.fullmatch(name)
    return bool(_MULTI_TOKEN.search(name) or (match and match[1] == prefix and int(match[2]) >= layers))


def group_tensors(tensors: Sequence[Tensor], sizes: TextSizes, division: Division) -> GroupedTensors:
    """Divide the tensors into groups."""
    prefix, number = layer_list(tensors, sizes.layers)
    bound = sizes.layers or number
    entries_by_kind: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    few_gpus: defaultdict[int, float] = defaultdict(float)
    expert_scales = expert_zeros = 0
    embedding: Tensor | None = None
    for tensor in tensors:
        elements = tensor.elements
        match = _NUMBERED.fullmatch(tensor.name)
        in_layer = match[3] if match and match[1] == prefix else ""
        if _MULTI_TOKEN.search(tensor.name) or (match and in_layer and int(match[2]) >= bound):
            kind = "unused"
        elif BNB_STATE.fullmatch(tensor.name):
            kind, elements = "quant_state", elements if tensor.name.endswith(".weight.absmax") else 0
        elif in_layer:
            kind = _layer_kind(tensor, in_layer)
            if kind == "experts":
                expert_scales += tensor.bytes * in_layer.endswith(".scales")
                expert_zeros += tensor.bytes * in_layer.endswith(".qzeros")
            for gpus, share in division.shares(in_layer) if kind == "linears" else ():
                few_gpus[gpus] += share * tensor.bytes
        else:
            kind = _outside_kind(tensor, sizes, bool(match), embedding, division)
            if kind == "embedding":
                embedding = embedding or tensor
            elif sizes.pooling and _SCORE.fullmatch(tensor.name):
                elements *= 2  # in fp32 whatever the dtype of the others
        entries_by_kind[kind].append((tensor.bytes, elements))
    groups = TensorBytes(**{kind: TensorGroup(sum(size for size, _ in entries), sum(count for _, count in entries))
                            for kind, entries in entries_by_kind.items()})
    few = tuple((gpus, round(size)) for gpus, size in sorted(few_gpus.items()) if size and gpus)
    return GroupedTensors(groups, prefix, number, few, expert_scales, expert_zeros, embedding)


def _layer_kind(tensor: Tensor, name: str) -> str:
    """Return the group of a tensor in a decoder layer."""
    if _EXPERTS.fullmatch(name) and "shared_expert" not in name:
        return "unused" if name.endswith(".g_idx") else "experts"
    if sum(side > 1 for side in tensor.shape) >= 2 or len(tensor.shape) == 2 or PACKED.fullmatch(name):
        return "linears"
    return "other"


def _outside_kind(tensor: Tensor, sizes: TextSizes, numbered: bool, embedding: Tensor | None, division: Division
                  ) -> str:
    """Return the group of a tensor outside the decoder layers."""
    is_tower = bool(TOWER.search(tensor.name))
    if division.unused.fullmatch(tensor.name):
        return "unused"
    if not is_tower and _HEAD.fullmatch(tensor.name):
        return "unused" if sizes.pooling else "lm_head"
    if sizes.pooling and _BASE_POOLER.fullmatch(tensor.name):
        return "unused"
    if not is_tower and not numbered and _TABLE.fullmatch(tensor.name) and not re.search(
            r"position|token_type|segment", tensor.name) and _is_vocabulary(tensor, sizes.vocab, embedding):
        return "other" if sizes.whole_table else "embedding"
    packed = bool(PACKED.fullmatch(tensor.name))
    return "divided" if division.divides_outside(tensor, numbered, packed) else "other"


def _is_vocabulary(tensor: Tensor, vocab: int, embedding: Tensor | None) -> bool:
    """Return whether the table has a row per token; parts of a packed table follow its name."""
    if embedding is not None:
        return tensor.name.rpartition(".")[0] == embedding.name.rpartition(".")[0]
    return not vocab or not tensor.shape or len(tensor.shape) < 2 or vocab * 9 // 10 <= tensor.shape[0]
