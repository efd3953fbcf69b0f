"""GPUs in use, and the division of the model over them: by matrices (tensor) or by layers (pipeline).

Rules: all equal GPUs, unless profile or options say otherwise; by matrices wherever heads and groups of quantized
weights can be divided, since then every GPU works on every token.
"""

from __future__ import annotations

from dataclasses import replace

from shoehorn.common.errors import SettingsError
from shoehorn.common.units import GIB
from shoehorn.hardware.requirements import require_gpus
from shoehorn.hardware.types import Gpu, largest_first
from shoehorn.model.shape import ModelShape
from shoehorn.planner.inputs import PlanInputs
from shoehorn.planner.option_set import OptionSet
from shoehorn.planner.reasons import MACHINE
from shoehorn.planner.serving_config import BITSANDBYTES

_NAMED = "device-ids"
_OPTIONS = {"tensor-parallel-size", "pipeline-parallel-size"}


def divide(options: OptionSet, inputs: PlanInputs) -> tuple[OptionSet, tuple[Gpu, ...]]:
    """Choose the GPUs, all equal ones where that is left open, and check the options against machine and model.

    Raises:
        SettingsError: too few GPUs, or the model cannot be divided over them.
    """
    name = inputs.profile.name
    inputs = _with_named_gpus(options, inputs)
    if inputs.profile.is_auto and not _OPTIONS & options.values.keys():
        options = _over_equal_gpus(options, require_gpus(inputs.hardware, name), inputs.shape)
    tensor, pipeline = (options.integer(f"{each}-parallel-size", 1) for each in ("tensor", "pipeline"))
    if tensor < 1 or pipeline < 1:
        raise SettingsError("tensor-parallel-size and pipeline-parallel-size: less than one is invalid.",
                            "Correct them in VLLM_EXTRA_ARGS or in the profile.", code="invalid_parallelism")
    available = require_gpus(inputs.hardware, name, tensor * pipeline)
    gpus = tuple(available if _NAMED in options.values else largest_first(available))[:tensor * pipeline]
    if any(gpu.mig for gpu in gpus):
        raise SettingsError("The GPU is divided by MIG, which is unsupported.",
                            "Pass a whole GPU in, or switch MIG off on the host: nvidia-smi -mig 0",
                            code="unsupported_mig")
    _require_divisible(inputs.shape, tensor)
    if _NAMED in options.values and all(gpu.uuid for gpu in gpus):
        options = options.set_by_user(_NAMED, ",".join(gpu.uuid for gpu in gpus), setting="VLLM_EXTRA_ARGS")
    return options, gpus


def _with_named_gpus(options: OptionSet, inputs: PlanInputs) -> PlanInputs:
    """Keep the GPUs of `--device-ids`: numbers of CUDA, or UUIDs (vllm/engine/arg_utils.py, _resolve_device_ids)."""
    words = [word.strip() for word in str(options.values.get(_NAMED) or "").split(",") if word.strip()]
    if not words:
        return inputs
    by_name = {name: gpu for gpu in inputs.hardware.gpus for name in (str(gpu.ordinal), gpu.uuid) if name}
    unknown = [word for word in words if word not in by_name]
    if unknown or len(set(words)) < len(words):
        known = "; ".join(f"{gpu.ordinal}: {gpu.name} {gpu.uuid}".strip() for gpu in inputs.hardware.gpus) or "none"
        problem = f"{', '.join(unknown)} not found" if unknown else "a GPU is named twice"
        left_out = "".join(f"; {remark}" for remark in inputs.hardware.gpu_remarks)
        raise SettingsError(f"--device-ids {','.join(words)}: {problem}. Usable GPUs: {known}{left_out}.",
                            "Correct --device-ids in VLLM_EXTRA_ARGS, or remove it.", code="unknown_device")
    return replace(inputs, hardware=replace(inputs.hardware, gpus=tuple(by_name[word] for word in words)))


def divides(shape: ModelShape, gpus: int) -> bool:
    """Return whether vLLM can give each of that many GPUs a share of every matrix."""
    return _divides_heads(shape, gpus) and not shape.column_groups % gpus


def _divides_heads(shape: ModelShape, gpus: int) -> bool:
    return not (shape.heads % gpus or (shape.kv_heads % gpus and gpus % shape.kv_heads))


def _over_equal_gpus(options: OptionSet, gpus: tuple[Gpu, ...], shape: ModelShape) -> OptionSet:
    """Divide the model over the largest set of equal GPUs."""
    sizes = [round(gpu.total_bytes / GIB) for gpu in gpus]
    equal = max((sizes.count(size) * size, sizes.count(size)) for size in sizes)[1]
    if equal < len(gpus):
        options = options.remark("gpus", equal, MACHINE, "unequal-gpus", gpus=len(gpus))
    if equal == 1:
        return options
    if shape.quantization == BITSANDBYTES:
        return options.set("pipeline-parallel-size", equal, MACHINE, "layers-only-nf4", gpus=equal)
    tensor = next(count for count in range(equal, 0, -1) if divides(shape, count))
    if tensor == 1:
        return options.set("pipeline-parallel-size", equal, MACHINE, "layers-only", gpus=equal)
    options = options.set("tensor-parallel-size", tensor, MACHINE, "equal-gpus", gpus=equal, heads=shape.heads)
    return options.set("disable-custom-all-reduce", True, MACHINE, "no-peer-access")


def _require_divisible(shape: ModelShape, tensor: int) -> None:
    """Raise SettingsError where a matrix of the model cannot be divided over that many GPUs."""
    by_layers = f"Set VLLM_EXTRA_ARGS='--tensor-parallel-size 1 --pipeline-parallel-size {tensor}'"
    if not _divides_heads(shape, tensor):
        raise SettingsError(
            f"The model's {shape.heads} attention heads ({shape.kv_heads} of keys and values) cannot be divided over "
            f"{tensor} GPUs.", "Set VRAM_PROFILE or --tensor-parallel-size in VLLM_EXTRA_ARGS to a number that divides "
            "them.", code="heads_not_divisible")
    if shape.column_groups % tensor:
        raise SettingsError(
            f"The checkpoint's quantization shares a scale among groups of weights, which {tensor} GPUs cannot divide.",
            f"{by_layers}.", code="groups_not_divisible")
    if tensor > 1 and shape.quantization == BITSANDBYTES:
        raise SettingsError(f"A bitsandbytes checkpoint cannot be divided over {tensor} GPUs.",
                            f"{by_layers}, or choose the model's unquantized checkpoint.",
                            code="nf4_checkpoint_not_divisible")
