"""The planner's results: a plan of a start, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from shoehorn.common.errors import DoesNotFitError
from shoehorn.hardware.types import Gpu
from shoehorn.model.task import Task
from shoehorn.planner.inputs import Draft
from shoehorn.planner.memory.device import DeviceMemory
from shoehorn.planner.placement import Placement
from shoehorn.planner.reasons import Reason
from shoehorn.planner.refusal_texts import CAUSES, Remedy
from shoehorn.planner.serving_config import BITSANDBYTES, ServingConfig


@dataclass(frozen=True)
class SequenceStates:
    """States of a sequence in the KV cache: Mamba, Gated DeltaNet and other layers without keys and values.

    Attributes:
        layers: that have states.
        per_layer: states that each of them keeps of a sequence.
        bytes_per_sequence: of all of them on one GPU.
        sequences: whose states fit at a time.
    """

    layers: int
    per_layer: int
    bytes_per_sequence: int
    sequences: int


@dataclass(frozen=True)
class Plan:
    """A start that fits.

    Attributes:
        engine_args: vLLM's options without leading dashes; model, name and addresses are added when rendering.
        devices: memory of each GPU in use, then of the CPU.
        offloaded_bytes: weights of the layers in host memory, all GPUs together.
        kv_cache_tokens: of all requests together.
        expected_tokens_per_second: `batch_1` and `batch_8`; None where nothing is known.
        disk_bytes: files of the model, and of the draft model.
        fixed: options that the user gave.
        draft: the draft model, where one is used.
        thinking_switch: variable of the chat template that switches thoughts; "" without one.
        task: what the engine serves.
        states: None for a model without states.
        gpus: in use, in the order of the engine's ranks; none on the CPU.
    """

    engine_args: Mapping[str, object]
    engine_environment: Mapping[str, str]
    reasons: tuple[Reason, ...]
    profile: str
    devices: tuple[DeviceMemory, ...]
    placement: Placement
    offloaded_bytes: int
    kv_cache_tokens: int
    expected_tokens_per_second: Mapping[str, float | None]
    disk_bytes: int
    config: ServingConfig = field(repr=False)
    fixed: frozenset[str] = field(repr=False)
    draft: Draft | None = field(repr=False, default=None)
    thinking_switch: str = ""
    task: Task = Task.GENERATE
    states: SequenceStates | None = None
    gpus: tuple[Gpu, ...] = ()

    @property
    def vram(self) -> tuple[DeviceMemory, ...]:
        """Memory of each GPU; none on the CPU."""
        return tuple(device for device in self.devices if device.is_gpu)

    @property
    def host_bytes(self) -> int:
        """Host memory of all processes together."""
        return sum(device.total_bytes for device in self.devices if not device.is_gpu)

    @property
    def host_pinned_bytes(self) -> int:
        """Host memory that offload pins."""
        return sum(device.pinned_bytes for device in self.devices)

    def to_json(self) -> dict[str, Any]:
        """`shoehorn plan --json`; `fits` is true."""
        return {"fits": True, "profile": self.profile, "engine_args": dict(self.engine_args),
                "engine_environment": dict(self.engine_environment),
                "reasons": [reason.to_json() for reason in self.reasons],
                "vram": [device.to_json() for device in self.vram], "host_bytes": self.host_bytes,
                "host_pinned_bytes": self.host_pinned_bytes,
                "offloaded_bytes": self.offloaded_bytes, "kv_cache_tokens": self.kv_cache_tokens,
                "expected_tokens_per_second": dict(self.expected_tokens_per_second), "disk_bytes": self.disk_bytes,
                "devices": [device.to_device_json() for device in self.devices],
                "placement": self.placement.to_json(), "states": asdict(self.states) if self.states else None,
                "gpus": [{"index": gpu.index, "uuid": gpu.uuid, "name": gpu.name} for gpu in self.gpus]}

    def public_summary(self) -> dict[str, Any]:
        """Figures for the console page and `/status`, which need no key: nothing that a user typed freely.

        `quantization` is `bitsandbytes`, or empty where the weights are served as the checkpoint holds them. The parts
        of each entry of `vram` add up to its `total_bytes`.
        """
        limits = self.config.limits
        return {"quantization": BITSANDBYTES if self.config.nf4 else "", "max_model_len": limits.max_model_len,
                "max_num_seqs": limits.max_num_seqs, "kv_cache_tokens": self.kv_cache_tokens,
                "offloaded_bytes": self.offloaded_bytes, "host_bytes": self.host_bytes, "disk_bytes": self.disk_bytes,
                "expected_tokens_per_second": dict(self.expected_tokens_per_second),
                "task": self.task.value,
                "thoughts": "reasoning-parser" in self.engine_args, "tools": "tool-call-parser" in self.engine_args,
                "vram": [device.to_json() for device in self.vram],
                "gpus": [{"index": gpu.index, "name": gpu.name} for gpu in self.gpus]}


@dataclass(frozen=True)
class Refusal:
    """A start that does not fit.

    Attributes:
        code: key of `CAUSES`; params: its parameters.
        missing: of what there is too little: `vram` (of each GPU), `host_memory` or `disk`.
        remedies: changes each of which is enough, the smallest first.
        devices: expected memory of each device.
    """

    code: str
    params: Mapping[str, object]
    missing: str
    missing_bytes: int
    remedies: tuple[Remedy, ...]
    profile: str
    reasons: tuple[Reason, ...] = field(repr=False)
    devices: tuple[DeviceMemory, ...] = field(repr=False)

    @property
    def cause(self) -> str:
        """The cause as a sentence."""
        return CAUSES[self.code].format(**self.params)

    @property
    def vram(self) -> tuple[DeviceMemory, ...]:
        """Memory of each GPU; none on the CPU."""
        return tuple(device for device in self.devices if device.is_gpu)

    def to_json(self) -> dict[str, Any]:
        """`shoehorn plan --json`; `fits` is false."""
        return {"fits": False, "profile": self.profile, "code": self.code, "cause": self.cause,
                "missing": self.missing, "missing_bytes": self.missing_bytes,
                "remedies": [remedy.text for remedy in self.remedies],
                "remedy_codes": [{"code": remedy.code, "value": remedy.value} for remedy in self.remedies],
                "reasons": [reason.to_json() for reason in self.reasons],
                "vram": [device.to_json() for device in self.vram],
                "devices": [device.to_device_json() for device in self.devices]}

    def as_error(self) -> DoesNotFitError:
        """Convert to an error, whose exit code is 3."""
        texts = [remedy.text for remedy in self.remedies]
        remedy = "Any one of these is enough: " + "; ".join(texts) if len(texts) > 1 else "".join(texts).capitalize()
        return DoesNotFitError(self.cause, f"{remedy}.", code=self.code)
