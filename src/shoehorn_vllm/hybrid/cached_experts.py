"""Serves INT4 mixtures of experts from host memory: a patch of vLLM's method for compressed-tensors W4A16 experts.

With `--additional-config {"shoehorn": {"experts": {"slots": S, "scratch": W}}}` the experts of every layer stay in
pinned host memory, S of each layer have a copy on the GPU (`expert_cache`), and W is the size of the two scratch
buffers of large passes. Without it vLLM's own code runs. Stock vLLM 0.32.0 has no such cache: its prefetch copies all
experts in every pass, and its UVA offload is undone by the Humming backend, which repacks the experts onto the GPU;
the plan therefore asks for `--moe-backend marlin`.

Source: vLLM 0.32.0, compressed_tensors_moe_wna16.py; fused_moe/oracle/int_wna16.py (Marlin's post-processing).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import (
    WNA16MoEBackend,
    make_wna16_moe_kernel,
    make_wna16_moe_quant_config,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as engine,
)
from vllm.model_executor.layers.quantization.utils.marlin_utils import (
    marlin_moe_padded_intermediate,
    marlin_moe_permute_scales,
)
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.utils import replace_parameter
from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

from shoehorn_vllm.hybrid.expert_cache import ExpertCache
from shoehorn_vllm.hybrid.expert_waves import Tensors, Waves
from shoehorn_vllm.patches import pinned_memory
from shoehorn_vllm.patches.patch import Patch

log = logging.getLogger("vllm.shoehorn_vllm")

_NAMES = ("w13_weight_packed", "w13_weight_scale", "w2_weight_packed", "w2_weight_scale")
_CHUNK = 16  # experts that are repacked on the GPU at a time
_waves: dict[tuple[torch.Size, ...], tuple[Waves, list[Any]]] = {}  # by the experts' shapes
_host_bytes = 0


class UnsupportedExpertsError(RuntimeError):
    """The experts have a form that the cache does not serve."""


def options() -> dict[str, int]:
    """The cache's options of the model that is being built; empty where it has none."""
    additional = get_current_vllm_config().additional_config
    own = additional.get("shoehorn") if isinstance(additional, dict) else None
    experts = own.get("experts") if isinstance(own, dict) else None
    return experts if isinstance(experts, dict) else {}


