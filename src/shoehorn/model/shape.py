"""Shape of a model: sizes of its tensors, attention, experts and vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

KNOWN = frozenset({
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM",
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "MixtralForCausalLM",
    "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM",
    "GptOssForCausalLM"})
"""Supported architectures: layers of attention (of the kinds below) and one MLP or experts."""


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
        other: norms, biases, vision and all other tensors.
        unused: layers beyond the configured number, for multi-token prediction, which are not loaded.
    """

    embedding: TensorGroup = TensorGroup()
    lm_head: TensorGroup = TensorGroup()
    linears: TensorGroup = TensorGroup()
    experts: TensorGroup = TensorGroup()
    quant_state: TensorGroup = TensorGroup()
    other: TensorGroup = TensorGroup()
    unused: TensorGroup = TensorGroup()


@dataclass(frozen=True)
class KvLayers:
    """Layers with the same kind of KV cache.

    Attributes:
        heads: KV heads; 1 for a compressed cache (MLA), which every GPU stores completely.
        width: entries of one head and token, key and value together.
        window: cached tokens; 0 for all.
        latent: compressed cache (MLA).
    """

    layers: int
    heads: int
    width: int
    window: int = 0
    latent: bool = False


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: number per layer, number per token, and inner width of each.

    Attributes:
        cacheable: in the format that the engine plugin's cache of experts serves: compressed-tensors, symmetric INT4 in
            groups, of widths that need no padding.
    """

    count: int
    per_token: int
    intermediate: int
    cacheable: bool = False


@dataclass(frozen=True)
class ModelShape:
    """Properties of a model that planning requires.

    Attributes:
        intermediate: inner width of the widest dense MLP.
        head_dim: width of the rotary embedding.
        rotary_positions: rows of all rotary tables together.
        kv_layers: one entry per kind; their layers add up to `layers`.
        absorbed_parameters: parameters of bf16 copies of projections that the engine creates (MLA).
        max_position: maximum context length, with the engine's rotary scaling.
        dtype: dtype of the checkpoint, as `bfloat16`.
        tied_embeddings: the output head shares the weights of the embedding.
        quantization: `quantization_config.quant_method` of the checkpoint; None if unquantized.
        weights_bytes: size of all tensors.
        disk_bytes: size of all stored files.
        notes: unsupported properties.
        unreadable: reason why the engine rejects this checkpoint; "" if it does not.
        packed_embedding: the embedding is quantized, which the engine supports on GPUs only.
        column_groups: the number of GPUs must divide this number to divide the quantized matrices; 0: any number.
    """

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_positions: int
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
    column_groups: int = 0

    @property
    def understood(self) -> bool:
        """True if the architecture is supported, so that quantization and accurate estimates are possible."""
        return self.architecture in KNOWN
