"""Inputs of the planner: everything that a plan depends on, and nothing secret.

`deployment` gathers them; the planner reads no file, no environment variable and no machine of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from shoehorn.config.profiles import Profile
from shoehorn.config.settings import Settings
from shoehorn.hardware.types import Hardware
from shoehorn.model.chat_format import ChatFormat
from shoehorn.model.reference import ModelRef
from shoehorn.model.shape import ModelShape
from shoehorn.model.task import Task


@dataclass(frozen=True)
class PlanSettings:
    """The settings that planning reads, by the names and in the forms of `Settings`. None of them is a secret."""

    model_id: str
    models_dir: Path
    quantization: str
    max_model_len: int | None
    max_num_seqs: int | None
    vram_limit: int | None
    speculative: str
    cpu_compute: str
    trust_remote_code: bool
    reasoning_parser: str
    tool_call_parser: str
    vllm_extra_args: tuple[str, ...]
    vllm_pp_layer_partition: tuple[int, ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> PlanSettings:
        """Copy the fields that planning reads."""
        return cls(**{each.name: getattr(settings, each.name) for each in fields(cls)})


@dataclass(frozen=True)
class Draft:
    """The draft model of speculative decoding.

    Attributes:
        ref: of the draft model, in the format that is served.
        directory: of its files, which need not exist yet.
        lacking_bytes: disk space that the volume lacks for it.
    """

    ref: ModelRef
    directory: Path
    shape: ModelShape
    lacking_bytes: int = 0


@dataclass(frozen=True)
class PlanInputs:
    """Everything that a plan depends on.

    Attributes:
        settings: QUANTIZATION is resolved: `auto` stands for the checkpoint's own format, or NF4 made while loading.
        hardware: host memory of 0 bytes is unknown, and not checked.
        shape: of the model as the engine will load it, after a conversion.
        disk_free_bytes: for the model's files; None when these are complete or the volume is not known.
        known_good: vLLM options of the last configuration that started here; None drops an option.
        draft: the draft model to plan with; None plans without one.
        chat: format of the model's conversations; None if it has none, or they do not matter.
        task: what the model is for, unless the user's option `runner` decides otherwise.
    """

    settings: PlanSettings
    hardware: Hardware
    profile: Profile
    shape: ModelShape
    disk_free_bytes: int | None = None
    known_good: Mapping[str, object] = field(default_factory=dict)
    draft: Draft | None = None
    chat: ChatFormat | None = None
    task: Task = Task.GENERATE
