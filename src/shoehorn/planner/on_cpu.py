"""A plan on the CPU: small models, without GPUs."""

from __future__ import annotations

from dataclasses import replace

from shoehorn.common.errors import SettingsError
from shoehorn.common.units import GIB, format_size
from shoehorn.planner import nodes, remedies, speculation
from shoehorn.planner.assembly import Assembly
from shoehorn.planner.base_options import BaseOptions
from shoehorn.planner.derive import derive
from shoehorn.planner.inputs import PlanInputs
from shoehorn.planner.load_tiers import CONTEXT_8K, SMALL_TIERS
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.option_set import OptionSet
from shoehorn.planner.placement import place_on_cpu
from shoehorn.planner.plan import Plan, Refusal
from shoehorn.planner.reasons import MACHINE, Reason
from shoehorn.planner.search import at_load, within_states
from shoehorn.planner.serving_config import BITSANDBYTES, NoOffload
from shoehorn.planner.start import open_fields, start_config, with_least_batch
from shoehorn.planner.vllm_args import Field

_KV_CACHE_BYTES = GIB
_OPEN_FIELDS = frozenset({Field.CONTEXT, Field.SEQUENCES, Field.BATCH})


def plan_on_cpu(inputs: PlanInputs, base: BaseOptions) -> Plan | Refusal:
    """Plan a start on the CPU.

    Raises:
        SettingsError: the settings or the model cannot be used on this CPU.
    """
    _require_supported(inputs)
    options = base.options
    if "kv-cache-memory-bytes" not in options.values:
        options = options.set("kv-cache-memory-bytes", _KV_CACHE_BYTES, MACHINE, "cache-default")
    if inputs.hardware.nodes:
        options = nodes.over_nodes(options, len(inputs.hardware.nodes), 1)
    options, model = _configured(inputs, options)
    devices = (model.host_alone(inputs.hardware.host_memory_bytes),)
    assembly = Assembly(inputs, base.by_user, options, model, devices,
                        (*_kernel(inputs), Reason("speed", None, MACHINE, "speed-unknown-cpu")))
    if refusal := assembly.check_disk():
        return refusal
    cache_bytes = model.config.kv_cache_bytes or 0
    if (missing := model.missing_on_host()) > 0:
        return assembly.refuse(
            "kv-cache-too-small", "host_memory", missing, remedies.shorter_context(model, cache_bytes),
            cache=format_size(cache_bytes), context=model.config.limits.max_model_len, short=format_size(missing))
    if assembly.missing_host_bytes():
        return assembly.refuse_host(remedies.on_cpu_host(model, assembly.missing_host_bytes()))
    return assembly.plan({}, place_on_cpu(model), cache_bytes, {"batch_1": None, "batch_8": None})


def _configured(inputs: PlanInputs, options: OptionSet) -> tuple[OptionSet, MemoryModel]:
    """Fill in the open limits; everything else is given or has one value on a CPU."""
    fields = open_fields(options, inputs.shape) & _OPEN_FIELDS
    start = replace(start_config(inputs, options, inputs.hardware.host_memory_bytes), offload=NoOffload())
    tried = (MemoryModel(inputs.shape, at_load(start, load, fields)) for load in (CONTEXT_8K, *SMALL_TIERS))
    model = next((each for each in tried if each.missing_on_host() <= 0),
                 MemoryModel(inputs.shape, at_load(start, CONTEXT_8K, fields)))
    model = model.with_config(within_states(model, fields))
    raised = with_least_batch(model)
    options = derive(options, fields, raised, None, "default")
    if raised is not model:
        options = options.set("max-num-batched-tokens", raised.config.limits.max_num_batched_tokens, MACHINE,
                              "one-token-per-sequence")
    return speculation.match_quantization(options, inputs.draft, raised.config.nf4), raised


def _require_supported(inputs: PlanInputs) -> None:
    """Raise SettingsError for settings and models that the engine cannot serve on this CPU."""
    shape = inputs.shape
    if inputs.settings.vram_limit:
        raise SettingsError(f"VRAM_LIMIT: profile {inputs.profile.name} uses no GPU.",
                            "Unset VRAM_LIMIT, or choose another VRAM_PROFILE.", code="vram_limit_without_gpu")
    if shape.packed_embedding and inputs.settings.cpu_compute == "off":
        raise SettingsError("The checkpoint's embedding is quantized, which the engine supports on a CPU only with "
                            "CPU_COMPUTE=auto.", "Unset CPU_COMPUTE, or choose another checkpoint.",
                            code="unsupported_checkpoint")
    if shape.experts and shape.quantization not in (None, BITSANDBYTES) and _obstacle(inputs) \
            and not inputs.hardware.amx:
        raise SettingsError(f"The model's experts are quantized, and {_LACKING[_obstacle(inputs)]}. The engine's own "
                            "kernel for them needs AMX, which this processor lacks.",
                            "Set QUANTIZATION=none, or choose the model's unquantized checkpoint.",
                            code="unsupported_processor")


_LACKING = {
    "off": "CPU_COMPUTE=off disables the CPU kernel",
    "library": "the CPU kernel is not installed (install a C compiler, then reinstall Shoehorn)",
    "format": "the CPU kernel reads only symmetric INT4 in groups of 32, 64 or 128, with bfloat16 activations",
}
"""Reasons why the CPU kernel does not multiply the experts."""


def _obstacle(inputs: PlanInputs) -> str:
    """Return why the CPU kernel cannot multiply the model's weights, as a key of `_LACKING`; "" where it does."""
    if inputs.settings.cpu_compute == "off":
        return "off"
    if not inputs.shape.symmetric_int4 or inputs.shape.dtype != "bfloat16":
        return "format"
    return "" if inputs.hardware.cpu_kernel else "library"


def _kernel(inputs: PlanInputs) -> tuple[Reason, ...]:
    """Report which kernel multiplies INT4 weights; nothing for other weights."""
    if not inputs.shape.symmetric_int4:
        return ()
    code = {"": "cpu-kernel", "library": "cpu-kernel-torch"}.get(_obstacle(inputs), "cpu-kernel-engine")
    return (Reason("cpu-kernel", code.removeprefix("cpu-kernel").lstrip("-") or "shoehorn", MACHINE, code),)
