"""The number format of activations and unquantized weights, where a card lacks the checkpoint's."""

from __future__ import annotations

from shoehorn.common.errors import SettingsError
from shoehorn.hardware.types import Gpu
from shoehorn.model.shape import ModelShape
from shoehorn.planner.option_set import Options

BF16_CAPABILITY = (8, 0)
"""The least compute capability with bf16 arithmetic."""


def apply(options: Options, gpus: tuple[Gpu, ...], shape: ModelShape) -> None:
    """float16 where the card has no bf16.

    Raises:
        SettingsError: bf16 is asked for, or the model is unstable in float16.
    """
    capability = min(gpu.compute_capability for gpu in gpus)
    if not (0, 0) < capability < BF16_CAPABILITY:
        return
    wanted = str(options.values.get("dtype", shape.dtype))
    if "dtype" in options.fixed and wanted == "bfloat16":
        raise SettingsError(f"{gpus[0].name} has no bfloat16 (compute capability {capability[0]}.{capability[1]}).",
                            "Set VLLM_EXTRA_ARGS='--dtype float16', or use a card of the Ampere generation or newer.")
    if wanted == "bfloat16" and shape.architecture.startswith(("Gemma2", "Gemma3")):
        raise SettingsError(f"{shape.architecture} is unstable in float16, so the engine refuses that, and "
                            f"{gpus[0].name} has no bfloat16.",
                            "Use a card of the Ampere generation or newer (RTX 30, A10), or another model.")
    if wanted == "bfloat16":
        options.set("dtype", "float16", "machine", f"{gpus[0].name} has no bfloat16")
