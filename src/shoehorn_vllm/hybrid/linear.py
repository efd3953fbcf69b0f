"""Linear layers in INT4 on the CPU, as one of the engine's linear kernels.

Rules:
- the weights stay in the checkpoint's layout, in the memory they were loaded into;
- one opaque operator a layer, so that torch.compile sees neither the weights nor the batch's size;
- up to `MAX_TOKENS` the kernel multiplies; above, slices of the weights are unpacked to bf16 and torch multiplies them.
"""

from __future__ import annotations

import torch
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel, MPLinearLayerConfig
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types
from vllm.utils.torch_utils import direct_register_custom_op

from shoehorn_vllm.hybrid import threads
from shoehorn_vllm.hybrid.kernel import products
from shoehorn_vllm.hybrid.kernel.products import PackedWeights

MAX_TOKENS = 32
SLICE_BYTES = 4 << 20  # of unpacked weights: they stay in a core's cache
_weights: list[PackedWeights] = []


def unsupported(weight_type: object, group: int, zero_points: bool, dtype: torch.dtype) -> str | None:
    """Say why the kernel does not read such weights; None where it does."""
    if weight_type != scalar_types.uint4b8 or zero_points:
        return "only symmetric INT4 is supported"
    if group not in products.GROUPS:
        return f"group size {group} is not one of {products.GROUPS}"
    return None if dtype == torch.bfloat16 else f"activations in {dtype} are not supported"


class HostLinearKernel(MPLinearKernel):
    """Our kernel behind the engine's interface."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Return -1: a CPU has no compute capability."""
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Return whether the layer's format is supported, and the reason if not."""
        reason = None if current_platform.is_cpu() else "the layer is not on a CPU"
        reason = reason or unsupported(c.weight_type, c.group_size, c.zero_points, c.act_type)
        if not reason and c.partition_weight_shape[0] % c.group_size:
            reason = f"input size {c.partition_weight_shape[0]} is not a multiple of the group size"
        return reason is None, reason

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Take the weights as they are, and start the threads."""
        threads.start()
        codes, scales, _ = self._get_weight_params(layer)
        self.number = add(PackedWeights(codes.data, scales.data))

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x @ weights.T + bias."""
        rows = self.config.partition_weight_shape[1]
        result: torch.Tensor = torch.ops.vllm.shoehorn_host_linear(x, self.number, rows, bias)
        return result


def add(weights: PackedWeights) -> int:
    """Keep a layer's weights; the number by which the operator finds them."""
    _weights.append(weights)
    return len(_weights) - 1


def _host_linear(x: torch.Tensor, number: int, rows: int, bias: torch.Tensor | None) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1])
    multiply = products.linear if flat.shape[0] <= MAX_TOKENS else unpacked_linear
    return multiply(_weights[number], flat, bias).view(*x.shape[:-1], rows)


def _host_linear_shape(x: torch.Tensor, number: int, rows: int, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def unpacked_linear(weights: PackedWeights, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ weights.T + bias for a large batch, by slices of unpacked weights."""
    y = torch.empty(x.shape[0], weights.rows, dtype=torch.bfloat16)
    step = max(16, SLICE_BYTES // (2 * weights.k))
    buffer = torch.empty(min(step, weights.rows), weights.k, dtype=torch.bfloat16)
    for first in range(0, weights.rows, step):
        part = PackedWeights(weights.codes[first:first + step], weights.scales[first:first + step])
        values = buffer[:part.rows]
        products.unpack(part, values)
        own = None if bias is None else bias[first:first + step]
        y[:, first:first + step] = torch.nn.functional.linear(x, values, own)
    return y


direct_register_custom_op("shoehorn_host_linear", _host_linear, fake_impl=_host_linear_shape, dispatch_key="CPU")
