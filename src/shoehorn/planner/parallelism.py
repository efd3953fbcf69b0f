"""Which GPUs are used, and how the model is divided over them: by matrices (tensor) or by layers (pipeline).

Rules: all equal cards, unless profile or options say otherwise; by matrices wherever heads and groups of quantized
weights can be divided, since then every card works on every token.
"""

from __future__ import annotations

from shoehorn.common.errors import SettingsError
from shoehorn.common.units import GIB
from shoehorn.config.profiles import Profile
from shoehorn.hardware.requirements import require_gpus
from shoehorn.hardware.types import Gpu, Hardware
from shoehorn.model.shape import ModelShape
from shoehorn.planner.option_set import Options


def gpus(options: Options, hardware: Hardware, profile: Profile, shape: ModelShape) -> tuple[Gpu, ...]:
    """The GPUs that the options use, checked against machine and model; all equal ones where that is left open.

    Raises:
        SettingsError: so many are not there, or the model cannot be divided over them.
    """
    if {"tensor-parallel-size", "pipeline-parallel-size"} & options.values.keys() or not profile.is_auto:
        tensor, pipeline = options.whole("tensor-parallel-size", 1), options.whole("pipeline-parallel-size", 1)
    else:
        tensor, pipeline = _spread(options, require_gpus(hardware, profile.name), shape)
    if tensor < 1 or pipeline < 1:
        raise SettingsError("The number of GPUs to divide the model over is less than one.",
                            "Correct tensor-parallel-size or pipeline-parallel-size.")
    found = require_gpus(hardware, profile.name, tensor * pipeline)
    chosen = tuple(sorted(found, key=lambda gpu: (-gpu.total_bytes, gpu.index))[:tensor * pipeline])
    if any(gpu.mig for gpu in chosen):
        raise SettingsError("The GPU is divided by MIG, and the size of a slice is not understood.",
                            "Pass a whole GPU in, or switch MIG off on the host: nvidia-smi -mig 0")
    if not _heads_divide(shape, tensor):
        raise SettingsError(f"The model's {shape.heads} attention heads, {shape.kv_heads} of keys and values, cannot "
                            f"be divided over {tensor} GPUs.",
                            "Set VRAM_PROFILE or --tensor-parallel-size in VLLM_EXTRA_ARGS to a number that divides "
                            "them.")
    if shape.column_groups % tensor:
        raise SettingsError(
            f"The checkpoint's quantization shares a scale among groups of weights, and {tensor} GPUs would have to "
            "divide one.", f"Set VLLM_EXTRA_ARGS='--tensor-parallel-size 1 --pipeline-parallel-size {tensor}'.")
    if tensor > 1 and shape.quantization == "bitsandbytes":
        raise SettingsError(
            f"The checkpoint is quantized by bitsandbytes, and such a one cannot be divided over {tensor} GPUs.",
            "Choose the model's unquantized checkpoint, or set VLLM_EXTRA_ARGS='--tensor-parallel-size 1 "
            f"--pipeline-parallel-size {tensor}'.")
    return chosen


def _spread(options: Options, cards: tuple[Gpu, ...], shape: ModelShape) -> tuple[int, int]:
    """(tensor, pipeline) parallelism over the largest set of equal cards."""
    sizes = [round(gpu.total_bytes / GIB) for gpu in cards]
    equal = max((sizes.count(size) * size, sizes.count(size)) for size in sizes)[1]
    if equal < len(cards):
        options.remark("gpus", equal, "machine", f"the {len(cards)} cards are not equal; only equal ones work together")
    if equal == 1:
        return 1, 1
    if shape.quantization == "bitsandbytes":
        options.set("pipeline-parallel-size", equal, "machine",
                    f"{equal} equal cards; a checkpoint of bitsandbytes can be divided by layers only")
        return 1, equal
    count = next(count for count in range(equal, 0, -1) if divides(shape, count))
    if count == 1:
        options.set("pipeline-parallel-size", equal, "machine",
                    f"{equal} equal cards, and the model's matrices cannot be divided over them, only its layers")
        return 1, equal
    options.set("tensor-parallel-size", count, "machine", f"{equal} equal cards, and {shape.heads} attention heads")
    options.set("disable-custom-all-reduce", True, "machine", "works without peer access between the cards")
    return count, 1


def divides(shape: ModelShape, count: int) -> bool:
    """Whether the engine can give each of so many GPUs a share of every matrix."""
    return _heads_divide(shape, count) and not shape.column_groups % count


def _heads_divide(shape: ModelShape, count: int) -> bool:
    return not (shape.heads % count or (shape.kv_heads % count and count % shape.kv_heads))
