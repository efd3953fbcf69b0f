"""Bytes of activations, CUDA graphs, compilation and loading."""

from __future__ import annotations

from shoehorn.model.shape import ModelShape
from shoehorn.planner.memory.offload import offloaded_bytes
from shoehorn.planner.memory.weights import embedding_bytes, head_bytes, layer_tensors
from shoehorn.planner.serving_config import Choices, drafting

_RESIDUAL_WIDTHS = 9  # activations of a layer's width that live at once, besides the MLP's three
_GRAPH_BYTES_PER_LAYER = 192 << 10
_GRAPH_SUMS_BYTES_PER_LAYER = 640 << 10  # what NCCL keeps for the two all-reduces of a layer, of a graph of each kind
_GRAPH_NF4_BYTES_PER_LAYER = 400 << 10
_LOGITS_BYTES_PER_ENTRY = 14  # bf16, then fp32 for the logits, their filtered copy and the probabilities

_STRANGER = 1.5  # activations of an architecture that is not known


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
    largest = max(*layer_tensors(shape, choices), head_bytes(shape, choices) if shape.quantization else 0)
    nf4 = "bitsandbytes" in (choices.quantization, shape.quantization)
    if nf4 and not shape.quantization:
        largest = max(largest, shape.hidden * shape.intermediate * choices.dtype_bytes // choices.tensor_parallel)
    absmax = offloaded_bytes(shape, choices) // 32 if nf4 and choices.prefetch[0] else 0  # it moves last, all at once
    draft = loading_bytes(choices.draft, drafting(choices)) if choices.draft else 0  # it comes after the model
    return max(largest + embedding_bytes(shape, choices) * choices.embedding_on_host + absmax, draft)


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


def unpacked_bytes(shape: ModelShape, choices: Choices) -> int:
    """What one GPU writes in a pass to unpack experts in NF4: all of every layer, whichever the tokens pass.

    Source: vllm_bnb_plugin/quantization/fused_moe.py, _apply_4bit_dequnt.
    """
    if not shape.experts or "bitsandbytes" not in (choices.quantization, shape.quantization):
        return 0
    each = 3 * shape.hidden * shape.experts.intermediate
    return -(-shape.layers * shape.experts.count * each * choices.dtype_bytes // choices.tensor_parallel)


def graphs_bytes(shape: ModelShape, choices: Choices) -> int:
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
