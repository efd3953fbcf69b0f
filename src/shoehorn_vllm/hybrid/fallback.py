"""torch's own INT4 kernel for linear layers, where our library was not built.

It packs the weights into a layout of its own, reads them again for every four tokens, and is made for bf16.
"""

from __future__ import annotations

import torch
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel, MPLinearLayerConfig
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from shoehorn_vllm.hybrid import threads
from shoehorn_vllm.hybrid.kernel import library

ROWS = 64  # its blocks


class TorchInt4LinearKernel(MPLinearKernel):
    """`torch._weight_int4pack_mm_for_cpu` behind the engine's interface."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Return -1: a CPU has no compute capability."""
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Return whether the layer's format is supported, and the reason if not."""
        k, rows = c.partition_weight_shape
        if not current_platform.is_cpu() or c.weight_type != scalar_types.uint4b8 or c.zero_points:
            return False, "only symmetric INT4 on a CPU is supported"
        if c.group_size not in (32, 64, 128) or k % c.group_size or rows % ROWS or c.act_type != torch.bfloat16:
            return False, f"group size {c.group_size}, {rows} x {k} or {c.act_type} is not supported"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Repack the codes, and join the scales with zero points of zero."""
        threads.logger.warning_once("CPU kernel unavailable, torch's INT4 kernel is used path=%s", library.LIBRARY_PATH)
        codes, scales, _ = self._get_weight_params(layer)
        numbers = unpack_codes(codes.data).to(torch.int32)
        codes.data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
        steps = scales.data.t().contiguous()
        scales.data = torch.stack((steps, torch.zeros_like(steps)), dim=-1)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x @ weights.T + bias."""
        codes, scales, _ = self._get_weight_params(layer)
        flat = x.reshape(-1, x.shape[-1])
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, codes, self.config.group_size, scales)
        y = y if bias is None else y + bias
        return y.view(*x.shape[:-1], y.shape[-1])


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """Codes 0 to 15 of int32 [rows, k / 8], as uint8 [rows, k]."""
    pairs = packed.view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)
