"""A plan on GPUs: division, share of each GPU, search, and what is missing where nothing fits."""

from __future__ import annotations

from dataclasses import replace

from shoehorn.common.units import GIB, format_size
from shoehorn.hardware import gpu_specs, visible_gpus
from shoehorn.hardware.types import Gpu, Hardware
from shoehorn.planner import dtype, gpu_share, parallelism, remedies, speculation, stages, throughput
from shoehorn.planner.assembly import Assembly
from shoehorn.planner.base_options import BaseOptions
from shoehorn.planner.derive import derive, without_offload_bound
from shoehorn.planner.inputs import PlanInputs
from shoehorn.planner.memory.device import PARTS, DeviceMemory
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.option_set import OptionSet
from shoehorn.planner.parallelism import Division
from shoehorn.planner.placement import place_on_gpus
from shoehorn.planner.plan import Plan, Refusal
from shoehorn.planner.reasons import MACHINE, Reason
from shoehorn.planner.start import Configured, configure, with_least_batch

_PREFERRED_DEFAULT = 1.1
"""Factor by which another division must be expected to be faster than the default one."""

_MUCH_USED_BYTES = GIB // 2
"""Memory of other processes from which on a refusal names them."""


def plan_on_gpus(inputs: PlanInputs, base: BaseOptions) -> Plan | Refusal:
    """Plan a start on GPUs.

    Raises:
        SettingsError: the settings, or the model, do not suit the GPUs.
    """
    configured, gpus = _fastest(inputs, parallelism.divisions(base.options, inputs))
    options, model = _derived(configured, inputs, base.by_user)
    devices = (*model.gpus, model.host_beside_gpus(inputs.hardware.host_memory_bytes))
    assembly = Assembly(inputs, base.by_user, options, model, devices, _remarks(model, gpus, inputs.hardware), gpus)
    if refusal := assembly.check_disk():
        return refusal
    if (missing := model.missing_bytes()) > 0:
        limit_bytes = model.config.limit_bytes
        return assembly.refuse(
            "gpu-memory-too-small", "vram", missing, remedies.on_gpus(assembly, gpus),
            needed=format_size(limit_bytes + missing), limit=format_size(limit_bytes), short=format_size(missing),
            largest=_largest_parts(model.gpus), others=_other_processes(gpus))
    if assembly.missing_host_bytes():
        return assembly.refuse_host(remedies.on_gpus_host(model, assembly.missing_host_bytes()))
    limits = tuple(gpu.limit_bytes for gpu in model.gpus)
    visible = {} if inputs.hardware.nodes else visible_gpus.environment_of(gpus)  # of its own machine
    environment = {**gpu_share.allocator(gpus, limits), **visible, **stages.environment(model.config)}
    speeds = throughput.expected(model, *gpus, host=inputs.hardware.host_compute)
    return assembly.plan(environment, place_on_gpus(model), model.gpus[0].kv_cache_bytes, speeds)


def _fastest(inputs: PlanInputs, divisions: list[Division]) -> tuple[Configured, tuple[Gpu, ...]]:
    """Search every division; return the fastest of the best tier, or the default if it is nearly as fast."""
    results: list[tuple[int, float, int, Configured, tuple[Gpu, ...]]] = []
    for division in divisions:
        options = dtype.supported_dtype(division.options, division.gpus, inputs.shape)
        machine = replace(inputs.hardware, gpus=division.gpus)
        configured = _best(replace(inputs, hardware=machine), options, division.gpus)
        speed = throughput.tokens_per_second(configured.model, division.gpus, 1, machine.host_compute)
        speed *= 1 if results else _PREFERRED_DEFAULT
        results.append((configured.preference, -speed, len(results), configured, division.gpus))
    *_, best, gpus = min(results, key=lambda result: result[:3])
    return best, gpus


def _best(inputs: PlanInputs, options: OptionSet, gpus: tuple[Gpu, ...]) -> Configured:
    """Search with vLLM's default share of each GPU, and with a larger one where that keeps all weights on the GPUs."""
    default = configure(inputs, *gpu_share.limits(options, gpus, inputs.settings.vram_limit))
    if not default.model.offloaded.stage_bytes(0) or gpu_share.OPTION in options.values:
        return default
    whole = options.set(gpu_share.OPTION, gpu_share.WHOLE_SHARE, MACHINE, "keeps-weights-on-gpu")
    larger = configure(inputs, *gpu_share.limits(whole, gpus, inputs.settings.vram_limit))
    return larger if larger.fits_without_offload else default


