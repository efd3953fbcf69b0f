"""Proof that weights that shall be in host memory are there after the load; else the start fails with the reason.

vLLM 0.32.0 with its Humming backend offloads experts by UVA, repacks them onto the GPU while it processes them, and
still reports them as offloaded: 14 GiB more on the GPU than planned. A quantization method that is not one of ours
would leave the options of `experts` and `hybrid` without effect in the same silence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

_MEMORY_TYPE, _HOST = 2, 1  # CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_MEMORYTYPE_HOST
_SHARE = 0.5
"""Of the bytes that shall be in host memory, those that have to be there: vLLM counts some after repacking."""


class OffloadUndoneError(RuntimeError):
    """Weights that were planned in host memory are on the GPU."""


def check(expected_bytes: int, present_bytes: int) -> None:
    """Compare the bytes of weights in host memory with those that shall be there.

    Raises:
        OffloadUndoneError: less than half of them are.
    """
    if present_bytes < _SHARE * expected_bytes:
        raise OffloadUndoneError(
            f"Offloaded weights: {expected_bytes / (1 << 30):.2f} GiB planned in host memory, of which only "
            f"{present_bytes / (1 << 30):.2f} GiB are there: the engine's kernels moved them to the GPU.")


def check_options(own: Mapping[str, Any], present_bytes: int) -> None:
    """Check that the options of our own offload had an effect.

    Args:
        own: of `--additional-config`.
        present_bytes: of weights that it put into host memory.

    Raises:
        OffloadUndoneError: it put none there.
    """
    for option in ("experts", "hybrid"):
        if own.get(option) and not present_bytes:
            raise OffloadUndoneError(
                f"Offloaded weights: option `{option}` of --additional-config had no effect, they are on the GPU.")


def host_bytes(modules: Iterable[nn.Module], is_on_host: Callable[[torch.Tensor], bool] | None = None) -> int:
    """Count the bytes of parameters in host memory, those that a GPU reads there (UVA) included.

    Args:
        is_on_host: asks where a tensor's memory is; the CUDA driver without.
    """
    there, seen = is_on_host or _is_on_host, dict[int, int]()
    for module in modules:
        for parameter in module.parameters(recurse=False):
            if parameter.numel() and there(parameter.data):
                seen[parameter.data_ptr()] = parameter.numel() * parameter.element_size()
    return sum(seen.values())


def _is_on_host(data: torch.Tensor) -> bool:
    if data.device.type == "cpu":
        return True
    kind = ctypes.c_int(0)
    failed = ctypes.CDLL("libcuda.so.1").cuPointerGetAttribute(
        ctypes.byref(kind), _MEMORY_TYPE, ctypes.c_uint64(data.data_ptr()))
    return not failed and kind.value == _HOST
