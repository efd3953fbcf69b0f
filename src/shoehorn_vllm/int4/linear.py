"""INT4 linear layers of vLLM with their products of few rows by decode.cu.

vLLM 0.32.0 multiplies INT4 weights by Machete on Hopper and by Marlin on other GPUs. Both are built for large batches:
of one row they read the weights of a 70B at 62 and 72 % of an H100's bandwidth (bench/results/int4-decode-h100.json).
Here a batch of few rows takes decode.cu, over the same weights in the same layout; larger ones take vLLM's kernel.
With `SHOEHORN_INT4_DECODE=on` only, until an engine with torch.compile was measured on a GPU.

Source: model_executor/kernels/linear/__init__.py `_POSSIBLE_KERNELS`, mixed_precision/machete.py and marlin.py.
"""

from __future__ import annotations

import os

import torch
from vllm import _custom_ops as operators
from vllm.logger import init_logger
from vllm.model_executor.kernels import linear as engine_kernels
from vllm.model_executor.kernels.linear.mixed_precision.machete import MacheteLinearKernel
from vllm.model_executor.kernels.linear.mixed_precision.marlin import MarlinLinearKernel
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel, MPLinearLayerConfig
from vllm.model_executor.layers.quantization.utils.marlin_utils import apply_gptq_marlin_linear, marlin_make_empty
from vllm.platforms import PlatformEnum, current_platform
from vllm.scalar_type import scalar_types
from vllm.utils.torch_utils import direct_register_custom_op

from shoehorn_vllm.int4 import decode
from shoehorn_vllm.int4.decode import Layout
from shoehorn_vllm.settings import check

log = init_logger("vllm.shoehorn.int4")

SETTING = "SHOEHORN_INT4_DECODE"

MAX_ROWS = 8
"""Rows from which vLLM's kernels are as fast."""

_AMPERE = 80


class _DecodeLinearKernel(MPLinearKernel):
    """Additions of both kernels to those of vLLM."""

    layout: Layout

    @classmethod
    def get_min_capability(cls) -> int:
        """Compute capability: of bf16 on tensor cores."""
        return max(_AMPERE, super().get_min_capability())

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Return whether the kernel multiplies a layer, and why not."""
        k, n = c.partition_weight_shape
        if c.weight_type != scalar_types.uint4b8 or c.zero_points or c.group_size not in decode.GROUPS:
            return False, "only symmetric INT4 weights in groups of 32, 64 or 128"
        if c.act_type not in (torch.bfloat16, torch.float16):
            return False, f"no activations of {c.act_type}"
        if k % max(64, c.group_size) or n % 64:
            return False, f"{k} x {n} is not divisible into parts of {max(64, c.group_size)} x 64"
        fits, reason = super().can_implement(c)
        return (False, reason) if not fits else cls._compile(c)

    @classmethod
    def _compile(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Compile the kernel, which a captured graph could not; return why it cannot be compiled."""
        device = torch.device("cuda", torch.cuda.current_device())
        try:
            decode.kernel(cls.layout, c.group_size, c.act_type, device)
        except (OSError, RuntimeError) as error:
            log.warning_once("Cannot compile the INT4 kernel, leaving all batches to vLLM's error=%s", error)
            return False, str(error)
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Repack as vLLM does."""
        super().process_weights_after_loading(layer)  # type: ignore[safe-super]  # likewise
        counters = decode.counters(self.config.partition_weight_shape[1], getattr(layer, self.w_q_name).device)
        layer.register_buffer("decode_counters", counters, persistent=False)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x @ W + bias."""
        codes, scales, _ = self._get_weight_params(layer)
        n, group = self.config.partition_weight_shape[1], self.config.group_size
        y: torch.Tensor = torch.ops.vllm.shoehorn_int4_linear(
            x.reshape(-1, x.shape[-1]), codes, scales, layer.decode_counters, bias, n, group, self.layout.value)
        return y.reshape(*x.shape[:-1], n)


class MacheteDecodeLinearKernel(_DecodeLinearKernel, MacheteLinearKernel):
    """Machete, with decode.cu for few rows."""

    layout = Layout.MACHETE


class MarlinDecodeLinearKernel(_DecodeLinearKernel, MarlinLinearKernel):
    """Marlin, with decode.cu for few rows."""

    layout = Layout.MARLIN


def _multiply(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, arrivals: torch.Tensor,
              bias: torch.Tensor | None, n: int, group: int, layout: str) -> torch.Tensor:
    """Return x @ W + bias, [m, n], by the kernel for this number of rows."""
    m, k = x.shape
    if 0 < m <= MAX_ROWS:
        kernel = decode.kernel(Layout(layout), group, x.dtype, x.device)
        return kernel.multiply(x.contiguous(), codes, scales, arrivals, n, bias)
    y: torch.Tensor
    if layout == Layout.MACHETE.value:
        y = operators.machete_mm(a=x, b_q=codes, b_type=scalar_types.uint4b8, b_group_scales=scales,
                                 b_group_size=group)
        return y if bias is None else y.add_(bias)
    y = apply_gptq_marlin_linear(
        input=x, weight=codes, weight_scale=scales, weight_zp=marlin_make_empty(x.device), workspace=None,
        wtype=scalar_types.uint4b8, output_size_per_partition=n, input_size_per_partition=k, bias=bias)
    return y


def _shape(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, arrivals: torch.Tensor,
           bias: torch.Tensor | None, n: int, group: int, layout: str) -> torch.Tensor:
    """Return an empty result for torch.compile."""
    return x.new_empty((x.shape[0], n))


def apply() -> None:
    """Put the kernels before those of vLLM, on an NVIDIA GPU, if the setting says so.

    Raises:
        SettingError: SHOEHORN_INT4_DECODE is neither on nor off.
    """
    is_on = check(SETTING, os.environ.get(SETTING, "off"), ("on", "off")) == "on"
    kernels = engine_kernels._POSSIBLE_KERNELS[PlatformEnum.CUDA]
    if is_on and current_platform.is_cuda() and MacheteDecodeLinearKernel not in kernels:
        direct_register_custom_op("shoehorn_int4_linear", _multiply, fake_impl=_shape)
        kernels[:0] = [MacheteDecodeLinearKernel, MarlinDecodeLinearKernel]