class CompressedTensorsWNA16MoEMethod(engine.CompressedTensorsWNA16MoEMethod):
    """The method with its experts in host memory; vLLM asks for it by this name."""

    requires_device_loading = False

    def create_weights(self, layer: torch.nn.Module, *arguments: Any, **named: Any) -> None:
        """Create the parameters, those of experts in pinned host memory."""
        self.cache_options = options()
        if self.cache_options and (not self.symmetric or self.num_bits != 4 or self.moe.has_bias
                                   or self.wna16_backend != WNA16MoEBackend.MARLIN):
            raise UnsupportedExpertsError(
                f"Experts of {self.num_bits} bits with backend {self.wna16_backend.value}, symmetric={self.symmetric}, "
                f"bias={self.moe.has_bias}: no cache for them. Remove `experts` from --additional-config.")
        if not self.cache_options:
            super().create_weights(layer, *arguments, **named)
            return
        with torch.device("cpu"):
            super().create_weights(layer, *arguments, **named)
        for name in _NAMES:
            parameter = getattr(layer, name)
            parameter.data = pinned_memory.allocate_like(parameter.data)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Repack the experts for the kernel, in place in host memory, and fill the slots."""
        global _host_bytes
        if not self.cache_options:
            super().process_weights_after_loading(layer)
            return
        device = torch.device("cuda", torch.cuda.current_device())
        inner = layer.intermediate_size_per_partition
        if marlin_moe_padded_intermediate(inner, self.group_size) != inner:
            raise UnsupportedExpertsError(f"Experts of width {inner}: no cache for them, the kernel pads them. "
                                          "Remove `experts` from --additional-config.")
        host = [self._repacked(getattr(layer, name).data, name.endswith("scale"), device) for name in _NAMES]
        _host_bytes += sum(tensor.nbytes for tensor in host)
        first, second, third, fourth = (get_accelerator_view_from_cpu_tensor(tensor) for tensor in host)
        views: Tensors = (first, second, third, fourth)
        key = tuple(tensor.shape for tensor in host)
        if key not in _waves:
            waves = Waves(views, self.cache_options.get("scratch", 16), device)
            _waves[key] = waves, [self._kernel(layer, buffer) for buffer in waves.buffers]
        self.waves, self.scratch_kernels = _waves[key]
        slots, divided = self.cache_options["slots"], self.cache_options.get("divided", 0)
        self.cache = ExpertCache(views, slots, divided, device, self.waves)
        self.host = host  # the views do not keep it
        for name, tensor in zip(_NAMES, self.cache.tensors, strict=True):
            replace_parameter(layer, name, tensor)
        layer.w13_weight, layer.w2_weight = layer.w13_weight_packed, layer.w2_weight_packed
        self._setup_kernel(layer)

    def _repacked(self, data: torch.Tensor, scale: bool, device: torch.device) -> torch.Tensor:
        """[E, N, K / 8] or scales [E, N, groups] -> the kernel's layout, in the same memory."""
        experts, rows, columns = data.shape
        if scale:
            shape: tuple[int, ...] = (experts, columns, rows)
        else:
            shape = (experts, columns // 2, rows * 2)
        place = data.view(-1).view(shape)
        for begin in range(0, experts, _CHUNK):
            part = data[begin:begin + _CHUNK].to(device).transpose(1, 2).contiguous()
            if scale:
                done = marlin_moe_permute_scales(part, columns * self.group_size, rows, self.group_size)
            else:
                done = ops.gptq_marlin_moe_repack(part, columns * 8, rows, 4)
            place[begin:begin + _CHUNK].copy_(done)
        return place

    def _kernel(self, layer: Any, tensors: Tensors) -> Any:
        return make_wna16_moe_kernel(
            moe_quant_config=make_wna16_moe_quant_config(
                w1_scale=tensors[1], w2_scale=tensors[3], group_size=self.group_size, num_bits=4),
            moe_config=self.moe, experts_cls=self.experts_cls, backend=self.wna16_backend,
            routing_tables=layer._expert_routing_tables())

    def apply(self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
              shared_experts: Any, shared_experts_input: torch.Tensor | None) -> torch.Tensor:
        """The layer's output, from the slots and, in large passes, from the scratch buffers."""
        if not self.cache_options:
            return super().apply(layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)

        def run(tokens: slice, choices: torch.Tensor, mapping: torch.Tensor | None, experts: int,
                half: int | None) -> torch.Tensor:
            kernel: Any = self.moe_kernel if half is None else self.scratch_kernels[half]
            tensors = self.cache.tensors if half is None else self.waves.buffers[half]
            shared = half is None and shared_experts is not None
            result: torch.Tensor = kernel.apply(
                x[tokens], tensors[0], tensors[2], topk_weights=topk_weights[tokens], topk_ids=choices,
                activation=layer.activation, global_num_experts=experts, expert_map=mapping,
                apply_router_weight_on_input=layer.apply_router_weight_on_input,
                shared_experts=shared_experts if shared else None,
                shared_experts_input=shared_experts_input[tokens] if shared and shared_experts_input is not None
                else None)
            return result

        return self.cache.run(topk_ids, run)


def _load_model(original: Callable[..., torch.nn.Module], *arguments: Any, **named: Any) -> torch.nn.Module:
    """Report the bytes in host memory once after the load, as vLLM does for its own offload."""
    model = original(*arguments, **named)
    if _host_bytes:
        log.info("Total CPU offloaded parameters: %s", f"{_host_bytes / (1 << 30):.2f}")
    return model


def apply() -> None:
    """Patch this process: vLLM looks the method up in its module when it builds a layer."""
    Patch(BaseModelLoader, "load_model", _load_model).apply()
    setattr(engine, "CompressedTensorsWNA16MoEMethod", CompressedTensorsWNA16MoEMethod)  # noqa: B010  # mypy: a type
