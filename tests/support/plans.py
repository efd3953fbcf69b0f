"""Invented machines, models, configurations, and plans for them."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from typing import Any

from fakes import captured as captured_models
from fakes.checkpoint_files import dense
from shoehorn.config import settings
from shoehorn.config.settings import Settings
from shoehorn.deployment import inputs
from shoehorn.hardware.types import Gpu, Hardware
from shoehorn.model import checkpoint as checkpoints
from shoehorn.model.shape import ModelShape
from shoehorn.planner.build import make_plan
from shoehorn.planner.inputs import PlanInputs, PlanSettings
from shoehorn.planner.plan import Plan, Refusal
from shoehorn.planner.reasons import Reason
from shoehorn.planner.serving_config import Limits, ServingConfig

GIB = 1 << 30


@cache
def llama_70b() -> ModelShape:
    return captured_models.shape("deepseek-r1-distill-llama-70b")


@cache
def llama_8b() -> ModelShape:
    return checkpoints.read(dense(4096, 14336, 32, 32, 8, 128256))


@cache
def tiny() -> ModelShape:
    return checkpoints.read(dense(256, 768, 4, 4, 2, 2048, max_position=2048, tied=True))


def quantized(method: str) -> ModelShape:
    """The 8B as if its checkpoint were quantized by that method."""
    return replace(llama_8b(), quantization=method)


def nf4_checkpoint() -> ModelShape:
    """An 8B whose checkpoint is quantized by bitsandbytes."""
    return captured_models.shape("llama-3.1-8b-bnb-4bit")


def machine(*gpus_as_sold: tuple[str, float], ram: int = 64) -> Hardware:
    """A machine with these GPUs (name, GiB as CUDA reports it) on PCIe 4, and that many GiB of host memory."""
    gpus = tuple(Gpu(index, f"GPU-{index}", name, round(size * GIB), round(size * GIB), (8, 9), 4, 16, False)
                 for index, (name, size) in enumerate(gpus_as_sold))
    return Hardware(gpus, "580.95.05", ram * GIB, ram * GIB, 16.0)


SMALL, MIDDLE, LARGE = ("invented", 7.0), ("NVIDIA GeForce RTX 4090", 23.6), ("NVIDIA GeForce RTX 5090", 31.8)
TWENTY, HUGE = ("NVIDIA GeForce RTX 3080", 19.7), ("NVIDIA H200", 139.8)
CPU_ONLY = machine(ram=4)


def plan_for(hardware: Hardware, shape: ModelShape, disk: int | None = None, **environment: str) -> Plan | Refusal:
    loaded: Settings = settings.load(environment)
    profile = inputs.select_profile(loaded, hardware)
    return make_plan(PlanInputs(PlanSettings.of(loaded), hardware, profile, shape, disk))


def planned(hardware: Hardware, shape: ModelShape, **environment: str) -> Plan:
    plan = plan_for(hardware, shape, **environment)
    assert isinstance(plan, Plan), plan
    return plan


def refused(hardware: Hardware, shape: ModelShape, disk: int | None = None, **environment: str) -> Refusal:
    refusal = plan_for(hardware, shape, disk, **environment)
    assert isinstance(refusal, Refusal)
    return refusal


def reason(plan: Plan | Refusal, option: str) -> tuple[object, str, str]:
    """(value, source, code) of an option's one reason."""
    each = reason_of(plan, option)
    return each.value, each.source, each.code


def reason_of(plan: Plan | Refusal, option: str) -> Reason:
    """The one reason of an option."""
    reasons = [each for each in plan.reasons if each.option == option]
    assert len(reasons) == 1, option
    return reasons[0]


_LIMITS = {each.name for each in fields(Limits)}
SMALL_LOAD = ServingConfig(140 * GIB, Limits(max_model_len=512, max_num_seqs=8, max_num_batched_tokens=512), eager=True)
"""A small load on a GPU of 140 GiB."""


def configured(base: ServingConfig = SMALL_LOAD, **changes: Any) -> ServingConfig:
    """A configuration with changes: its fields, its limits, or `tensor`, `pipeline`, `draft`, `draft_tokens`."""
    limits = {name: value for name, value in changes.items() if name in _LIMITS}
    parallelism = {name: value for name, value in changes.items() if name in ("tensor", "pipeline")}
    speculation = {name: value for name, value in changes.items() if name in ("draft", "draft_tokens")}
    rest = {name: value for name, value in changes.items() if name not in {*limits, *parallelism, *speculation}}
    return replace(base, limits=replace(base.limits, **limits), parallelism=replace(base.parallelism, **parallelism),
                   speculation=replace(base.speculation, **speculation), **rest)
