"""ModelShape x choices -> bytes per part on each GPU, on the host, and KV cache tokens.

Rules: plain arithmetic, no I/O; the KV cache takes what the other parts leave, as in vLLM; where a formula is derived
and not measured it errs upwards. docs/estimator.md gives every formula's source and what it was compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shoehorn import kv_cache
from shoehorn.checkpoint import ModelShape
from shoehorn.units import GIB, MIB
from shoehorn.vram_parts import VramParts

NF4_BLOCK = 64
"""Weights that share one absmax in bitsandbytes' NF4."""

CONTEXT_BYTES = 528 * MIB
"""The CUDA context that stands before vLLM first looks at the card, so that it never counts it."""

MARGIN_BYTES = 64 * MIB
"""Left free below the limit: the allocator rounds, and the driver's own need varies."""

_LIBRARIES_BYTES = 296 * MIB  # workspaces (cuBLAS, attention) and compiled kernels
_NF4_LIBRARIES_BYTES = 104 * MIB  # bitsandbytes' kernels
_COLLECTIVES_BYTES = 720 * MIB  # the engine's two NCCL communicators; over NVLink, where they have most channels
_COUNT_BYTES = 4  # the sampler counts every token of the vocabulary for every sequence
_RESIDUAL_WIDTHS = 9  # activations of a layer's width that live at once, besides the MLP's three
_GRAPH_BYTES_PER_LAYER = 192 << 10
_GRAPH_SUMS_BYTES_PER_LAYER = 640 << 10  # what NCCL keeps for the two all-reduces of a layer, of a graph of each kind
_GRAPH_NF4_BYTES_PER_LAYER = 400 << 10
_LOGITS_BYTES_PER_ENTRY = 14  # bf16, then fp32 for the logits, their filtered copy and the probabilities
_INT4_BITS = 4 + 16 / 128  # one bf16 scale per 128 weights
_STRANGER = 1.5  # activations of an architecture that is not known
_HOST_BYTES = 4 * GIB  # API server and one engine process with CUDA
_HOST_WORKER_BYTES = 3 * GIB  # every further GPU's worker
_HOST_CPU_BYTES = 2 * GIB  # all processes of an engine on the CPU, without weights and KV cache


@dataclass(frozen=True)
class Choices:
    """What is decided about a start, as far as it takes memory.

    Attributes:
        limit_bytes: of one GPU, everything counted, as NVML shows it.
        quantization: `bitsandbytes` (NF4 made while loading, or as the checkpoint is), `int4` (W4A16 in groups of 128),
            or None: as the checkpoint is.
        dtype_bytes: of one unquantized weight or activation; kv_dtype_bytes: of one entry of the KV cache.
        offload_bytes: UVA offload, at most this per GPU (vLLM's cpu-offload-gb).
        prefetch: (group size, layers offloaded in a group, steps ahead); all 0 without prefetch offload.
        embedding_on_host: the embedding lies in host memory, and the card reads the rows it needs.
        kv_cache_bytes: the KV cache per GPU where it is fixed; else None, and it takes what is left.
        draft: the draft model of speculative decoding, none of it in host memory.
        speculative_tokens: that are guessed, by a draft or otherwise, and then checked in one pass.
        capture_limit: tokens of the largest batch that has a CUDA graph; None leaves it to the engine.
    """

    limit_bytes: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    quantization: str | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    offload_bytes: int = 0
    prefetch: tuple[int, int, int] = (0, 0, 0)
    embedding_on_host: bool = False
    dtype_bytes: int = 2
    kv_dtype_bytes: float = 2
    block_size: int = 16
    eager: bool = False
    kv_cache_bytes: int | None = None
    draft: ModelShape | None = None
    speculative_tokens: int = 0
    capture_limit: int | None = None

    @property
    def gpus(self) -> int:
        """How many GPUs the model is divided over."""
        return self.tensor_parallel * self.pipeline_parallel