def _derived(configured: Configured, inputs: PlanInputs, by_user: frozenset[str]) -> tuple[OptionSet, MemoryModel]:
    """Derive vLLM's options from the configuration, the size of the KV cache included."""
    fields, model = configured.open_fields, with_least_batch(configured.model)
    options = derive(without_offload_bound(configured.options, fields, model), fields, model, configured.chosen)
    cache_bytes = max(gpu.kv_cache_bytes for gpu in model.gpus)
    by_share = gpu_share.OPTION in by_user  # the user leaves the cache to vLLM
    if cache_bytes and not by_share and "kv-cache-memory-bytes" not in options.values:
        options = options.set("kv-cache-memory-bytes", cache_bytes, MACHINE, "cache-fixed")
    if model is not configured.model:
        options = options.set("max-num-batched-tokens", model.config.limits.max_num_batched_tokens, MACHINE,
                              "one-token-per-sequence")
    return speculation.match_quantization(options, inputs.draft, model.config.nf4), model


def _remarks(model: MemoryModel, gpus: tuple[Gpu, ...], hardware: Hardware) -> tuple[Reason, ...]:
    """Remarks about the GPUs and their connection."""
    count, gpu = len(gpus), gpus[0]
    remarks = [Reason("left-out-gpus", None, MACHINE, "gpu-remark", {"remark": text}) for text in hardware.gpu_remarks]
    idle = [each.label for each in hardware.gpus if each not in gpus]
    if idle:
        remarks.append(Reason("idle-gpus", len(idle), MACHINE, "idle-gpus", {"idle": ", ".join(idle)}))
    if layers := model.config.parallelism.layers:
        remarks.append(Reason(stages.PARTITION, ",".join(map(str, layers)), MACHINE, "layer-partition"))
    sequences, most = model.served_sequences(model.gpus[0].kv_cache_bytes), model.config.limits.max_num_seqs
    if model.shape.state_layers and sequences < most:
        params = {"sequences": sequences, "most": most}
        remarks.append(Reason("sequences", sequences, MACHINE, "sequences-wait", params))
    if slots := model.config.adapters:
        remarks.append(Reason("lora-adapters", slots.count, MACHINE, "adapters-memory", {
            "count": slots.count, "rank": slots.rank, "bytes": format_size(model.adapters_bytes(0))}))
    if len({each.name for each in gpus}) > 1:
        remarks.append(Reason("gpus", count, MACHINE, "mixed-gpus"))
    if model.offloaded.stage_bytes(0):
        bandwidth, is_known = gpu_specs.host_to_device_bandwidth(gpu)
        remarks.append(Reason("host-to-device", f"{bandwidth / 1e9:.3g} GB/s", MACHINE,
                              "pcie" if is_known else "pcie-unknown",
                              {"generation": gpu.pcie_generation, "lanes": gpu.pcie_width}))
    if gpu_specs.memory_bandwidth(gpu.name) is None:
        remarks.append(Reason("device-memory", None, MACHINE, "speed-unknown-gpu", {"gpu": gpu.name or "this GPU"}))
    return tuple(remarks)


def _largest_parts(gpus: tuple[DeviceMemory, ...]) -> str:
    """Name the two largest parts of the fullest GPU, which say where a change would help."""
    fullest = max(gpus, key=lambda gpu: gpu.total_bytes - gpu.kv_cache_bytes).parts()
    largest = sorted(fullest, key=lambda part: -fullest[part])[:2]
    return " and ".join(f"{PARTS[part]} ({format_size(fullest[part])})" for part in largest)


def _other_processes(gpus: tuple[Gpu, ...]) -> str:
    """Name the memory that other processes use, where that is much."""
    used = max(gpu.total_bytes - gpu.free_bytes for gpu in gpus)
    if used < _MUCH_USED_BYTES:
        return ""
    return f" Other processes use {format_size(used)} of the GPU: terminate them (`nvidia-smi` lists them)."
