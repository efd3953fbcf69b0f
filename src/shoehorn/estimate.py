"""ModelShape x choices -> bytes per part on each GPU, on the host, and KV cache tokens.

Rules: plain arithmetic, no I/O; the KV cache takes what the other parts leave, as in vLLM; where a formula is derived
and not measured it errs upwards. docs/estimator.md gives every formula's source and what it was compared with.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from shoehorn.checkpoint import DENSE, ModelShape
from shoehorn.units import GIB, MIB

NF4_BLOCK = 64
"""Weights that share one absmax in bitsandbytes' NF4."""

CONTEXT_BYTES = 584 * MIB
"""The CUDA context and libraries that stand before vLLM first looks at the card, so that it never counts them."""

_LIBRARIES_BYTES = 200 * MIB  # workspaces that vLLM does count (cuBLAS, attention)
_COLLECTIVES_BYTES = 300 * MIB  # NCCL, with more than one GPU
_GRAPH_BYTES_PER_LAYER = 128 << 10
_LOGITS_BYTES_PER_ENTRY = 14  # bf16, then fp32 for the logits, their filtered copy and the probabilities
_HOST_BYTES = 4 * GIB  # API server and one engine process with CUDA
_HOST_WORKER_BYTES = 3 * GIB  # every further GPU's worker
_HOST_CPU_BYTES = 2 * GIB  # all processes of an engine on the CPU, without weights and KV cache


@dataclass(frozen=True)
class Choices:
    """What is decided about a start, as far as it takes memory.

    Attributes:
        limit_bytes: of one GPU, everything counted, as NVML shows it.
        quantization: `bitsandbytes` (NF4 made while loading, or as the checkpoint is), or None: as the checkpoint is.
        dtype_bytes: of one unquantized weight or activation; kv_dtype_bytes: of one entry of the KV cache.
        offload_bytes: UVA offload, at most this per GPU (vLLM's cpu-offload-gb).
        prefetch: (group size, layers offloaded in a group, steps ahead); all 0 without prefetch offload.
        kv_cache_bytes: the KV cache per GPU where it is fixed; else None, and it takes what is left.
    """

    limit_bytes: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    quantization: str | None = None
    tensor_parallel: int = 1
    offload_bytes: int = 0
    prefetch: tuple[int, int, int] = (0, 0, 0)
    dtype_bytes: int = 2
    kv_dtype_bytes: int = 2
    block_size: int = 16
    eager: bool = False
    kv_cache_bytes: int | None = None


