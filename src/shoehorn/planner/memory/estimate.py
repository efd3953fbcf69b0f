"""ModelShape x choices -> bytes per part on each GPU, on the host, and KV cache tokens.

Rules: plain arithmetic, no I/O; the KV cache takes what the other parts leave, as in vLLM; where a formula is derived
and not measured it errs upwards. docs/estimator.md gives every formula's source and what it was compared with.
"""

from __future__ import annotations

from dataclasses import replace

from shoehorn.common.units import GIB, MIB
from shoehorn.model.shape import ModelShape
from shoehorn.planner.memory import kv_cache
from shoehorn.planner.memory.activations import activations_bytes, graphs_bytes
from shoehorn.planner.memory.breakdown import VramParts
from shoehorn.planner.memory.offload import offloaded_bytes, offloaded_layers, pinned_bytes
from shoehorn.planner.memory.weights import embeddings_bytes, layer_bytes, other_bytes, rounding_bytes, stage_share
from shoehorn.planner.serving_config import Choices, drafting

CONTEXT_BYTES = 528 * MIB
"""The CUDA context that stands before vLLM first looks at the card, so that it never counts it."""

MARGIN_BYTES = 64 * MIB
"""Left free below the limit: the allocator rounds, and the driver's own need varies."""

_LIBRARIES_BYTES = 296 * MIB  # workspaces (cuBLAS, attention) and compiled kernels
_NF4_LIBRARIES_BYTES = 104 * MIB  # bitsandbytes' kernels
_COLLECTIVES_BYTES = 720 * MIB  # the engine's two NCCL communicators; over NVLink, where they have most channels
_COUNT_BYTES = 4  # the sampler counts every token of the vocabulary for every sequence

_HOST_BYTES = 4 * GIB  # API server and one engine process with CUDA
_HOST_WORKER_BYTES = 3 * GIB  # every further GPU's worker
_HOST_CPU_BYTES = 2 * GIB  # all processes of an engine on the CPU, without weights and KV cache


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
        weights_bytes=round((weights + absorbed) * share) - offloaded + round(other_bytes(shape, choices) * share)
        + round(rounding_bytes(shape, choices) * resident) + rotary + draft,
        quant_state_bytes=round(quant_state * share), embeddings_bytes=embeddings_bytes(shape, choices, stage),
        offload_buffer_bytes=-(-weights // shape.layers) * min(choices.prefetch[2],
                                                               offloaded_layers(shape, choices.prefetch)),
        kv_cache_bytes=0, activations_bytes=activations_bytes(shape, choices, stage),
        cuda_graphs_bytes=round(graphs_bytes(shape, choices) * share),
        framework_bytes=framework_bytes(shape, choices),
        limit_bytes=choices.limit_bytes)


def framework_bytes(shape: ModelShape, choices: Choices) -> int:
    """What a process of the engine holds besides the model: context, libraries, sampler state, collectives."""
    nf4 = "bitsandbytes" in (choices.quantization, shape.quantization)
    return (CONTEXT_BYTES + _LIBRARIES_BYTES + _NF4_LIBRARIES_BYTES * nf4 + _COLLECTIVES_BYTES * (choices.gpus > 1)
            + _COUNT_BYTES * choices.max_num_seqs * shape.vocab)


def host_bytes(shape: ModelShape, choices: Choices, on_cpu: bool = False) -> int:
    """Host memory that all processes need together; `on_cpu` when the model itself runs there."""
    if on_cpu:
        return (_HOST_CPU_BYTES + sum(layer_bytes(shape, choices)) + other_bytes(shape, choices)
                + embeddings_bytes(shape, choices) + _draft_bytes(choices) + activations_bytes(shape, choices)
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


def _draft_bytes(choices: Choices) -> int:
    """All that the draft's weights take on one GPU."""
    if choices.draft is None:
        return 0
    own = drafting(choices)
    parts = _without_cache(choices.draft, own, 0)
    return parts.weights_bytes + parts.quant_state_bytes + parts.embeddings_bytes
