"""Serves INT4 mixtures of experts from host memory: a patch of vLLM's method for compressed-tensors W4A16 experts.

Stock vLLM 0.32.0 has no cache of experts: its prefetch copies all experts in every pass, and its UVA offload is undone
by the Humming backend, which repacks the experts onto the GPU; the plan therefore asks for `--moe-backend marlin`.

Source: vLLM 0.32.0, compressed_tensors_moe_wna16.py; fused_moe/oracle/int_wna16.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import (
    WNA16MoEBackend,
    make_wna16_moe_kernel,
    make_wna16_moe_quant_config,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as engine,
)
from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_moe_padded_intermediate

from shoehorn_vllm.hybrid import hosted_experts
from shoehorn_vllm.hybrid.hosted_experts import HostedExperts, Names

_NAMES = Names(("w13_weight_packed", "w13_weight_scale"), ("w2_weight_packed", "w2_weight_scale"))


class CompressedTensorsWNA16MoEMethod(engine.CompressedTensorsWNA16MoEMethod):
    """The method with its experts in host memory; vLLM asks for it by this name."""

    requires_device_loading = False
    hosted: HostedExperts | None = None

    def create_weights(self, layer: torch.nn.Module, *arguments: Any, **named: Any) -> None:
        """Create the parameters, those of experts in pinned host memory."""
        options = hosted_experts.options()
        if options is None:
            super().create_weights(layer, *arguments, **named)
            return
        if not self.symmetric or self.num_bits != 4 or self.moe.has_bias or self.group_size == -1 or \
                self.wna16_backend != WNA16MoEBackend.MARLIN:
            raise hosted_experts.refuse(
                f"Experts of {self.num_bits} bits in groups of {self.group_size} with backend "
                f"{self.wna16_backend.value}, symmetric={self.symmetric}, bias={self.moe.has_bias}")
        with torch.device("meta"):
            super().create_weights(layer, *arguments, **named)
        self.hosted = HostedExperts(layer, _NAMES, options, self.moe.activation.value)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Fill the slots."""
        if self.hosted is None:
            super().process_weights_after_loading(layer)
            return
        inner = layer.intermediate_size_per_partition
        if marlin_moe_padded_intermediate(inner, self.group_size) != inner:
            raise hosted_experts.refuse(f"Experts of width {inner}, which the kernel pads")

        def kernel(tensors: Mapping[str, torch.Tensor]) -> Any:
            return make_wna16_moe_kernel(
                moe_quant_config=make_wna16_moe_quant_config(
                    w1_scale=tensors[_NAMES.up[1]], w2_scale=tensors[_NAMES.down[1]], group_size=self.group_size,
                    num_bits=4),
                moe_config=self.moe, experts_cls=self.experts_cls, backend=self.wna16_backend,
                routing_tables=layer._expert_routing_tables())

        self.hosted.finish(layer, kernel, self.moe.experts_per_token)
        layer.w13_weight, layer.w2_weight = layer.w13_weight_packed, layer.w2_weight_packed

    def apply(self, layer: Any, *arguments: Any, **named: Any) -> torch.Tensor:
        """The layer's output."""
        output: torch.Tensor = (super().apply if self.hosted is None else self.hosted.apply)(
            layer, *arguments, **named)
        return output


def apply() -> None:
    """Patch this process: vLLM looks the method up in its module when it builds a layer."""
    setattr(engine, "CompressedTensorsWNA16MoEMethod", CompressedTensorsWNA16MoEMethod)  # noqa: B010  # mypy: a type
