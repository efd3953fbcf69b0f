"""Dtype of activations and unquantized weights where a GPU does not support the checkpoint's."""

from __future__ import annotations

from shoehorn.common.errors import SettingsError
from shoehorn.hardware.types import Gpu
from shoehorn.model.shape import ModelShape
from shoehorn.planner.option_set import OptionSet
from shoehorn.planner.reasons import MACHINE

BF16_CAPABILITY = (8, 0)
"""Lowest compute capability with bf16 arithmetic."""

_NEWER_GPU = "use a GPU of the Ampere generation or newer (RTX 30, A10)"


def supported_dtype(options: OptionSet, gpus: tuple[Gpu, ...], shape: ModelShape) -> OptionSet:
    """Choose float16 where a GPU does not support bf16.

    Raises:
        SettingsError: bf16 is requested, or the model is unstable in float16.
    """
    capability = min(gpu.compute_capability for gpu in gpus)
    if not (0, 0) < capability < BF16_CAPABILITY:
        return options
    if str(options.values.get("dtype", shape.dtype)) != "bfloat16":
        return options
    if "dtype" in options.fixed:
        raise SettingsError(f"{gpus[0].name}: bfloat16 is unsupported (compute capability {capability[0]}."
                            f"{capability[1]}).", f"Set VLLM_EXTRA_ARGS='--dtype float16', or {_NEWER_GPU}.",
                            code="unsupported_dtype")
    if shape.architecture.startswith(("Gemma2", "Gemma3")):
        raise SettingsError(f"{shape.architecture}: float16 is unsupported because it is unstable, and {gpus[0].name} "
                            "does not support bfloat16.", f"Choose another model, or {_NEWER_GPU}.",
                            code="unsupported_dtype")
    return options.set("dtype", "float16", MACHINE, "no-bfloat16", gpu=gpus[0].name)
