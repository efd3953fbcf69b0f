"""Linear layers in INT4 with their weights in host memory: a patch of vLLM's method for compressed-tensors.

With `--additional-config {"shoehorn": {"hybrid": {"group": G, "last": L, "levels": [[tokens, streamed], ...],
"buffers": B}}}` the linear layers of the last L of every G decoder layers stay in pinned host memory in the
checkpoint's layout (`executor`). Without it vLLM's own code runs.

Source: vLLM 0.32.0, compressed_tensors.py `get_quant_method`; schemes/compressed_tensors_wNa16.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from shoehorn_vllm.hybrid import host_weights
from shoehorn_vllm.hybrid.kernel.products import PackedWeights
from shoehorn_vllm.hybrid.offload.executor import Executor
from shoehorn_vllm.hybrid.offload.schedule import Level
from shoehorn_vllm.patches import pinned_memory
from shoehorn_vllm.patches.patch import Patch

_executors: list[Executor] = []
_disabled: list[bool] = []


class UnsupportedLayerError(RuntimeError):
    """A layer has a form that the CPU kernel does not read."""


def options() -> dict[str, Any]:
    """The options of the model that is being built; empty where no layer is in host memory."""
    additional = get_current_vllm_config().additional_config
    own = additional.get("shoehorn") if isinstance(additional, dict) else None
    hybrid = own.get("hybrid") if isinstance(own, dict) else None
    return hybrid if isinstance(hybrid, dict) and not _disabled else {}


class HostLinearMethod(CompressedTensorsLinearMethod):
    """The method of one layer, whose weights are in host memory."""

    requires_device_loading = False

    def __init__(self, config: CompressedTensorsConfig, scheme: CompressedTensorsWNA16, executor: Executor) -> None:
        super().__init__(config)
        if scheme.num_bits != 4 or not scheme.symmetric or scheme.group_size not in (32, 64, 128):
            raise UnsupportedLayerError(
                f"Linear layer of {scheme.num_bits} bits in groups of {scheme.group_size}, symmetric="
                f"{scheme.symmetric}: not supported in host memory. Remove `hybrid` from --additional-config.")
        self.executor = executor

    def create_weights(self, layer: nn.Module, *arguments: Any, **named: Any) -> None:
        """Create the parameters in pinned host memory."""
        with torch.device("cpu"):
            super().create_weights(layer, *arguments, **named)
        for name in ("weight_packed", "weight_scale"):
            parameter = getattr(layer, name)
            parameter.data = pinned_memory.allocate_like(parameter.data)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Take the weights as they are."""
        codes, scales = layer.get_parameter("weight_packed"), layer.get_parameter("weight_scale")
        weights = PackedWeights(codes.data, scales.data)
        self.number = self.executor.add(weights)
        host_weights.add(weights.nbytes)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x @ weights.T + bias."""
        y = self.executor.multiply(self.number, x.reshape(-1, x.shape[-1]))
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], y.shape[-1])


def _get_quant_method(original: Callable[..., Any], config: CompressedTensorsConfig, layer: nn.Module,
                      prefix: str) -> Any:
    method = original(config, layer, prefix)
    own = options()
    if not own or type(method) is not CompressedTensorsLinearMethod or ".layers." not in f".{prefix}" or \
            not isinstance(layer.scheme, CompressedTensorsWNA16):
        return method
    if extract_layer_index(prefix) % own["group"] < own["group"] - own["last"]:
        return method
    if get_tensor_model_parallel_world_size() > 1:
        raise UnsupportedLayerError("Tensor parallelism: not supported with layers in host memory. Remove `hybrid` "
                                    "from --additional-config.")
    if not _executors:
        _executors.append(Executor([Level(int(tokens), float(share)) for tokens, share in own["levels"]],
                                   int(own.get("buffers", 2))))
        host_weights.when_loaded(lambda: _executors[0].start(torch.device("cuda", torch.cuda.current_device())))
    return HostLinearMethod(config, layer.scheme, _executors[0])


def _load_draft_on_gpu(original: Callable[..., None], *arguments: Any) -> None:
    """Load a draft model, whose layers stay on the GPU."""
    _disabled.append(True)
    try:
        original(*arguments)
    finally:
        _disabled.pop()


PATCHES = (
    Patch(CompressedTensorsConfig, "get_quant_method", _get_quant_method),
    Patch(DraftModelSpeculator, "load_model", _load_draft_on_gpu),
)


def apply() -> None:
    """Patch this process."""
    for patch in PATCHES:
        patch.apply()
