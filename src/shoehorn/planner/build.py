"""Settings, machine, profile and model -> `Plan`, or a `Refusal` that names the smallest change that would fit.

Rules: pure, and made before a byte of weights moves; what is expected stands beside what is decided; a plan that the
estimate says would fail is refused. `decisions` says which source wins.
"""

from __future__ import annotations

import math

from shoehorn.common.units import format_size
from shoehorn.config.profiles import Profile
from shoehorn.hardware import gpu_specs
from shoehorn.hardware.types import Hardware
from shoehorn.model.shape import ModelShape
from shoehorn.planner import throughput
from shoehorn.planner.inputs import PlanInputs
from shoehorn.planner.memory.estimate import CONTEXT_BYTES, estimate, host_bytes, kv_tokens
from shoehorn.planner.memory.offload import offloaded_bytes, pinned_bytes
from shoehorn.planner.option_set import Reason
from shoehorn.planner.plan import Plan, Refusal
from shoehorn.planner.remedies import (
    context_remedy,
    host_remedies,
    largest,
    missing_on_fullest,
    neighbours,
    vram_remedies,
)
from shoehorn.planner.resolve import Decisions, decide

ALLOCATOR = "PYTORCH_ALLOC_CONF"


def make_plan(inputs: PlanInputs) -> Plan | Refusal:
    """Plan a start.

    Raises:
        SettingsError: settings that contradict each other, the profile, the model or the machine.
    """
    settings, hardware, profile, shape = inputs.settings, inputs.hardware, inputs.profile, inputs.shape
    disk_free_bytes, draft = inputs.disk_free_bytes, inputs.draft
    decisions = decide(inputs)
    choices, on_cpu = decisions.choices, not decisions.gpus
    vram = () if on_cpu else estimate(shape, choices)
    host = host_bytes(shape, choices, on_cpu)
    reasons = (*decisions.reasons, *_remarks(hardware, profile, shape, decisions, host))

    def refuse(cause: str, missing: str, missing_bytes: int, remedies: list[str]) -> Refusal:
        return Refusal(cause, missing, missing_bytes, tuple(remedies), profile.name, reasons, vram)

    if disk_free_bytes is not None and shape.disk_bytes > disk_free_bytes:
        lacking = shape.disk_bytes - disk_free_bytes
        return refuse(f"The model's files take {format_size(shape.disk_bytes)}, and {settings.models_dir} has "
                      f"{format_size(disk_free_bytes)} free.", "disk", lacking,
                      [f"free {format_size(lacking)} there", "mount a larger volume at MODELS_DIR"])
    short = missing_on_fullest(shape, choices, on_cpu)
    if short > 0 and not on_cpu:
        needed = choices.limit_bytes + short
        return refuse(f"The model needs {format_size(needed)} on each GPU, and may use "
                      f"{format_size(choices.limit_bytes)}: {format_size(short)} are missing. {largest(vram)}"
                      f"{neighbours(decisions)}",
                      "vram", short, vram_remedies(settings, hardware, shape, decisions))
    if short > 0:
        return refuse(f"The KV cache of {format_size(choices.kv_cache_bytes or 0)} is too small for one request of "
                      f"{choices.max_model_len} tokens: {format_size(short)} are missing.", "host_memory", short,
                      context_remedy(shape, choices, choices.kv_cache_bytes or 0))
    if hardware.host_memory_bytes and host > hardware.host_memory_bytes:
        lacking = host - hardware.host_memory_bytes
        layers = "" if on_cpu else f", {format_size(pinned_bytes(shape, choices))} of it for offloaded layers"
        return refuse(f"The start needs {format_size(host)} of host memory{layers}, and this container has "
                      f"{format_size(hardware.host_memory_bytes)}.", "host_memory", lacking,
                      host_remedies(shape, choices, lacking, on_cpu))
    cache = choices.kv_cache_bytes or 0 if on_cpu else vram[0].kv_cache_bytes
    return Plan(
        engine_args=decisions.options, engine_environment={**_allocator(decisions), **profile.environment},
        reasons=reasons, profile=profile.name,
        vram=vram, host_bytes=host, host_pinned_bytes=0 if on_cpu else pinned_bytes(shape, choices),
        offloaded_bytes=0 if on_cpu else sum(
            offloaded_bytes(shape, choices, stage) for stage in range(choices.pipeline_parallel)
        ) * choices.tensor_parallel,
        kv_cache_tokens=kv_tokens(shape, choices, cache),
        expected_tokens_per_second={"batch_1": None, "batch_8": None} if on_cpu else
        throughput.expected(shape, choices, decisions.gpus[0]),
        disk_bytes=shape.disk_bytes + (draft.shape.disk_bytes if draft else 0),
        choices=choices, fixed=decisions.fixed, draft=draft)


def _allocator(decisions: Decisions) -> dict[str, str]:
    """Settings of PyTorch's allocator: no holes that the KV cache cannot use, and never more than the limit.

    Quantizing and compiling leave blocks behind that are free but held; at the bound the allocator gives them back.
    Source: measured, see docs/estimator.md.
    """
    if not decisions.gpus:
        return {}
    bound = decisions.choices.limit_bytes - CONTEXT_BYTES
    share = math.floor(bound / max(gpu.total_bytes for gpu in decisions.gpus) * 10_000) / 10_000
    return {ALLOCATOR: f"expandable_segments:True,per_process_memory_fraction:{min(1.0, share)}"}


def _remarks(hardware: Hardware, profile: Profile, shape: ModelShape, decisions: Decisions, host: int) -> list[Reason]:
    """What a person should know besides the options."""
    remarks = [Reason("profile", profile.name, "profile", note) for note in profile.notes]
    remarks += [Reason("model", shape.architecture, "model", note) for note in shape.notes]
    if not hardware.host_memory_bytes:
        remarks.append(Reason("host-memory", format_size(host), "machine",
                              "unknown, so it is not checked that there is this much"))
    elif host > hardware.host_available_bytes:
        remarks.append(Reason("host-memory", format_size(host), "machine",
                              f"at this moment only {format_size(hardware.host_available_bytes)} are free"))
    if not decisions.gpus:
        remarks.append(Reason("speed", None, "machine", "no expectation: nothing is known of this processor"))
        return remarks
    gpu = decisions.gpus[0]
    if len({each.name for each in decisions.gpus}) > 1:
        remarks.append(Reason("gpus", len(decisions.gpus), "machine", "unequal cards: all run as the smallest"))
    if offloaded_bytes(shape, decisions.choices):
        link, known = gpu_specs.host_to_device_bandwidth(gpu)
        remarks.append(Reason("host-to-device", f"{link / 1e9:.3g} GB/s", "machine", "pinned memory over " + (
            f"PCIe {gpu.pcie_generation} with {gpu.pcie_width} lanes" if known else
            "an unknown link; PCIe 4 with 16 lanes is assumed")))
    if gpu_specs.memory_bandwidth(gpu.name) is None:
        remarks.append(Reason("device-memory", None, "machine",
                              f"nothing is known of the speed of {gpu.name or 'this card'}"))
    return remarks
