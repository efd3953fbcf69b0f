"""Serves gpt-oss' experts in MXFP4 from host memory: a patch of vLLM's method for them.

As `cached_experts` does for INT4; the plan asks for `--moe-backend marlin`, whose kernel multiplies what is on the GPU.
The engine pads both sizes for it; the padding is zeros, in host memory too.

Source: vLLM 0.32.0, layers/quantization/mxfp4.py; fused_moe/oracle/mxfp4.py; utils/marlin_utils_fp4.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import (
    Mxfp4MoeBackend,
    make_mxfp4_moe_kernel,
    make_mxfp4_moe_quant_config,
)
from vllm.model_executor.layers.quantization import mxfp4 as engine

from shoehorn_vllm.hybrid import hosted_experts
from shoehorn_vllm.hybrid.hosted_experts import HostedExperts, Names

_NAMES = Names(("w13_weight", "w13_weight_scale"), ("w2_weight", "w2_weight_scale"), ("w13_bias", "w2_bias"))
_ALPHA, _BETA, _LIMIT = 1.702, 1.0, 7.0  # of gpt-oss' activation, as in GptOssMxfp4MoEMethod


class GptOssMxfp4MoEMethod(engine.GptOssMxfp4MoEMethod):
    """The method with its experts in host memory; vLLM asks for it by this name."""

    requires_device_loading = False
    hosted: HostedExperts | None = None

    def create_weights(self, layer: Any, *arguments: Any, **named: Any) -> None:
        """Create the parameters, those of experts in pinned host memory."""
        options = hosted_experts.options()
        if options is None:
            super().create_weights(layer, *arguments, **named)
            return
        if self.mxfp4_backend != Mxfp4MoeBackend.MARLIN or not self.moe.has_bias:
            raise hosted_experts.refuse(
                f"MXFP4 experts with backend {self.mxfp4_backend.value}, bias={self.moe.has_bias}")
        with torch.device("meta"):
            super().create_weights(layer, *arguments, **named)
        self.hosted = HostedExperts(layer, _NAMES, options, self.moe.activation.value)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Fill the slots."""
        if self.hosted is None:
            super().process_weights_after_loading(layer)
            return

        def kernel(tensors: Mapping[str, torch.Tensor]) -> Any:
            config = make_mxfp4_moe_quant_config(
                mxfp4_backend=self.mxfp4_backend, w1_scale=tensors[_NAMES.up[1]].view(torch.float8_e8m0fnu),
                w2_scale=tensors[_NAMES.down[1]].view(torch.float8_e8m0fnu), w1_bias=tensors[_NAMES.biases[0]],
                w2_bias=tensors[_NAMES.biases[1]], gemm1_alpha=_ALPHA, gemm1_beta=_BETA, swiglu_limit=_LIMIT,
                layer=layer)
            if config is None or self.experts_cls is None:
                raise hosted_experts.refuse("MXFP4 experts without a kernel of the engine")
            return make_mxfp4_moe_kernel(
                moe_quant_config=config, moe_config=self.moe, mxfp4_backend=self.mxfp4_backend,
                experts_cls=self.experts_cls, routing_tables=layer._expert_routing_tables())

        self.hosted.finish(layer, kernel, self.moe.experts_per_token)

    def apply(self, layer: Any, *arguments: Any, **named: Any) -> Any:
        """The layer's output."""
        return (super().apply if self.hosted is None else self.hosted.apply)(layer, *arguments, **named)


def apply() -> None:
    """Patch this process: vLLM looks the method up in its module when it builds a layer."""
    setattr(engine, "GptOssMxfp4MoEMethod", GptOssMxfp4MoEMethod)  # noqa: B010  # mypy: a type
