"""The engine on a CPU multiplies INT4 weights with our kernel.

vLLM 0.32 on a CPU repacks INT4 weights into a second layout and reads them at a fraction of the memory's speed, it
refuses INT4 experts without AMX, and it fails at an embedding in INT4. With `SHOEHORN_CPU_COMPUTE=auto` (the default)
- linear layers and experts in INT4 (compressed-tensors, W4A16, symmetric, groups of 32, 64 or 128, bf16) go through
  the kernel and stay in the checkpoint's layout;
- without the compiled kernel linear layers use torch's INT4 kernel, with a warning in the log;
- an embedding in INT4 is unpacked for the tokens at hand.
`off` leaves the engine as it is.

Source: model_executor/kernels/linear/__init__.py `_POSSIBLE_KERNELS`; layers/quantization/compressed_tensors/
compressed_tensors_moe/compressed_tensors_moe_wna16.py and compressed_tensors_embedding.py.
"""

from __future__ import annotations

import os

from vllm.model_executor.kernels import linear as engine_kernels
from vllm.platforms import PlatformEnum, current_platform

from shoehorn_vllm.hybrid import embedding, experts, fallback, linear, threads
from shoehorn_vllm.hybrid.kernel import library
from shoehorn_vllm.settings import check

SETTING = "SHOEHORN_CPU_COMPUTE"


def apply() -> None:
    """Patch this process, if its engine runs on a CPU.

    Raises:
        SettingError: SHOEHORN_CPU_COMPUTE is neither auto nor off.
        KernelUnavailableError: SHOEHORN_CPU_ISA names an instruction set that this CPU lacks.
    """
    if check(SETTING, os.environ.get(SETTING, "auto"), ("auto", "off")) == "off" or not current_platform.is_cpu():
        return
    embedding.apply()
    kernels = engine_kernels._POSSIBLE_KERNELS[PlatformEnum.CPU]
    if not library.is_available():
        kernels.insert(0, fallback.TorchInt4LinearKernel)
        return
    library.default_isa()
    threads.record_cpus()
    kernels.insert(0, linear.HostLinearKernel)
    experts.apply()
