"""INT4 linear layers of vLLM with their products of few rows by decode.cu.

vLLM 0.32.0 multiplies INT4 weights by Machete on Hopper and by Marlin on other GPUs. Both are built for large batches:
one row reads the weights at 60 % of the memory's bandwidth. This kernel keeps Marlin's layout and Marlin for large
batches. `VLLM_DISABLED_KERNELS=ShoehornInt4LinearKernel` leaves the choice to vLLM.

Source: model_executor/kernels/linear/__init__.py `_POSSIBLE_KERNELS`, mixed_precision/marlin.py.
"""

from __future__ import annotations

import torch
from vllm.model_executor.kernels import linear as engine_kernels
from vllm.model_executor.kernels.linear.mixed_precision.marlin import MarlinLinearKernel
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
from vllm.model_executor.layers.quantization.utils.marlin_utils import apply_gptq_marlin_linear, marlin_make_empty
from vllm.platforms import PlatformEnum, current_platform
from vllm.scalar_type import scalar_types
from vllm.utils.torch_utils import direct_register_custom_op

from shoehorn_vllm.int4 import decode

MAX_ROWS = 32


class ShoehornInt4LinearKernel(MarlinLinearKernel):
    """Marlin, with decode.cu for up to MAX_ROWS rows."""

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        k, n = c.partition_weight_shape
        if c.weight_type != scalar_types.uint4b8 or c.zero_points or c.group_size not in decode.GROUPS:
            return False, "Shoehorn's INT4 kernel multiplies symmetric INT4 weights in groups of 32, 64 or 128"
        if c.act_type not in (torch.bfloat16, torch.float16):
            return False, f"Shoehorn's INT4 kernel does not multiply {c.act_type}"
        if k % 128 or n % 64:
            return False, f"Shoehorn's INT4 kernel does not divide {k} x {n} into parts of 128 x 64"
        fits: tuple[bool, str | None] = super().can_implement(c)
        return fits

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        for tiles in (1, 2, 4):
            decode.kernel(tiles, self.config.group_size, self.config.act_type, getattr(layer, self.w_q_name).device)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        codes, scales, _ = self._get_weight_params(layer)
        n, group = self.config.partition_weight_shape[1], self.config.group_size
        y: torch.Tensor = torch.ops.vllm.shoehorn_int4_linear(x.reshape(-1, x.shape[-1]), codes, scales, bias, n, group)
        return y.reshape(*x.shape[:-1], n)


def _multiply(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, n: int,
              group: int) -> torch.Tensor:
    """Return x @ W + bias, [m, n]."""
    m, k = x.shape
    if 0 < m <= MAX_ROWS:
        tiles = 1 if m <= 8 else 2 if m <= 16 else 4
        return decode.kernel(tiles, group, x.dtype, x.device).multiply(x.contiguous(), codes, scales, n, bias)
    y: torch.Tensor = apply_gptq_marlin_linear(
        input=x, weight=codes, weight_scale=scales, weight_zp=marlin_make_empty(x.device), workspace=None,
        wtype=scalar_types.uint4b8, output_size_per_partition=n, input_size_per_partition=k, bias=bias)
    return y


def _shape(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, n: int,
           group: int) -> torch.Tensor:
    """Return an empty result for torch.compile."""
    return x.new_empty((x.shape[0], n))


def apply() -> None:
    """Put the kernel before those of vLLM, on an NVIDIA GPU."""
    kernels = engine_kernels._POSSIBLE_KERNELS[PlatformEnum.CUDA]
    if current_platform.is_cuda() and ShoehornInt4LinearKernel not in kernels:
        direct_register_custom_op("shoehorn_int4_linear", _multiply, fake_impl=_shape)
        kernels.insert(0, ShoehornInt4LinearKernel)
