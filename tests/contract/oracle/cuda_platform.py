"""A CUDA platform without a GPU, so that vLLM's CPU build decides as its GPU build does on a stated GPU.

Rules: `install` runs before any other vLLM import; vLLM's own `CudaPlatformBase` answers every question but those about
the hardware; compiled kernels exist by name only, and calling one fails. Kernels answer the questions about their own
support (`cutlass_scaled_mm_supports_fp8`, ...) as csrc does, from the compute capability.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from contract.oracle import stand_ins

CAPABILITY = (8, 9)
"""Ada (RTX 40): the newest generation that most users of small GPUs own."""

MEMORY_BYTES = 24 << 30
DEVICES = 8

_EXTENSIONS = ("vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa2_C",
               "vllm.vllm_flash_attn._vllm_fa3_C")
_PACKAGES = ("vllm.third_party.deep_gemm",)
"""Modules of vLLM's GPU wheel that its CPU wheel lacks, and whose presence alone decides."""

_NAMESPACES = frozenset({"_C", "_moe_C", "_C_cache_ops", "_C_cuda_utils", "_C_custom_ar"})
_FIRST_CAPABILITY = {
    "cutlass_scaled_mm_supports_fp8": 89,
    "cutlass_scaled_mm_supports_block_fp8": 90,
    "cutlass_group_gemm_supported": 90,
    "cutlass_scaled_mm_supports_fp4": 100,
}
"""The least compute capability of each kernel that can be asked (csrc/quantization/w8a8/cutlass, .../fp4)."""


class KernelCallError(RuntimeError):
    """A compiled kernel was called, which this machine does not have."""


def install(cache: str, capability: tuple[int, int] = CAPABILITY) -> type:
    """Make vLLM see a GPU of that compute capability; return the platform class.

    Args:
        cache: a new folder, since vLLM's own cache of model classes may come from another platform.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": "bitsandbytes", "VLLM_LOGGING_LEVEL": "WARNING",
                   "VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": cache}
    stand_ins.install()
    import torch

    _declare_kernels(torch)
    import vllm.platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class OracleCudaPlatform(CudaPlatformBase):  # type: ignore[misc]
        """A described GPU that does not exist; its tensors are on the meta device."""

        device_type = "meta"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(*capability)

        @classmethod
        def current_device(cls) -> str:
            return "meta"

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "oracle"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return MEMORY_BYTES

        @classmethod
        def is_fully_connected(cls, device_ids: list[int]) -> bool:
            return True

        @classmethod
        def device_count(cls) -> int:
            return DEVICES

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 128

        @classmethod
        def is_integrated_gpu(cls, device_id: int = 0) -> bool:
            return False

        @classmethod
        def get_device_communicator_cls(cls) -> str:
            """The communicator without NCCL: no byte is ever sent."""
            return "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"

    vllm.platforms._current_platform = OracleCudaPlatform()
    _declare_triton()
    _inspect_here()
    return OracleCudaPlatform


class _Kernel:
    """A kernel that answers questions about its support, and nothing else."""

    def __init__(self, name: str = "stream", **options: Any) -> None:
        self.name = self.__name__ = name

    def __getattr__(self, overload: str) -> _Kernel:
        if overload.startswith("__"):
            raise AttributeError(overload)
        return self

    def __call__(self, *arguments: Any) -> bool:
        if self.name not in _FIRST_CAPABILITY:
            raise KernelCallError(f"The kernel {self.name} was called.")
        return bool(arguments[0] >= _FIRST_CAPABILITY[self.name])


def _declare_kernels(torch: Any) -> None:
    """Let the compiled modules be imported and their kernels be named."""
    for name in (*_EXTENSIONS, *_PACKAGES):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        sys.modules[name] = module
    namespace = torch._ops._OpNamespace
    find = namespace.__getattr__
    register = torch.library.register_fake

    def kernel(self: Any, name: str) -> Any:
        return _Kernel(name) if self.name in _NAMESPACES and not name.startswith("__") else find(self, name)

    def register_fake(name: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(name, str) and name.split("::")[0] in _NAMESPACES:
            return lambda function: function
        return register(name, *arguments, **options)

    torch.cuda.Stream = torch.cuda.Event = _Kernel  # made while building, used while running
    torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.item = _values(torch)
    namespace.__getattr__ = kernel
    torch.library.register_fake = register_fake


def _values(torch: Any) -> tuple[Any, Any, Any]:
    """Tensor.cpu, tolist and item that see zeros in meta tensors: constants that models compute while they are built.

    They are slopes, scales and activation parameters; no shape depends on one.
    """
    tolist, item, cpu = torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.cpu

    def zeros(tensor: Any, *arguments: Any, **options: Any) -> Any:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu") if tensor.is_meta else cpu(
            tensor, *arguments, **options)

    return zeros, lambda tensor: tolist(zeros(tensor)), lambda tensor: item(zeros(tensor))


def _declare_triton() -> None:
    """Let vLLM believe in Triton, whose stand-ins for missing kernels it has itself."""
    import vllm.triton_utils
    from vllm.triton_utils import importing

    vllm.triton_utils.HAS_TRITON = importing.HAS_TRITON = True
    vllm.triton_utils.triton.Config = _TritonConfig


class _TritonConfig:
    """One choice of an autotuned kernel's constants."""

    def __init__(self, constants: dict[str, int], num_warps: int = 4, num_stages: int = 3, **options: Any) -> None:
        self.kwargs, self.num_warps, self.num_stages = constants, num_warps, num_stages


def _inspect_here() -> None:
    """Let vLLM's registry inspect a model class in this process: a child process would see the CPU platform."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda function: function()
