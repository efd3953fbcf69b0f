"""Mixtures of experts in INT4 on the CPU, as the engine's method for such layers.

Rules:
- the experts stay in the checkpoint's layout, [experts, rows, k / 8], in the memory they were loaded into;
- a mixture that the kernel does not support gets the engine's own method, which needs AMX.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    CompressedTensorsMoEMethod,
    compressed_tensors_moe_wna16,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (
    WNA16_SUPPORTED_TYPES_MAP,
)
from vllm.utils.torch_utils import direct_register_custom_op

from shoehorn_vllm.hybrid import linear, threads
from shoehorn_vllm.hybrid.kernel import products
from shoehorn_vllm.hybrid.kernel.products import ExpertWeights, PackedWeights

_EngineMethod: Any = compressed_tensors_moe_wna16.CompressedTensorsWNA16MoEMethod
_mixtures: list[ExpertWeights] = []


def apply() -> None:
    """Patch this process: the engine's class is replaced by the choice between it and ours."""
    setattr(compressed_tensors_moe_wna16, _EngineMethod.__name__, choose)


def choose(weight_quant: Any, input_quant: Any, moe: FusedMoEConfig, layer_name: str | None = None) -> Any:
    """Return our method for a mixture that the kernel supports, else the engine's."""
    group = -1 if weight_quant.group_size is None else weight_quant.group_size
    kind = WNA16_SUPPORTED_TYPES_MAP[weight_quant.num_bits]
    reason = linear.unsupported(kind, group, not weight_quant.symmetric, moe.in_dtype)
    if reason or moe.activation.value not in products.ACTIVATIONS:
        return _EngineMethod(weight_quant, input_quant, moe, layer_name)
    threads.logger.info_once("Using HostExpertsMethod for experts in INT4")
    return HostExpertsMethod(weight_quant, input_quant, moe)


class HostExpertsMethod(_EngineMethod):  # type: ignore[misc]  # its class is read at run time
    """The engine's method with its weights, and our kernel for the product."""

    def __init__(self, weight_quant: Any, input_quant: Any, moe: FusedMoEConfig) -> None:
        """Set what the engine's weights need, without choosing a backend: without AMX vLLM lacks one."""
        CompressedTensorsMoEMethod.__init__(self, moe)
        self.weight_quant, self.input_quant = weight_quant, input_quant
        self.symmetric, self.num_bits, self.strategy = True, 4, weight_quant.strategy
        self.packed_factor, self.group_size = 8, weight_quant.group_size

    @property
    def supports_eplb(self) -> bool:
        """Return False: experts do not move."""
        return False

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take the weights as they are, and start the threads."""
        threads.start()
        bias = {name: getattr(layer, name).data if self.moe.has_bias else None for name in ("w13_bias", "w2_bias")}
        optional = {name: float(value) for name, value in (
            ("alpha", getattr(layer, "swiglu_alpha", None)), ("limit", getattr(layer, "swiglu_limit", None)))
            if value is not None}
        _mixtures.append(ExpertWeights(
            PackedWeights(layer.w13_weight_packed.data, layer.w13_weight_scale.data),
            PackedWeights(layer.w2_weight_packed.data, layer.w2_weight_scale.data),
            self.moe.activation.value, bias["w13_bias"], bias["w2_bias"], **optional))
        self.number = len(_mixtures) - 1

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        """Return None: the engine's kernels are not used."""

    def apply(self, layer: RoutedExperts, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
              shared_experts: Any, shared_experts_input: torch.Tensor | None) -> torch.Tensor:
        """Return the chosen experts' weighted sum; the engine adds shared experts itself."""
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)  # of one expert a token
        result: torch.Tensor = torch.ops.vllm.shoehorn_host_experts(x, topk_weights, topk_ids, self.number)
        return result


def _host_experts(x: torch.Tensor, router_weights: torch.Tensor, ids: torch.Tensor, number: int) -> torch.Tensor:
    return products.experts(_mixtures[number], x, router_weights, ids)


def _host_experts_shape(x: torch.Tensor, router_weights: torch.Tensor, ids: torch.Tensor, number: int) -> torch.Tensor:
    return torch.empty_like(x)


direct_register_custom_op("shoehorn_host_experts", _host_experts, fake_impl=_host_experts_shape, dispatch_key="CPU")
