"""Division of tensors over the GPUs of a tensor parallel group, by the engine's parallel layers.

Rules: a linear layer is divided over all GPUs, unless the engine replicates it; projections of keys and values are
divided over at most as many GPUs as there are KV heads, those of Mamba-2's groups over as many as there are groups; a
tower for images or sound is divided where the engine implements it with parallel layers, and whole otherwise, as the
towers that it takes from transformers are.

Source: parallel layers of vllm/model_executor/models of vLLM 0.32.0, compared by tests/contract/test_oracle.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shoehorn.model.config_names import section_types
from shoehorn.model.layer_caches import StateLayers
from shoehorn.model.safetensors import Tensor
from shoehorn.model.transformers_models import lacks_plan

_WHOLE = re.compile(
    r"(?:^|.*\.)(?:gate|router|classifier|shared_expert_gate|q_a_proj|kv_a_proj_with_mqa|wq_a|wkv|weights_proj|"
    r"per_layer_input_gate|per_layer_projection|indexer|compressor|modality_router)(?:\..*|$)|linear")
"""Modules in the layers that every GPU holds whole (ReplicatedLinear); `linear` is Zamba 2's, in the layer itself."""

_FUSES = re.compile(r"(?:^|.*\.)(?:(?:self_attn|attn|attention|self_attention)\..*|(?:gate|up|down)_proj\.\w+)")
"""Layers that vLLM recognizes in transformers' code: attention and gated MLPs."""

_KEY_VALUE = re.compile(r"(?:^|.*\.)(?:k_proj|v_proj|wk|wv|key|value)\.(?:weight|qweight|weight_packed)\w*")
_FUSED = re.compile(r"(?:^|.*\.)(?:qkv_proj|query_key_value|Wqkv|wqkv|c_attn|qkv)\.(?:weight|qweight|weight_packed)\w*")
_MAMBA = re.compile(r"(?:^|.*\.)(in_proj|conv1d)\.(?:weight|qweight|weight_packed)\w*")

TOWER = re.compile(r"(?:^|[._])(?:vision|visual|vit|vpm|audio|image|img|siglip|clip|resampler|speech)(?:[._]|$)")
_SOUND = re.compile(r"(?:^|[._])(?:audio|speech)(?:[._]|$)")
_TABLE = re.compile(r".*embed_tokens_per_layer\.\w+|.*\.?per_layer_model_projection\.\w+")
_ENCODER_TABLE = re.compile(r"(?:^|.*\.)(?:position|token_type)_embeddings\.weight")
_ENCODERS = frozenset({"bert", "roberta", "xlm-roberta", "nomic_bert"})
"""Model types whose tables of positions and segments are divided like that of the vocabulary."""

_NOT_DIVIDED = re.compile(r".*(?:embed|position|patch|conv|norm|merger\.ln|probe|queries|downsample).*")
_PROJECTOR = re.compile(r"(?:^|.*\.)multi_modal_projector\.linear\w*\.\w+")
_PROJECTS_IN_PARALLEL = frozenset({"llava", "llava_next", "mistral3", "llama4", "cohere2_vision"})
"""Model types whose projector between tower and text model has parallel layers."""

_TOWERS: Mapping[str, str] = dict.fromkeys((
    "siglip_vision_model", "siglip2_vision_model", "clip_vision_model", "pixtral", "moonvit", "llama4_vision_model",
    "idefics3", "idefics3_vision", "smolvlm_vision", "glm4v", "glm4v_vision", "glm4v_moe", "glm4v_moe_vision",
    "paddleocr_vl", "paddleocr_vl_vision", "qwen2_vl", "qwen2_vl_vision", "qwen2_5_vl", "qwen2_5_vl_vision",
    "qwen3_vl", "qwen3_vl_vision", "qwen3_vl_moe", "qwen3_vl_moe_vision", "qwen3_5", "qwen3_5_vision", "qwen3_5_moe",
    "qwen3_5_moe_vision"), "(?!)") | {"internvl_vision": r".*\.attention\..*"}
"""Model types of towers with parallel layers -> tensors that are whole nevertheless."""