def estimate(shape: ModelShape, choices: Choices) -> tuple[VramParts, ...]:
    """Expected bytes per part on each GPU, in the order of the pipeline's stages.

    The KV cache is 0 when nothing is left for it; `total_bytes` then exceeds `limit_bytes` by what is missing. Every
    GPU gets the same number of blocks, those that the fullest one has room for.
    """
    bare = [_without_cache(shape, choices, stage) for stage in range(choices.pipeline_parallel)]
    layouts = [_layout(shape, choices, stage) for stage in range(choices.pipeline_parallel)]
    if choices.kv_cache_bytes is None:
        blocks = min(max(0, choices.limit_bytes - MARGIN_BYTES - parts.total_bytes) // layout.block_bytes
                     for parts, layout in zip(bare, layouts, strict=True))
        caches = [blocks * layout.block_bytes for layout in layouts]
    else:
        caches = [choices.kv_cache_bytes] * len(layouts)
    return tuple(replace(parts, kv_cache_bytes=cache) for parts, cache in zip(bare, caches, strict=True)
                 for _ in range(choices.tensor_parallel))


def _without_cache(shape: ModelShape, choices: Choices, stage: int) -> VramParts:
    weights, quant_state = layer_bytes(shape, choices)
    share = stage_share(shape, choices, stage)
    draft = _draft_bytes(choices)
    rotary = shape.rotary_positions * shape.head_dim * choices.dtype_bytes
    absorbed = -(-shape.absorbed_parameters * choices.dtype_bytes // choices.tensor_parallel)
    offloaded = offloaded_bytes(shape, choices, stage)
    resident = share - offloaded / max(1, weights)
    return VramParts(
        weights_bytes=round((weights + absorbed) * share) - offloaded + round(_other_bytes(shape, choices) * share)
        + round(_rounding_bytes(shape, choices) * resident) + rotary + draft,
        quant_state_bytes=round(quant_state * share), embeddings_bytes=_embeddings_bytes(shape, choices, stage),
        offload_buffer_bytes=-(-weights // shape.layers) * min(choices.prefetch[2],
                                                               offloaded_layers(shape, choices.prefetch)),
        kv_cache_bytes=0, activations_bytes=activations_bytes(shape, choices, stage),
        cuda_graphs_bytes=round(_graphs_bytes(shape, choices) * share),
        framework_bytes=framework_bytes(shape, choices),
        limit_bytes=choices.limit_bytes)


def drafting(choices: Choices) -> Choices:
    """The choices as they are for the draft alone: on the card, without CUDA graphs, in NF4 if the model is.

    Source: vllm/v1/worker/gpu/spec_decode/standalone_ar/speculator.py; the loader of NF4 loads both.
    """
    nf4 = choices.draft and not choices.draft.quantization and choices.quantization == "bitsandbytes"
    return replace(choices, draft=None, speculative_tokens=0, offload_bytes=0, prefetch=(0, 0, 0), eager=True,
                   pipeline_parallel=1, embedding_on_host=False, quantization="bitsandbytes" if nf4 else None)


def framework_bytes(shape: ModelShape, choices: Choices) -> int:
    """What a process of the engine holds besides the model: context, libraries, sampler state, collectives."""
    nf4 = "bitsandbytes" in (choices.quantization, shape.quantization)
    return (CONTEXT_BYTES + _LIBRARIES_BYTES + _NF4_LIBRARIES_BYTES * nf4 + _COLLECTIVES_BYTES * (choices.gpus > 1)
            + _COUNT_BYTES * choices.max_num_seqs * shape.vocab)


def compiling_bytes(shape: ModelShape, choices: Choices) -> int:
    """What torch.compile needs for a moment before the KV cache is made: a copy of the embedding as it is held.

    0 when eager.
    """
    if choices.eager:
        return 0
    return embedding_bytes(shape, choices) + choices.max_num_batched_tokens * choices.dtype_bytes * shape.hidden


def loading_bytes(shape: ModelShape, choices: Choices) -> int:
    """What the load needs for a moment beside the weights: a copy of the largest matrix, and an embedding that moves.

    A packed matrix is repacked for the kernel, one that is offloaded or quantized comes to the card first.
    """
    largest = max(*_layer_tensors(shape, choices), _head_bytes(shape, choices) if shape.quantization else 0)
    nf4 = "bitsandbytes" in (choices.quantization, shape.quantization)
    if nf4 and not shape.quantization:
        largest = max(largest, shape.hidden * shape.intermediate * choices.dtype_bytes // choices.tensor_parallel)
    absmax = offloaded_bytes(shape, choices) // 32 if nf4 and choices.prefetch[0] else 0  # it moves last, all at once
    draft = loading_bytes(choices.draft, drafting(choices)) if choices.draft else 0  # it comes after the model
    return max(largest + embedding_bytes(shape, choices) * choices.embedding_on_host + absmax, draft)


def stage_share(shape: ModelShape, choices: Choices, stage: int) -> float:
    """The share of the layers that a stage of the pipeline holds; what does not divide goes to the middle stages.

    Source: vllm/distributed/utils.py, get_pp_indices.
    """
    stages = choices.pipeline_parallel
    each, rest = divmod(shape.layers, stages)
    extra = set(range(stages - 1 - rest, stages - 1)) if rest < stages - 1 or stages == 1 else set(range(1, stages))
    return (each + (stage in extra)) / shape.layers


def layer_bytes(shape: ModelShape, choices: Choices) -> tuple[int, int]:
    """(weights, quantization state) of all layers on one GPU of each stage, experts too, before any offload.

    NF4 holds two weights a byte and one absmax per 64 weights, which the loader keeps as fp32 on the card whether or
    not the checkpoint nests it; but for prefetch, where that of linear layers stays nested (one byte, and fp32 for each
    256 of them) and belongs to the weights.
    """
    groups = shape.tensor_bytes
    parameters = groups.linears.parameters + groups.experts.parameters
    stored = groups.linears.bytes + groups.experts.bytes
    nested = groups.linears.parameters // NF4_BLOCK if choices.prefetch[0] else 0
    if shape.quantization == "bitsandbytes":
        whole = groups.quant_state.parameters
        nested = min(whole, nested * 2)  # two weights are one parameter of the file
        weights, state = stored + nested * 65 // 64, (whole - nested) * 4
    elif shape.quantization:
        weights, state = stored + groups.quant_state.bytes, 0
    elif choices.quantization == "bitsandbytes" and shape.understood:
        weights, state = parameters // 2 + nested * 65 // 64, (parameters // NF4_BLOCK - nested) * 4
    elif choices.quantization == "int4" and shape.understood:
        weights, state = round(parameters * _INT4_BITS / 8), 0
    else:
        weights, state = parameters * choices.dtype_bytes, 0
    return -(-weights // choices.tensor_parallel), -(-state // choices.tensor_parallel)


def offloaded_bytes(shape: ModelShape, choices: Choices, stage: int = 0) -> int:
    """Weights of one GPU that lie in host memory instead."""
    weights = round(layer_bytes(shape, choices)[0] * stage_share(shape, choices, stage))
    if choices.prefetch[0]:
        return weights * offloaded_layers(shape, choices.prefetch) // shape.layers
    return min(weights, choices.offload_bytes)


def offloaded_layers(shape: ModelShape, prefetch: tuple[int, int, int]) -> int:
    """How many layers such a prefetch offload takes: the last ones of each group."""
    group, in_group, _ = prefetch
    return sum(1 for layer in range(shape.layers) if layer % group >= group - in_group) if group else 0


def pinned_bytes(shape: ModelShape, choices: Choices) -> int:
    """Host memory that offload pins, all GPUs together."""
    offloaded = sum(offloaded_bytes(shape, choices, stage) for stage in range(choices.pipeline_parallel))
    return (offloaded + embedding_bytes(shape, choices) * choices.embedding_on_host) * choices.tensor_parallel


def _layer_tensors(shape: ModelShape, choices: Choices) -> list[int]:
    """Bytes of a layer's parameters on one GPU as vLLM holds them: queries, keys and values in one, gate and up too."""
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inner = shape.experts.count * shape.experts.intermediate if shape.experts else shape.intermediate
    fused = [shape.hidden * (query + 2 * key_value), shape.hidden * query, 2 * shape.hidden * inner,
             shape.hidden * inner]
    per_layer = layer_bytes(shape, choices)[0] / shape.layers
    return [round(per_layer * elements / sum(fused)) for elements in fused]


def _rounding_bytes(shape: ModelShape, choices: Choices) -> int:
    """What torch's allocator adds: a tensor of 10 MiB or more takes whole pieces of 2 MiB (CUDACachingAllocator).

    Packed checkpoints hold several tensors where others hold one; theirs are not followed.
    """
    if shape.quantization:
        return 0
    lost = sum(-size % (2 * MIB) for size in _layer_tensors(shape, choices) if size >= 10 * MIB)
    return lost * shape.layers


def host_bytes(shape: ModelShape, choices: Choices, on_cpu: bool = False) -> int:
    """Host memory that all processes need together; `on_cpu` when the model itself runs there."""
    if on_cpu:
        return (_HOST_CPU_BYTES + sum(layer_bytes(shape, choices)) + _other_bytes(shape, choices)
                + _embeddings_bytes(shape, choices) + _draft_bytes(choices) + activations_bytes(shape, choices)
                + (choices.kv_cache_bytes or 0))
    return _HOST_BYTES + _HOST_WORKER_BYTES * (choices.gpus - 1) + pinned_bytes(shape, choices)


def kv_tokens(shape: ModelShape, choices: Choices, cache_bytes: int) -> int:
    """Tokens of all requests together in a cache of that size on the first stage."""
    return _layout(shape, choices).tokens(cache_bytes)


def kv_bytes(shape: ModelShape, choices: Choices, requests: int = 1) -> int:
    """The KV cache on one GPU for that many requests of full length, in whole blocks."""
    return max(_layout(shape, choices, stage).bytes_for(requests) for stage in range(choices.pipeline_parallel))


def _layout(shape: ModelShape, choices: Choices, stage: int = 0) -> kv_cache.KvLayout:
    own = kv_cache.layout(shape, choices.max_model_len, choices.block_size, choices.kv_dtype_bytes,
                          choices.max_num_batched_tokens, choices.tensor_parallel,
                          stage_share(shape, choices, stage))
    if choices.draft is None:
        return own
    draft = kv_cache.layout(choices.draft, choices.max_model_len, choices.block_size, choices.kv_dtype_bytes,
                            choices.max_num_batched_tokens, choices.tensor_parallel)
    return replace(own, block_bytes=own.block_bytes + draft.block_bytes)


def activations_bytes(shape: ModelShape, choices: Choices, stage: int = 0) -> int:
    """The peak of vLLM's profile run: one layer over all batched tokens, or the logits of all sequences.

    NF4 adds the bf16 copy of one projection that bitsandbytes makes for more than a few tokens, and its output; of a
    mixture it unpacks all experts of a layer.
    """
    tokens, inner = choices.max_num_batched_tokens, -(-shape.intermediate // choices.tensor_parallel)
    width = choices.dtype_bytes
    residual = _RESIDUAL_WIDTHS * tokens * shape.hidden * width
    layer = 3 * tokens * inner * width
    if shape.experts:
        each = -(-shape.experts.intermediate // choices.tensor_parallel)
        layer = max(layer, tokens * shape.experts.per_token * (2 * each + max(each, shape.hidden)) * width)
    if "bitsandbytes" in (choices.quantization, shape.quantization):
        layer += (tokens + shape.hidden) * inner * width
        layer += unpacked_bytes(shape, choices) // shape.layers
    last = stage == choices.pipeline_parallel - 1
    sampled = min(choices.max_num_seqs * (1 + choices.speculative_tokens), tokens)
    logits = sampled * shape.vocab * _LOGITS_BYTES_PER_ENTRY if last else 0
    return round(max(residual + layer, logits) * (1 if shape.understood else _STRANGER))


def moved_bytes(shape: ModelShape, choices: Choices, requests: int = 1) -> tuple[int, int]:
    """Bytes that one GPU reads for one pass over the model: (over the link, from its own memory).

    Of a mixture's experts only those that some token passes are read from the card; what is offloaded by prefetch
    crosses the link whole.
    """
    weights, state = layer_bytes(shape, choices)
    groups = shape.tensor_bytes
    active = 1.0
    if shape.experts and not unpacked_bytes(shape, choices):
        touched = 1 - (1 - shape.experts.per_token / shape.experts.count) ** requests
        whole = groups.linears.bytes + groups.experts.bytes
        active = (groups.linears.bytes + touched * groups.experts.bytes) / max(1, whole)
    offloaded = sum(offloaded_bytes(shape, choices, stage) for stage in range(choices.pipeline_parallel))
    head = _head_bytes(shape, choices)
    streamed = offloaded if choices.prefetch[0] else round(offloaded * active)
    return streamed, round((weights - offloaded + state) * active) + head + _other_bytes(shape, choices)


def unpacked_bytes(shape: ModelShape, choices: Choices) -> int:
    """What one GPU writes in a pass to unpack experts in NF4: all of every layer, whichever the tokens pass.

    Source: vllm_bnb_plugin/quantization/fused_moe.py, _apply_4bit_dequnt.
    """
    if not shape.experts or "bitsandbytes" not in (choices.quantization, shape.quantization):
        return 0
    each = 3 * shape.hidden * shape.experts.intermediate
    return -(-shape.layers * shape.experts.count * each * choices.dtype_bytes // choices.tensor_parallel)


def _head_bytes(shape: ModelShape, choices: Choices) -> int:
    """The output head, or the embedding that serves as one, on one GPU."""
    groups = shape.tensor_bytes
    group = groups.embedding if shape.tied_embeddings else groups.lm_head
    return -(-(group.bytes if shape.quantization else group.parameters * choices.dtype_bytes)
             // choices.tensor_parallel)


def embedding_bytes(shape: ModelShape, choices: Choices) -> int:
    """The embedding alone, on one GPU."""
    group = shape.tensor_bytes.embedding
    return -(-(group.bytes if shape.quantization else group.parameters * choices.dtype_bytes)
             // choices.tensor_parallel)


def _embeddings_bytes(shape: ModelShape, choices: Choices, stage: int = 0) -> int:
    """Embedding and output head, as the checkpoint has them; split over the GPUs of a stage."""
    first, last = stage == 0, stage == choices.pipeline_parallel - 1
    here = (first and not choices.embedding_on_host) or (last and shape.tied_embeddings)
    return (embedding_bytes(shape, choices) if here else 0) + (
        _head_bytes(shape, choices) if last and not shape.tied_embeddings else 0)


def _other_bytes(shape: ModelShape, choices: Choices) -> int:
    """Norms and whatever else, whole on every GPU."""
    other = shape.tensor_bytes.other
    return other.bytes if shape.quantization else other.parameters * choices.dtype_bytes


def _draft_bytes(choices: Choices) -> int:
    """All that the draft's weights take on one GPU."""
    if choices.draft is None:
        return 0
    own = drafting(choices)
    parts = _without_cache(choices.draft, own, 0)
    return parts.weights_bytes + parts.quant_state_bytes + parts.embeddings_bytes


def _graphs_bytes(shape: ModelShape, choices: Choices) -> int:
    """CUDA graphs: one whole and one in pieces for every size that vLLM captures, together so much a layer."""
    if choices.eager:
        return 0
    nf4 = "bitsandbytes" in (choices.quantization, shape.quantization)
    per_layer = _GRAPH_NF4_BYTES_PER_LAYER if nf4 else _GRAPH_BYTES_PER_LAYER
    sums = _GRAPH_SUMS_BYTES_PER_LAYER * (choices.tensor_parallel > 1)
    return len(captured_sizes(choices)) * shape.layers * (per_layer + sums)


def captured_sizes(choices: Choices) -> list[int]:
    """The batch sizes that vLLM captures graphs for (vllm/config/vllm.py, _set_cudagraph_sizes)."""
    most = choices.capture_limit or min(2 * choices.max_num_seqs * (1 + choices.speculative_tokens), 512)
    return [size for size in (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)) if size <= most]
