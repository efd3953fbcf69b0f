"""Bytes of activations, CUDA graphs, compilation and loading on one GPU."""

from __future__ import annotations

from dataclasses import dataclass

from shoehorn.common.units import KIB
from shoehorn.planner.memory.items import items_bytes
from shoehorn.planner.memory.offload import OffloadedWeights
from shoehorn.planner.memory.weights import Weights
from shoehorn.planner.serving_config import ExpertCacheOffload, PrefetchOffload, ServingConfig, WeightFormat

_RESIDUAL_WIDTHS = 9  # activations of a layer's width that are alive at once, besides the MLP's three
_GRAPH_BYTES_PER_LAYER = 192 * KIB
_GRAPH_SUMS_BYTES_PER_LAYER = 640 * KIB  # NCCL's memory for the two all-reduces of a layer, of a graph of each kind
_GRAPH_NF4_BYTES_PER_LAYER = 400 * KIB
_LOGITS_BYTES_PER_ENTRY = 14  # bf16, then fp32 for the logits, their filtered copy and the probabilities
_UNKNOWN_ARCHITECTURE = 1.5  # factor on the activations


@dataclass(frozen=True)
class Activations:
    """Memory of a configuration besides weights and KV cache, without the draft model's."""

    weights: Weights

    @property
    def _config(self) -> ServingConfig:
        return self.weights.config

    def bytes(self, stage: int) -> int:
        """Compute the peak of vLLM's profile run: one layer over all batched tokens, or the logits of all sequences.

        NF4 adds the bf16 copy of one projection that bitsandbytes makes for more than a few tokens, and its output; of
        a mixture it unpacks all experts of a layer. The first stage has the encoders for images, videos and sound,
        which run before the layers, and their cache.
        """
        shape, config = self.weights.shape, self._config
        tokens, width = config.limits.max_num_batched_tokens, config.dtype_bytes
        inner = self.weights.divided(shape.intermediate)
        residual = _RESIDUAL_WIDTHS * tokens * shape.hidden * width
        layer = 3 * tokens * inner * width
        if shape.experts:
            each = self.weights.divided(shape.experts.intermediate)
            layer = max(layer, tokens * shape.experts.per_token * (2 * each + max(each, shape.hidden)) * width)
        if self.weights.format.is_nf4:
            layer += (tokens + shape.hidden) * inner * width + self.unpacked_experts_bytes // shape.layers
        last = stage == config.parallelism.pipeline - 1
        sampled = min(config.limits.max_num_seqs * (1 + config.speculation.draft_tokens), tokens)
        logits = sampled * shape.vocab * _LOGITS_BYTES_PER_ENTRY if last else 0
        text = round(max(residual + layer, logits) * (1 if shape.compared else _UNKNOWN_ARCHITECTURE))
        if stage:
            return text
        encoding, cached = items_bytes(shape, config)
        return max(text, encoding) + cached

    @property
    def unpacked_experts_bytes(self) -> int:
        """Experts in NF4 that a forward pass writes out as bf16: all of every layer, whichever the tokens pass.

        Source: vllm_bnb_plugin/quantization/fused_moe.py, _apply_4bit_dequnt.
        """
        shape = self.weights.shape
        if not shape.experts or not self.weights.format.is_nf4:
            return 0
        each = 3 * shape.hidden * shape.experts.intermediate
        return self.weights.divided(shape.layers * shape.experts.count * each * self._config.dtype_bytes)

    @property
    def graphs_bytes(self) -> int:
        """CUDA graphs of all layers: one whole and one in pieces for every batch size that vLLM captures."""
        if self._config.eager:
            return 0
        per_layer = _GRAPH_NF4_BYTES_PER_LAYER if self.weights.format.is_nf4 else _GRAPH_BYTES_PER_LAYER
        sums = _GRAPH_SUMS_BYTES_PER_LAYER * (self._config.parallelism.tensor > 1)
        return len(captured_sizes(self._config)) * self.weights.shape.layers * (per_layer + sums)

    @property
    def compiling_bytes(self) -> int:
        """Peak of torch.compile before the KV cache is allocated: a copy of the embedding. 0 when eager."""
        if self._config.eager:
            return 0
        batch = self._config.limits.max_num_batched_tokens * self._config.dtype_bytes * self.weights.shape.hidden
        return self.weights.embedding_bytes + batch

    @property
    def loading_bytes(self) -> int:
        """Peak of loading on top of the weights: a copy of the largest matrix, and an embedding that moves to the host.

        A packed matrix is repacked for the kernel; one that is offloaded or quantized is copied to the GPU first.
        Cached experts are read into host memory, and copied one by one.
        """
        shape, config, weights = self.weights.shape, self._config, self.weights
        copied = weights.fused_tensors_bytes
        if isinstance(config.offload, ExpertCacheOffload):
            copied = (*copied[:2], weights.expert_bytes)
        largest = max(*copied, weights.head_bytes if shape.quantization else 0)
        if weights.format is WeightFormat.NF4:
            whole = shape.hidden * shape.intermediate * config.dtype_bytes // config.parallelism.tensor
            largest = max(largest, whole)
        if weights.format is WeightFormat.UNQUANTIZED and config.online_bytes:  # a matrix is loaded, then quantized
            largest = round(largest * (1 + config.dtype_bytes / config.online_bytes))
        absmax = 0
        if weights.format.is_nf4 and isinstance(config.offload, PrefetchOffload):  # moves last, all at once
            absmax = OffloadedWeights(weights).stage_bytes(0) // 32
        return largest + weights.embedding_bytes * config.embedding_on_host + absmax


def captured_sizes(config: ServingConfig) -> list[int]:
    """List the batch sizes that vLLM captures graphs for (vllm/config/vllm.py, _set_cudagraph_sizes)."""
    sampled = config.limits.max_num_seqs * (1 + config.speculation.draft_tokens)
    largest = config.capture_limit or min(2 * sampled, 512)
    return [size for size in (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)) if size <= largest]


