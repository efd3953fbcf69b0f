"""GPUs in use, and the divisions of the model over them: by matrices (tensor) or by layers (pipeline).

Rules: profile and options decide where they say so. Otherwise the default is all equal GPUs, by matrices wherever heads
and groups of quantized weights can be divided, since then every GPU works on every token; other divisions, over more,
fewer or unequal GPUs, are alternatives that the search compares with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from shoehorn.common.errors import SettingsError
from shoehorn.common.units import GIB
from shoehorn.hardware.requirements import require_gpus
from shoehorn.hardware.types import Gpu, largest_first
from shoehorn.model.shape import ModelShape
from shoehorn.planner import nodes
from shoehorn.planner.inputs import PlanInputs
from shoehorn.planner.option_set import OptionSet
from shoehorn.planner.reasons import MACHINE
from shoehorn.planner.serving_config import BITSANDBYTES
from shoehorn.planner.stages import users_layers

_NAMED = "device-ids"
_TENSOR, _PIPELINE = "tensor-parallel-size", "pipeline-parallel-size"


@dataclass(frozen=True)
class Division:
    """GPUs in the order of the engine's ranks, and options that divide the model over them."""

    options: OptionSet
    gpus: tuple[Gpu, ...]


def divisions(options: OptionSet, inputs: PlanInputs) -> list[Division]:
    """List the possible divisions, the default first; only one where profile or options decide.

    Raises:
        SettingsError: too few GPUs, or the model cannot be divided over them.
    """
    name = inputs.profile.name
    if inputs.hardware.nodes:
        return _over_nodes(options, inputs)
    inputs = _with_named_gpus(options, inputs)
    if inputs.profile.is_auto and not {_TENSOR, _PIPELINE} & options.values.keys():
        available = _ordered(options, require_gpus(inputs.hardware, name))
        candidates = [_over_equal_gpus(options, available, inputs.shape),
                      *_alternatives(options, available, inputs.shape)]
        stages, named = len(users_layers(inputs)), len(available) if _NAMED in options.values else 0
        candidates = [each for each in candidates if each.options.integer(_PIPELINE, 1) == stages] or candidates
        candidates = [each for each in candidates if len(each.gpus) == named] or candidates
    else:
        count = [options.integer(each, 1) for each in (_TENSOR, _PIPELINE)]
        if min(count) < 1:
            raise SettingsError("tensor-parallel-size and pipeline-parallel-size: less than one is invalid.",
                                "Correct them in VLLM_EXTRA_ARGS or in the profile.", code="invalid_parallelism")
        available = require_gpus(inputs.hardware, name, count[0] * count[1])
        candidates = [Division(options, _ordered(options, available)[:count[0] * count[1]])]
    if any(gpu.mig for gpu in candidates[0].gpus):
        raise SettingsError("The GPU is divided by MIG, which is unsupported.",
                            "Pass a whole GPU in, or switch MIG off on the host: nvidia-smi -mig 0",
                            code="unsupported_mig")
    _require_divisible(inputs.shape, candidates[0].options.integer(_TENSOR, 1))
    return [_by_uuid(each) for each in candidates]


def _over_nodes(options: OptionSet, inputs: PlanInputs) -> list[Division]:
    """Divide the model over the machines of a cluster: as many GPUs of each, or every GPU of unequal machines."""
    hardware, shape = inputs.hardware, inputs.shape
    most = 1 if shape.quantization == BITSANDBYTES else min(hardware.nodes)
    if not hardware.gpus or not most:
        raise SettingsError("A machine of the cluster has no usable GPU.", "Start it with its GPUs: --gpus all.",
                            code="no_gpu")
    tensor = next(each for each in range(most, 0, -1) if divides(shape, each))
    candidates = [nodes.over_nodes(options, len(hardware.nodes), tensor)]
    if not {_TENSOR, _PIPELINE} & options.values.keys() and len(set(hardware.nodes)) > 1:
        shared = math.gcd(*hardware.nodes)
        tensor = next(each for each in range(min(most, shared), 0, -1) if not shared % each and divides(shape, each))
        stages = sum(hardware.nodes) // tensor
        whole = options.set(_PIPELINE, stages, MACHINE, "over-every-gpu", stages=stages, nodes=len(hardware.nodes))
        candidates.append(whole.set(_TENSOR, tensor, MACHINE, "within-nodes", gpus=tensor) if tensor > 1 else whole)
    over_all = []
    for each in candidates:
        gpus = nodes.ranks(hardware, each)
        _require_divisible(shape, each.integer(_TENSOR, 1))
        if each.integer(_TENSOR, 1) > 1:
            each = each.set("disable-custom-all-reduce", True, MACHINE, "no-peer-access")
        over_all.append(Division(each, gpus))
    return over_all


