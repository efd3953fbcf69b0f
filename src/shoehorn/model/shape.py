"""Shape of a model: sizes of its tensors, attention, experts and vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shoehorn.model.compared import is_compared
from shoehorn.model.layer_caches import KvLayers, StateLayers

PLAIN = frozenset({
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM",
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "MixtralForCausalLM",
    "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM",
    "GptOssForCausalLM"})
"""Architectures whose layers are attention (of the kinds below) and one MLP or experts, one stack of them."""


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of one kind: bytes in the checkpoint, and stored elements (of packed tensors, the packed ones)."""

    bytes: int = 0
    parameters: int = 0


@dataclass(frozen=True)
class TensorBytes:
    """Every tensor that the engine loads, in exactly one group.

    Attributes:
        linears: linear layers of the decoder layers, including scales and zeros of packed formats.
        experts: experts of mixtures of experts, including scales and zeros.
        quant_state: state of bitsandbytes; `parameters` counts the absmax entries only.
        divided: matrices outside the layers that tensor parallelism divides: towers for images and sound, more tables.
        other: norms, biases and all other tensors.
        unused: layers beyond the configured number, for multi-token prediction, which are not loaded.
    """

    embedding: TensorGroup = TensorGroup()
    lm_head: TensorGroup = TensorGroup()
    linears: TensorGroup = TensorGroup()
    experts: TensorGroup = TensorGroup()
    quant_state: TensorGroup = TensorGroup()
    divided: TensorGroup = TensorGroup()
    other: TensorGroup = TensorGroup()
    unused: TensorGroup = TensorGroup()


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: number per layer, number per token, and inner width of each.

    Attributes:
        group_size: weights that share a scale, of AWQ and GPTQ; 0 for other formats.
        scale_bytes, zero_bytes: of such groups, of all layers.
        symmetric: the zeros are all alike.
        cacheable: in a format that the engine plugin's cache of experts serves: compressed-tensors, symmetric INT4 in
            groups, of widths that need no padding; or gpt-oss' MXFP4.
    """

    count: int
    per_token: int
    intermediate: int
    cacheable: bool = False
    group_size: int = 0
    scale_bytes: int = 0
    zero_bytes: int = 0
    symmetric: bool = False


@dataclass(frozen=True)
class Encoder:
    """Encoder of one kind of item.

    Attributes:
        modalities: as in `limit-mm-per-prompt`; the engine loads the encoder unless all of them are limited to 0.
        item_tokens: of the largest item in the prompt; 0 if unknown.
        patches: positions that the encoder's layers compute for each of those tokens.
        width, inner: of the encoder's layers and of their MLP.
        token_width: entries of a token's embedding.
        pixels: of a token's part of an image, where any size is taken: a limit of pixels changes `item_tokens`.
        longest_video: item that a video may be longer than, in items, as far as the context allows.
        divided, whole: tensors of the encoder in these groups of the model's tensors.
    """

    modalities: tuple[str, ...]
    item_tokens: int
    patches: float
    width: int
    inner: int
    token_width: int
    pixels: int = 0
    longest_video: int = 1
    divided: TensorGroup = TensorGroup()
    whole: TensorGroup = TensorGroup()


@dataclass(frozen=True)
class ModelShape:
    """Properties of a model that planning requires.

    Attributes:
        intermediate: inner width of the widest dense MLP.
        head_dim: width of the rotary embedding.
        rotary_entries: of all rotary tables together; an entry takes as many bytes as one of the activations.
        kv_layers: caches of keys and values, one entry per kind; none for encoders.
        state_layers: states of fixed size, one entry per kind.
        block_size: tokens of a block of the KV cache, at least.
        kv_cache_dtype: `kv-cache-dtype` that the checkpoint asks for; "auto" is the model's own.
        absorbed_parameters: parameters of bf16 copies of projections that the engine creates (MLA).
        max_position: context length unless one is set, with the engine's rotary scaling.
        longest_position: largest context length that can be set; 0 where that is `max_position`.
        dtype: dtype of the checkpoint, as `bfloat16`.
        tied_embeddings: the output head shares the weights of the embedding.
        quantization: `quantization_config.quant_method` of the checkpoint; None if unquantized.
        few_gpus: (GPUs, bytes) of `linears` that are divided over at most so many GPUs of a stage: 1 for replicated
            layers, the number of KV heads for projections of keys and values.
        weights_bytes: size of all tensors.
        disk_bytes: size of all stored files.
        encoders: for images, videos and sound.
        pooling: for embeddings or ranking, so that the engine loads no output head.
        overrides: the user's changes of config.json (`hf-overrides`), completed; the shape includes them.
        notes: unsupported properties, and how a conversion was made; shown with the plan.
        unreadable: reason why the engine rejects this checkpoint; "" if it does not.
        packed_embedding: the embedding is quantized, which the engine supports on a CPU only with Shoehorn's patch.
        symmetric_int4: all linear layers are in the format of the CPU kernel: compressed-tensors, symmetric INT4 in
            groups of 32, 64 or 128.
        column_groups: the number of GPUs must divide this number to divide the quantized matrices; 0: any number.
    """

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_entries: int
    vocab: int
    max_position: int
    dtype: str
    tied_embeddings: bool
    quantization: str | None
    kv_layers: tuple[KvLayers, ...]
    tensor_bytes: TensorBytes
    weights_bytes: int
    disk_bytes: int
    experts: Experts | None = None
    absorbed_parameters: int = 0
    notes: tuple[str, ...] = ()
    unreadable: str = ""
    packed_embedding: bool = False
    symmetric_int4: bool = False
    column_groups: int = 0
    state_layers: tuple[StateLayers, ...] = ()
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    longest_position: int = 0
    few_gpus: tuple[tuple[int, int], ...] = ()
    pooling: bool = False
    encoders: tuple[Encoder, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def compared(self) -> bool:
        """True if the memory of this architecture's models was compared with vLLM's and agrees."""
        return is_compared(self.architecture)

    @property
    def plain(self) -> bool:
        """True if Shoehorn can quantize the layers, and offload them by number."""
        return self.architecture in PLAIN