@dataclass(frozen=True)
class VramParts:
    """Expected bytes of one GPU, by part; they add up to what NVML shows.

    Attributes:
        weights_bytes: layers held on the card, norms, and the rotary table.
        quant_state_bytes: bitsandbytes' absmax, which stays on the card also when the weights do not.
        limit_bytes: what the plan may use of the card.
    """

    weights_bytes: int
    quant_state_bytes: int
    embeddings_bytes: int
    offload_buffer_bytes: int
    kv_cache_bytes: int
    activations_bytes: int
    cuda_graphs_bytes: int
    framework_bytes: int
    limit_bytes: int

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return (self.weights_bytes + self.quant_state_bytes + self.embeddings_bytes + self.offload_buffer_bytes
                + self.kv_cache_bytes + self.activations_bytes + self.cuda_graphs_bytes + self.framework_bytes)

    def to_json(self) -> dict[str, int]:
        """All parts, total and limit."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def estimate(shape: ModelShape, choices: Choices) -> VramParts:
    """Expected bytes per part on each of the GPUs, which all hold the same.

    The KV cache is 0 when nothing is left for it; `total_bytes` then exceeds `limit_bytes` by what is missing.
    """
    linears, quant_state = layer_bytes(shape, choices)
    rotary = shape.max_position * shape.head_dim * choices.dtype_bytes
    parts = VramParts(
        weights_bytes=linears - offloaded_bytes(shape, choices) + _other_bytes(shape, choices) + rotary,
        quant_state_bytes=quant_state, embeddings_bytes=_embeddings_bytes(shape, choices),
        offload_buffer_bytes=-(-linears // shape.layers) * choices.prefetch[2],
        kv_cache_bytes=0, activations_bytes=activations_bytes(shape, choices),
        cuda_graphs_bytes=_graphs_bytes(shape, choices),
        framework_bytes=CONTEXT_BYTES + _LIBRARIES_BYTES + _COLLECTIVES_BYTES * (choices.tensor_parallel > 1),
        limit_bytes=choices.limit_bytes)
    block = kv_bytes_per_token(shape, choices) * choices.block_size
    left = max(0, choices.limit_bytes - parts.total_bytes) // block * block
    return replace(parts, kv_cache_bytes=left if choices.kv_cache_bytes is None else choices.kv_cache_bytes)


def layer_bytes(shape: ModelShape, choices: Choices) -> tuple[int, int]:
    """(linear weights, quantization state) of all layers on one GPU, before any offload.

    NF4 holds two weights a byte and one absmax per 64 weights, which the plugin keeps as fp32 on the card whether or
    not the checkpoint nests it.
    """
    groups = shape.tensor_bytes
    if shape.quantization == "bitsandbytes":
        linears, state = groups.linears.bytes, groups.quant_state.parameters * 4
    elif shape.quantization:
        linears, state = groups.linears.bytes + groups.quant_state.bytes, 0
    elif choices.quantization == "bitsandbytes" and shape.architecture in DENSE:
        linears, state = groups.linears.parameters // 2, groups.linears.parameters // NF4_BLOCK * 4
    else:
        linears, state = groups.linears.parameters * choices.dtype_bytes, 0
    return -(-linears // choices.tensor_parallel), -(-state // choices.tensor_parallel)


def offloaded_bytes(shape: ModelShape, choices: Choices) -> int:
    """Weights of one GPU that lie in host memory instead."""
    linears, _ = layer_bytes(shape, choices)
    group, in_group, _ = choices.prefetch
    if group:
        layers = sum(1 for layer in range(shape.layers) if layer % group >= group - in_group)
        return linears * layers // shape.layers
    return min(linears, choices.offload_bytes)


def pinned_bytes(shape: ModelShape, choices: Choices) -> int:
    """Host memory that offload pins, all GPUs together: torch rounds every tensor up to a power of two."""
    offloaded = offloaded_bytes(shape, choices)
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    fused = [shape.hidden * (query + 2 * key_value), shape.hidden * query, 2 * shape.hidden * shape.intermediate,
             shape.hidden * shape.intermediate]  # the layer's parameters as vLLM holds them
    per_layer = layer_bytes(shape, choices)[0] / shape.layers
    exact = [round(per_layer * elements / sum(fused)) for elements in fused]
    rounded = sum(1 << (size - 1).bit_length() for size in exact if size)
    return round(offloaded * rounded / max(1, sum(exact))) * choices.tensor_parallel


def host_bytes(shape: ModelShape, choices: Choices, on_cpu: bool = False) -> int:
    """Host memory that all processes need together; `on_cpu` when the model itself runs there."""
    if on_cpu:
        linears, state = layer_bytes(shape, choices)
        return (_HOST_CPU_BYTES + linears + state + _other_bytes(shape, choices) + _embeddings_bytes(shape, choices)
                + activations_bytes(shape, choices) + (choices.kv_cache_bytes or 0))
    return _HOST_BYTES + _HOST_WORKER_BYTES * (choices.tensor_parallel - 1) + pinned_bytes(shape, choices)


def kv_bytes_per_token(shape: ModelShape, choices: Choices) -> int:
    """Keys and values of one token in every layer on one GPU; heads are copied where there are fewer than GPUs."""
    heads = max(1, -(-shape.kv_heads // choices.tensor_parallel))
    return 2 * shape.layers * heads * shape.head_dim * choices.kv_dtype_bytes


def kv_bytes(shape: ModelShape, choices: Choices, tokens: int) -> int:
    """The KV cache of that many tokens on one GPU, in whole blocks."""
    blocks = -(-tokens // choices.block_size)
    return blocks * choices.block_size * kv_bytes_per_token(shape, choices)


def activations_bytes(shape: ModelShape, choices: Choices) -> int:
    """The peak of vLLM's profile run: one MLP over all batched tokens, or the logits of all sequences.

    NF4 adds the bf16 copy of one projection that bitsandbytes makes for more than a few tokens, and its output.
    """
    tokens, inner = choices.max_num_batched_tokens, -(-shape.intermediate // choices.tensor_parallel)
    width = choices.dtype_bytes
    residual = 2 * tokens * shape.hidden * width
    mlp = 3 * tokens * inner * width
    if choices.quantization == "bitsandbytes":
        mlp += (tokens + shape.hidden) * inner * width
    logits = min(choices.max_num_seqs, tokens) * shape.vocab * _LOGITS_BYTES_PER_ENTRY
    return residual + max(mlp, logits)


def streamed_and_resident_bytes(shape: ModelShape, choices: Choices) -> tuple[int, int]:
    """Bytes that one GPU reads for one pass over the model: (over the link, from its own memory)."""
    linears, state = layer_bytes(shape, choices)
    offloaded = offloaded_bytes(shape, choices)
    head = _embeddings_bytes(shape, choices) // (1 if shape.tied_embeddings else 2)
    return offloaded, linears - offloaded + state + head + _other_bytes(shape, choices)


def _embeddings_bytes(shape: ModelShape, choices: Choices) -> int:
    """Embedding and output head, which every format of today leaves as they are; split over the GPUs."""
    groups = shape.tensor_bytes
    held = [groups.embedding] if shape.tied_embeddings else [groups.embedding, groups.lm_head]
    total = sum(group.bytes if shape.quantization else group.parameters * choices.dtype_bytes for group in held)
    return -(-total // choices.tensor_parallel)


def _other_bytes(shape: ModelShape, choices: Choices) -> int:
    """Norms and whatever else, whole on every GPU."""
    other = shape.tensor_bytes.other
    return other.bytes if shape.quantization else other.parameters * choices.dtype_bytes


def _graphs_bytes(shape: ModelShape, choices: Choices) -> int:
    """CUDA graphs: one whole and one in pieces for every size that vLLM captures."""
    if choices.eager:
        return 0
    most = min(2 * choices.max_num_seqs, 512)
    sizes = [size for size in (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)) if size <= most]
    return 2 * len(sizes) * shape.layers * _GRAPH_BYTES_PER_LAYER