def _ordered(options: OptionSet, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Sort GPUs for the engine's ranks: as `--device-ids` names them, else the largest first."""
    return tuple(gpus if _NAMED in options.values else largest_first(gpus))


def _by_uuid(division: Division) -> Division:
    """Name the GPUs of `--device-ids` by UUID, which is independent of their visibility."""
    if _NAMED not in division.options.values or not all(gpu.uuid for gpu in division.gpus):
        return division
    named = ",".join(gpu.uuid for gpu in division.gpus)
    return replace(division, options=division.options.set_by_user(_NAMED, named, setting="VLLM_EXTRA_ARGS"))


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
    return _divides_heads(shape, gpus) and not shape.column_groups % gpus and not _undivided_groups(shape, gpus)


def _divides_heads(shape: ModelShape, gpus: int) -> bool:
    return not (shape.heads % gpus or (shape.kv_heads % gpus and gpus % shape.kv_heads))


def _undivided_groups(shape: ModelShape, gpus: int) -> int:
    """Return the number of Mamba-2's groups if vLLM cannot give each of that many GPUs some of them; 0 if it can."""
    return next((state.groups for state in shape.state_layers if state.groups > 1 and state.groups % gpus), 0)


def _over_equal_gpus(options: OptionSet, gpus: Sequence[Gpu], shape: ModelShape) -> Division:
    """Divide the model over the largest set of equal GPUs."""
    sizes = [round(gpu.total_bytes / GIB) for gpu in gpus]
    size = max(sizes, key=lambda each: (sizes.count(each) * each, sizes.count(each)))
    equal = tuple(gpu for gpu in gpus if round(gpu.total_bytes / GIB) == size)
    count = len(equal)
    if count < len(gpus):
        options = options.remark("gpus", count, MACHINE, "unequal-gpus", gpus=len(gpus))
    if count == 1:
        return Division(options, equal)
    if shape.quantization == BITSANDBYTES:
        return Division(options.set(_PIPELINE, count, MACHINE, "layers-only-nf4", gpus=count), equal)
    tensor = next(each for each in range(count, 0, -1) if divides(shape, each))
    if tensor == 1:
        return Division(options.set(_PIPELINE, count, MACHINE, "layers-only", gpus=count), equal)
    options = options.set(_TENSOR, tensor, MACHINE, "equal-gpus", gpus=count, heads=shape.heads)
    return Division(options.set("disable-custom-all-reduce", True, MACHINE, "no-peer-access"), equal[:tensor])


def _alternatives(options: OptionSet, gpus: Sequence[Gpu], shape: ModelShape) -> Iterator[Division]:
    """Yield divisions over the GPUs that have at least as much memory as each of them, in every way.

    Matrices are divided over GPUs of one generation only: the engine chooses its kernels by the first.
    """
    for count in range(1, len(gpus) + 1):
        if 1 < count < len(gpus) and _is_alike(gpus[count - 1], gpus[count]):
            continue
        for tensor in range(1, count + 1):
            stages = count // tensor
            chosen = tuple(gpus[:tensor * stages])
            one_generation = len({gpu.compute_capability for gpu in chosen}) == 1
            if tensor > 1 and (shape.quantization == BITSANDBYTES or not one_generation or not divides(shape, tensor)):
                continue
            if stages > shape.layers:
                continue
            changed = options
            if stages > 1:
                changed = changed.set(_PIPELINE, stages, MACHINE, "fastest-division", gpus=len(chosen))
            if tensor > 1:
                changed = changed.set(_TENSOR, tensor, MACHINE, "fastest-division", gpus=len(chosen))
                changed = changed.set("disable-custom-all-reduce", True, MACHINE, "no-peer-access")
            yield Division(changed, chosen)


def _is_alike(one: Gpu, other: Gpu) -> bool:
    """Return whether two GPUs have the same name, generation and memory."""
    sizes = {round(min(gpu.total_bytes, gpu.free_bytes) / GIB) for gpu in (one, other)}
    return len(sizes) == 1 and (one.name, one.compute_capability) == (other.name, other.compute_capability)


def _require_divisible(shape: ModelShape, tensor: int) -> None:
    """Raise SettingsError where a matrix of the model cannot be divided over that many GPUs."""
    by_layers = f"Set VLLM_EXTRA_ARGS='--tensor-parallel-size 1 --pipeline-parallel-size {tensor}'"
    if not _divides_heads(shape, tensor):
        raise SettingsError(
            f"The model's {shape.heads} attention heads ({shape.kv_heads} of keys and values) cannot be divided over "
            f"{tensor} GPUs.", "Set VRAM_PROFILE or --tensor-parallel-size in VLLM_EXTRA_ARGS to a number that divides "
            "them.", code="heads_not_divisible")
    if groups := _undivided_groups(shape, tensor):
        raise SettingsError(f"The model's {groups} groups of Mamba-2 states cannot be divided over {tensor} GPUs.",
                            f"{by_layers}.", code="groups_not_divisible")
    if shape.column_groups % tensor:
        raise SettingsError(
            f"The checkpoint's quantization shares a scale among groups of weights, which {tensor} GPUs cannot divide.",
            f"{by_layers}.", code="groups_not_divisible")
    if tensor > 1 and shape.quantization == BITSANDBYTES:
        raise SettingsError(f"A bitsandbytes checkpoint cannot be divided over {tensor} GPUs.",
                            f"{by_layers}, or choose the model's unquantized checkpoint.",
                            code="nf4_checkpoint_not_divisible")
