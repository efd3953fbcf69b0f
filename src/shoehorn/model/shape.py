"""The shape of a model: sizes of its tensors, attention, experts and vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

KNOWN = frozenset({
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM",
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "MixtralForCausalLM",
    "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM",
    "GptOssForCausalLM"})
"""Architectures whose layers are understood: attention (of any kind below) and one MLP or experts."""


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of one kind: their bytes in the checkpoint, and their elements as stored (packed ones count packed)."""

    bytes: int = 0
    parameters: int = 0


@dataclass(frozen=True)
class TensorBytes:
    """Every tensor that the engine loads, in exactly one group.

    Attributes:
        linears: linear layers of the decoder layers, with the scales and zeros of packed formats.
        experts: those of mixtures of experts, likewise.
        quant_state: bitsandbytes' own state; `parameters` counts the absmax entries alone.
        other: norms, biases, vision, and whatever else.
        unused: layers beyond the config's count, as for multi-token prediction, which are not loaded.
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
    """Layers whose KV cache is of the same kind.

    Attributes:
        heads: that hold keys and values; 1 for a compressed cache (MLA), which every GPU keeps whole.
        width: entries of one head and token, key and value together.
        window: tokens that are kept; 0 for all of them.
        latent: compressed (MLA).
    """

    layers: int
    heads: int
    width: int
    window: int = 0
    latent: bool = False


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: how many a layer has, how many a token passes, and the inner width of each."""

    count: int
    per_token: int
    intermediate: int


@dataclass(frozen=True)
class ModelShape:
    """What planning needs to know of a model.

    Attributes:
        intermediate: inner width of a dense MLP, the widest one.
        head_dim: of the rotary embedding's table; rotary_positions: the rows of all such tables together.
        kv_layers: one entry a kind; their layers add up to `layers`.
        absorbed_parameters: of bf16 copies that the engine makes of projections beside the weights (MLA).
        max_position: the longest context, rotary scaling counted as the engine does.
        dtype: the checkpoint's number format, as `bfloat16`.
        tied_embeddings: the output head is the embedding, so no second one is held.
        quantization: the checkpoint's `quantization_config.quant_method`; None where it is not quantized.
        weights_bytes: all tensors; disk_bytes: all files that are kept.
        notes: what was not understood, in words.
        unreadable: why the engine would refuse this checkpoint; empty where it does not.
        packed_embedding: the embedding is quantized, which the engine reads on a GPU only.
        column_groups: a number of GPUs divides the quantized matrices where it divides this; 0: any does.
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
        """Whether its layers are of a known architecture, so that they can be quantized and estimated closely."""
        return self.architecture in KNOWN
