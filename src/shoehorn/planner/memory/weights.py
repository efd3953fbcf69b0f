"""Bytes of weights, quantization state and embeddings on each GPU."""

from __future__ import annotations

from shoehorn.common.units import MIB
from shoehorn.model.shape import ModelShape
from shoehorn.planner.serving_config import Choices

NF4_BLOCK = 64
"""Weights that share one absmax in bitsandbytes' NF4."""

_INT4_BITS = 4 + 16 / 128  # one bf16 scale per 128 weights


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


def layer_tensors(shape: ModelShape, choices: Choices) -> list[int]:
    """Bytes of a layer's parameters on one GPU as vLLM holds them: queries, keys and values in one, gate and up too."""
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inner = shape.experts.count * shape.experts.intermediate if shape.experts else shape.intermediate
    fused = [shape.hidden * (query + 2 * key_value), shape.hidden * query, 2 * shape.hidden * inner,
             shape.hidden * inner]
    per_layer = layer_bytes(shape, choices)[0] / shape.layers
    return [round(per_layer * elements / sum(fused)) for elements in fused]


def rounding_bytes(shape: ModelShape, choices: Choices) -> int:
    """What torch's allocator adds: a tensor of 10 MiB or more takes whole pieces of 2 MiB (CUDACachingAllocator).

    Packed checkpoints hold several tensors where others hold one; theirs are not followed.
    """
    if shape.quantization:
        return 0
    lost = sum(-size % (2 * MIB) for size in layer_tensors(shape, choices) if size >= 10 * MIB)
    return lost * shape.layers


def head_bytes(shape: ModelShape, choices: Choices) -> int:
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


def embeddings_bytes(shape: ModelShape, choices: Choices, stage: int = 0) -> int:
    """Embedding and output head, as the checkpoint has them; split over the GPUs of a stage."""
    first, last = stage == 0, stage == choices.pipeline_parallel - 1
    here = (first and not choices.embedding_on_host) or (last and shape.tied_embeddings)
    return (embedding_bytes(shape, choices) if here else 0) + (
        head_bytes(shape, choices) if last and not shape.tied_embeddings else 0)


def other_bytes(shape: ModelShape, choices: Choices) -> int:
    """Norms and whatever else, whole on every GPU."""
    other = shape.tensor_bytes.other
    return other.bytes if shape.quantization else other.parameters * choices.dtype_bytes