_NOTHING = re.compile("(?!)")
_UNUSED = re.compile(r".*\.(?:packing_position_embedding|vision_model\.head\.(?:attention|layernorm|mlp|probe))\b.*")
"""Tensors of PaddleOCR's tower that no layer uses."""


@dataclass(frozen=True)
class Division:
    """Facts about a model that decide how its tensors are divided.

    Attributes:
        kv_heads: of the attention layers; 0 if unknown.
        kv_share: share of keys and values in a projection that computes queries, too.
        groups: of Mamba-2; 0 without.
        group_shares: share of the groups in `in_proj` and in `conv1d`.
        whole_towers: tensors of towers for images and for sound that are whole.
        projects_in_parallel: the projector between tower and text model is divided.
        tables: further tables that are divided.
        unused: tensors that the engine skips.
        only_fused: of the linear layers of the decoder, only those of attention and gated MLPs are divided.
    """

    kv_heads: int = 0
    kv_share: float = 0
    groups: int = 0
    group_shares: tuple[float, float] = (0, 0)
    whole_towers: tuple[re.Pattern[str], re.Pattern[str]] = (_NOTHING, _NOTHING)
    projects_in_parallel: bool = False
    only_fused: bool = False
    tables: re.Pattern[str] = _TABLE
    unused: re.Pattern[str] = _NOTHING

    def shares(self, name: str) -> Iterator[tuple[int, float]]:
        """Yield the shares of a layer's matrix that are divided over few GPUs only: (GPUs, share).

        Args:
            name: within the layer.
        """
        module = name.rpartition(".")[0]
        mamba = _MAMBA.fullmatch(name)
        if _WHOLE.fullmatch(module) or (self.only_fused and not _FUSES.fullmatch(name)):
            yield 1, 1.0
        elif _KEY_VALUE.fullmatch(name):
            yield self.kv_heads, 1.0
        elif _FUSED.fullmatch(name):
            yield self.kv_heads, self.kv_share
        elif mamba and self.groups:
            yield self.groups, self.group_shares[mamba[1] == "conv1d"]

    def is_sound(self, name: str) -> bool:
        """Return whether a tower's tensor belongs to that for sound."""
        return bool(_SOUND.search(name))

    def divides_outside(self, tensor: Tensor, numbered: bool, packed: bool) -> bool:
        """Return whether a tensor outside the decoder layers and tables is divided.

        Args:
            numbered: belongs to a list of layers.
            packed: in a packed format, whose scales may have one dimension.
        """
        if self.tables.fullmatch(tensor.name):
            return True
        if self.projects_in_parallel and _PROJECTOR.fullmatch(tensor.name) and len(tensor.shape) >= 2:
            return True
        is_tower = bool(TOWER.search(tensor.name))
        if not (len(tensor.shape) >= 2 or (numbered and packed)) or not (numbered or is_tower):
            return False
        whole = self.whole_towers[self.is_sound(tensor.name)]
        return not (is_tower and whole.fullmatch(tensor.name)) and not _NOT_DIVIDED.fullmatch(tensor.name)


def read_division(config: Mapping[str, Any], architecture: str, heads: int, kv_heads: int,
                  states: tuple[StateLayers, ...]) -> Division:
    """Read the facts from config.json.

    Args:
        heads, kv_heads: of the attention layers.
    """
    state = next((each for each in states if each.groups), None)
    groups = state.groups * state.group_channels if state else 0
    types = section_types(config)
    whole = [re.compile(_TOWERS.get(types.get(f"{kind}_config", ""), ".*")) for kind in ("vision", "audio")]
    return Division(
        kv_heads, 2 * kv_heads / (heads + 2 * kv_heads) if heads else 0, state.groups if state else 0,
        (groups / (2 * state.channels + groups), groups / (state.channels + groups)) if state else (0, 0),
        (whole[0], whole[1]), config.get("model_type") in _PROJECTS_IN_PARALLEL, lacks_plan(architecture),
        _ENCODER_TABLE if config.get("model_type") in _ENCODERS else _TABLE,
        _UNUSED if types.get("vision_config", "").startswith("paddleocr_vl") else _NOTHING)
