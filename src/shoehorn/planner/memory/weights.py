"""Bytes of weights, quantization state and embeddings on one GPU of each stage, before any offload."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from shoehorn.common.units import MIB, ceil_div
from shoehorn.model.shape import ModelShape, TensorGroup
from shoehorn.planner.memory.items import active_modalities
from shoehorn.planner.serving_config import PrefetchOffload, ServingConfig, WeightFormat, weight_format

NF4_BLOCK = 64
"""Weights that share one absmax in bitsandbytes' NF4."""

_MXFP4_HIDDEN, _MXFP4_INNER = 256, 128
"""The kernel of experts in MXFP4 (Marlin) pads both widths to multiples of these."""

_ALLOCATOR_PIECE, _LARGE_TENSOR = 2 * MIB, 10 * MIB


@dataclass(frozen=True)
class Weights:
    """Weights of a model in a configuration. All sizes are of one GPU; tensor parallelism divides most of them."""

    shape: ModelShape
    config: ServingConfig

    @cached_property
    def format(self) -> WeightFormat:
        """Format of the layers' weights."""
        return weight_format(self.shape, self.config)

    def divided(self, size: int) -> int:
        """Share of one GPU of a stage, rounded up."""
        return ceil_div(size, self.config.parallelism.tensor)

    @cached_property
    def _layers(self) -> tuple[int, int]:
        """Compute bytes of (weights, quantization state) of all layers, experts included, undivided.

        NF4 holds two weights a byte and one absmax per 64 weights. The loader keeps the absmax as fp32 on the GPU even
        if the checkpoint nests it. Only prefetch leaves that of linear layers nested (one byte, and fp32 for each 256
        of them); it then belongs to the weights.
        """
        groups = self.shape.tensor_bytes
        parameters = groups.linears.parameters + groups.experts.parameters
        stored = groups.linears.bytes + groups.experts.bytes + self._added_expert_bytes
        nested = groups.linears.parameters // NF4_BLOCK if isinstance(self.config.offload, PrefetchOffload) else 0
        if self.format is WeightFormat.NF4_CHECKPOINT:
            absmax = groups.quant_state.parameters
            nested = min(absmax, nested * 2)  # two weights are one parameter of the file
            return stored + nested * 65 // 64, (absmax - nested) * 4
        if self.format is WeightFormat.PACKED:
            return stored + groups.quant_state.bytes, 0
        if self.format is WeightFormat.NF4 and self.shape.plain:
            return parameters // 2 + nested * 65 // 64, (parameters // NF4_BLOCK - nested) * 4
        return round(parameters * (self.config.online_bytes or self.config.dtype_bytes)), 0

    @property
    def _added_expert_bytes(self) -> int:
        """Bytes that vLLM adds to packed experts, all GPUs of a stage together."""
        return self._expert_padding_bytes + self._smaller_groups_bytes

    @property
    def _expert_padding_bytes(self) -> int:
        """Bytes by which vLLM pads experts in MXFP4, all GPUs of a stage together.

        Source: mxfp4_round_up_hidden_size_and_intermediate_size in vllm's fused_moe/oracle/mxfp4.py.
        """
        shape, tensor = self.shape, self.config.parallelism.tensor
        if not shape.experts or shape.quantization != "mxfp4":
            return 0
        inner = shape.experts.intermediate
        padded = _round_up(shape.hidden, _MXFP4_HIDDEN) * _round_up(self.divided(inner), _MXFP4_INNER) * tensor
        return round(shape.tensor_bytes.experts.bytes * (padded / (shape.hidden * inner) - 1))

    @property
    def _smaller_groups_bytes(self) -> int:
        """Bytes of further scales of experts in AWQ or GPTQ, whose groups vLLM halves until they divide one GPU's part.

        Source: vllm/model_executor/layers/quantization/moe_wna16.py, create_weights.
        """
        experts = self.shape.experts
        if not experts or not experts.group_size:
            return 0
        inner, factor = self.divided(experts.intermediate), 1
        while factor < experts.group_size and (inner % (experts.group_size // factor)
                                               or self.shape.hidden % (experts.group_size // factor)):
            factor *= 2
        if factor > 1 and experts.symmetric:  # that kernel keeps no zeros then
            return experts.scale_bytes * (factor - 1) - experts.zero_bytes
        return (experts.scale_bytes + experts.zero_bytes) * (factor - 1)

    @cached_property
    def layers_bytes(self) -> int:
        """Weights of all layers, divided over some or all GPUs of a stage."""
        size, stored = self._layers[0], self.shape.tensor_bytes
        added = self._added_expert_bytes if self.format is WeightFormat.PACKED else 0
        scale = (size - added) / max(1, stored.linears.bytes + stored.experts.bytes)
        tensor = self.config.parallelism.tensor
        few = [(min(tensor, gpus), round(part * scale)) for gpus, part in self.shape.few_gpus]
        return self.divided(size - sum(part for _, part in few)) + sum(ceil_div(part, gpus) for gpus, part in few)

    @cached_property
    def quant_state_bytes(self) -> int:
        """Quantization state of all layers."""
        return self.divided(self._layers[1])

    @cached_property
    def expert_layers(self) -> int:
        """Number of layers whose experts are cacheable; 0 for experts in other formats.

        A packed weight takes half a byte and an eighth of an element, its share of a 16-bit scale two bytes an element.
        """
        shape, stored = self.shape, self.shape.tensor_bytes.experts
        if not shape.experts or not shape.experts.cacheable:
            return 0
        if shape.quantization == "mxfp4":  # of gpt-oss, in every layer
            return shape.layers
        each = 3 * shape.hidden * shape.experts.intermediate * shape.experts.count
        return max(1, round(4 * (stored.bytes - 2 * stored.parameters) / each))

    @property
    def expert_bytes(self) -> int:
        """Size of one cacheable expert of one layer."""
        if not self.shape.experts or not self.expert_layers:
            return 0
        return self.divided(self.experts_bytes) // (self.expert_layers * self.shape.experts.count)

    @property
    def experts_bytes(self) -> int:
        """Experts of all layers, with the padding of those in MXFP4."""
        return self.shape.tensor_bytes.experts.bytes + self._expert_padding_bytes

    @cached_property
    def fused_tensors_bytes(self) -> tuple[int, ...]:
        """Sizes of one layer's parameters as vLLM fuses them: queries, keys and values in one, gate and up too."""
        shape = self.shape
        query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        inner = shape.experts.count * shape.experts.intermediate if shape.experts else shape.intermediate
        fused = [shape.hidden * (query + 2 * key_value), shape.hidden * query, 2 * shape.hidden * inner,
                 shape.hidden * inner]
        per_layer = self.layers_bytes / shape.layers
        return tuple(round(per_layer * elements / sum(fused)) for elements in fused)

    @cached_property
    def rounding_bytes(self) -> int:
        """Bytes that torch's allocator adds: a tensor of 10 MiB or more takes whole pieces of 2 MiB.

        Packed checkpoints hold several tensors where others hold one; theirs are not modelled.
        """
        if self.shape.quantization:
            return 0
        return self.shape.layers * sum(-size % _ALLOCATOR_PIECE for size in self.fused_tensors_bytes
                                       if size >= _LARGE_TENSOR)

    def _loaded_bytes(self, group: TensorGroup) -> int:
        """Size of unquantized tensors: as stored in a quantized checkpoint, else in the chosen dtype."""
        return group.bytes if self.shape.quantization else group.parameters * self.config.dtype_bytes

    @cached_property
    def embedding_bytes(self) -> int:
        """The embedding alone."""
        return self.divided(self._loaded_bytes(self.shape.tensor_bytes.embedding))

    @property
    def head_bytes(self) -> int:
        """The output head, or the embedding that serves as one."""
        if self.shape.tied_embeddings:
            return self.embedding_bytes
        return self.divided(self._loaded_bytes(self.shape.tensor_bytes.lm_head))

    def embeddings_bytes(self, stage: int) -> int:
        """Embedding and output head that one stage holds on the GPU."""
        first, last = stage == 0, stage == self.config.parallelism.pipeline - 1
        holds_embedding = (first and not self.config.embedding_on_host) or (last and self.shape.tied_embeddings)
        holds_head = last and not self.shape.tied_embeddings
        return self.embedding_bytes * holds_embedding + self.head_bytes * holds_head

    @cached_property
    def other_bytes(self) -> int:
        """Everything outside layers and embeddings: norms and small tensors whole, matrices of towers divided."""
        groups = self.shape.tensor_bytes
        whole, divided = self._loaded_bytes(groups.other), self._loaded_bytes(groups.divided)
        for encoder in self.shape.encoders:
            tower = self._loaded_bytes(encoder.divided)
            if not active_modalities(encoder, self.config):
                whole, divided = whole - self._loaded_bytes(encoder.whole), divided - tower
            elif self.config.items.whole_towers:
                whole, divided = whole + tower, divided - tower
        return whole + self.divided(divided)

    @property
    def rotary_bytes(self) -> int:
        """The rotary embedding's tables, whole on every GPU."""
        return self.shape.rotary_entries * self.config.dtype_bytes

    @property
    def absorbed_bytes(self) -> int:
        """Copies of projections that the engine keeps of compressed attention (MLA)."""
        return self.divided(self.shape.absorbed_parameters * self.config.dtype_bytes)

    def stage_layers(self, stage: int) -> int:
        """Layers of a pipeline stage; what does not divide goes to the middle stages.

        Source: vllm/distributed/utils.py, get_pp_indices.
        """
        if self.config.parallelism.layers:
            return self.config.parallelism.layers[stage]
        stages = self.config.parallelism.pipeline
        each, rest = divmod(self.shape.layers, stages)
        extra = range(stages - 1 - rest, stages - 1) if rest < stages - 1 or stages == 1 else range(1, stages)
        return each + (stage in extra)

    def stage_range(self, stage: int) -> range:
        """Numbers of the layers of a pipeline stage."""
        first = sum(self.stage_layers(before) for before in range(stage))
        return range(first, first + self.stage_layers(stage))

    def stage_share(self, stage: int) -> float:
        """Share of the layers that a pipeline stage holds."""
        return self.stage_layers(stage) / self.shape.layers


def _round_up(size: int, multiple: int) -> int:
    return ceil_div(size, multiple) * multiple
