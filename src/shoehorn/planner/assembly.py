"""Common core of plans on GPUs and on the CPU: checks of disk and host memory, remarks, and the plan itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shoehorn.common.units import format_size
from shoehorn.hardware.types import Gpu
from shoehorn.hardware.visible_gpus import ORDER, VISIBLE
from shoehorn.planner.base_options import served_task
from shoehorn.planner.inputs import PlanInputs
from shoehorn.planner.memory.device import DeviceMemory
from shoehorn.planner.memory.items import remark
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.option_set import OptionSet
from shoehorn.planner.placement import Placement
from shoehorn.planner.plan import Plan, Refusal, SequenceStates
from shoehorn.planner.reasons import MACHINE, MODEL, PROFILE, Reason
from shoehorn.planner.refusal_texts import Remedy
from shoehorn.planner.serving_config import ServingConfig


@dataclass(frozen=True)
class Assembly:
    """Everything decided about a start, before the check that it fits.

    Attributes:
        devices: memory of each GPU in use, then of the CPU.
        gpus: in use, in the order of `devices`.
        remarks: reasons of the builder that are about no option.
    """

    inputs: PlanInputs
    by_user: frozenset[str]
    options: OptionSet
    model: MemoryModel
    devices: tuple[DeviceMemory, ...]
    remarks: tuple[Reason, ...]
    gpus: tuple[Gpu, ...] = ()

    @property
    def host(self) -> DeviceMemory:
        """Memory of the CPU."""
        return self.devices[-1]

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """All reasons, those of the options first."""
        return (*self.options.reasons.values(), *_common_remarks(self.inputs, self.host, self.model.config),
                *self.remarks)

    def refuse(self, code: str, missing: str, missing_bytes: int, remedies: list[Remedy], **params: object) -> Refusal:
        """Refuse the start."""
        return Refusal(code, params, missing, missing_bytes, tuple(remedies), self.inputs.profile.name, self.reasons,
                       self.devices)

    def check_disk(self) -> Refusal | None:
        """Refuse where the volume has too little space for the model's files."""
        needed, free = self.inputs.shape.disk_bytes, self.inputs.disk_free_bytes
        if free is None or needed <= free:
            return None
        remedies = [Remedy("free-disk", needed - free), Remedy("larger-volume")]
        return self.refuse("disk-too-small", "disk", needed - free, remedies, needed=format_size(needed),
                           directory=self.inputs.settings.models_dir, free=format_size(free))

    def missing_host_bytes(self) -> int:
        """Host memory that the start lacks; 0 where there is enough, or where its size is unknown."""
        available = self.inputs.hardware.host_memory_bytes
        return max(0, self.host.total_bytes - available) if available else 0

    def refuse_host(self, remedies: list[Remedy]) -> Refusal:
        """Refuse because of too little host memory."""
        offloaded = f" ({format_size(self.host.pinned_bytes)} of it for offloaded layers)" if len(self.devices) > 1 \
            else ""
        return self.refuse("host-memory-too-small", "host_memory", self.missing_host_bytes(), remedies,
                           needed=format_size(self.host.total_bytes), offloaded=offloaded,
                           available=format_size(self.inputs.hardware.host_memory_bytes))

    def plan(self, environment: Mapping[str, str], placement: Placement, cache_bytes: int,
             tokens_per_second: Mapping[str, float | None]) -> Plan:
        """Make the plan."""
        inputs, draft = self.inputs, self.inputs.draft
        return Plan(
            engine_args=self.options.values,
            engine_environment={**environment, **_cpu_compute(inputs), **_of_profile(inputs, environment)},
            reasons=self.reasons, profile=inputs.profile.name, devices=self.devices, placement=placement,
            offloaded_bytes=self.model.offloaded.bytes if len(self.devices) > 1 else 0,
            kv_cache_tokens=self.model.kv_tokens(cache_bytes), expected_tokens_per_second=tokens_per_second,
            disk_bytes=inputs.shape.disk_bytes + (draft.shape.disk_bytes if draft else 0), config=self.model.config,
            fixed=self.by_user, draft=draft, thinking_switch=inputs.chat.switch if inputs.chat else "",
            task=served_task(inputs.task, self.options), states=self._states(cache_bytes), gpus=self.gpus)

    def _states(self, cache_bytes: int) -> SequenceStates | None:
        """Compute the states of a sequence; None for a model without."""
        kinds, layouts = self.inputs.shape.state_layers, self.model.cache_layouts
        if not kinds:
            return None
        return SequenceStates(sum(kind.layers for kind in kinds), max(layout.states for layout in layouts),
                              max(layout.state_bytes for layout in layouts), self.model.served_sequences(cache_bytes))


def _cpu_compute(inputs: PlanInputs) -> dict[str, str]:
    """Keep the CPU kernel out of the engine where the user does."""
    return {"SHOEHORN_CPU_COMPUTE": "off"} if inputs.settings.cpu_compute == "off" else {}


def _of_profile(inputs: PlanInputs, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the profile's variables, without those of GPUs where the plan names these by UUID."""
    named = {VISIBLE, ORDER} if VISIBLE in environment else set()
    return {name: value for name, value in inputs.profile.environment.items() if name not in named}


def _common_remarks(inputs: PlanInputs, host: DeviceMemory, config: ServingConfig) -> list[Reason]:
    """Notes of profile and model, and the state of host memory."""
    remarks = [Reason("profile", inputs.profile.name, PROFILE, "profile-note", {"note": note})
               for note in inputs.profile.notes]
    remarks += [Reason("model", inputs.shape.architecture, MODEL, "model-note", {"note": note})
                for note in (*inputs.shape.notes, *(remark(encoder, config) for encoder in inputs.shape.encoders))]
    needed, hardware = format_size(host.total_bytes), inputs.hardware
    if not hardware.host_memory_bytes:
        remarks.append(Reason("host-memory", needed, MACHINE, "host-memory-unknown"))
    elif host.total_bytes > hardware.host_available_bytes:
        remarks.append(Reason("host-memory", needed, MACHINE, "host-memory-used",
                              {"available": format_size(hardware.host_available_bytes)}))
    return remarks
