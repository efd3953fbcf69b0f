"""`shoehorn plan`: what would be started on this machine or on another, from the model's config and headers alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

from shoehorn.commands.target import add_target, machine_of, settings_of, shape_of
from shoehorn.common import disk
from shoehorn.common.errors import EXIT_DOES_NOT_FIT, EXIT_DONE
from shoehorn.common.units import format_size
from shoehorn.config import settings as settings_module
from shoehorn.config.setting_values import SPECULATIVE_KEYWORDS
from shoehorn.config.settings import Settings
from shoehorn.deployment import inputs
from shoehorn.hardware import detect
from shoehorn.planner.build import make_plan
from shoehorn.planner.inputs import Draft, PlanInputs, PlanSettings
from shoehorn.planner.memory.breakdown import VramParts
from shoehorn.planner.plan import Plan, Refusal

_PARTS = (("weights", "weights_bytes"), ("quantization state", "quant_state_bytes"),
          ("embeddings", "embeddings_bytes"), ("offload buffers", "offload_buffer_bytes"),
          ("activations", "activations_bytes"), ("CUDA graphs", "cuda_graphs_bytes"),
          ("framework", "framework_bytes"), ("KV cache", "kv_cache_bytes"), ("together", "total_bytes"),
          ("limit", "limit_bytes"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the machine, and settings that stand in for environment variables."""
    add_target(parser)
    parser.add_argument("--profile", metavar="P", help="VRAM_PROFILE")
    parser.add_argument("--json", action="store_true", help="print the plan or the refusal as JSON")


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Print a plan, exit code 0, or a refusal, exit code 3."""
    settings = settings_module.load(settings_of(arguments, environment))
    machine = machine_of(arguments, detect.detect())
    profile = inputs.select(settings, machine)
    free = None
    if not arguments.gpu and settings.model_source != "local" and settings.models_dir.is_dir():
        free = disk.disk_free(settings.models_dir) + disk.disk_used(settings.models_dir / settings.model_id)
    if machine.gpus:
        from shoehorn.deployment import auto_quantization  # slow to import, as below

        settings = auto_quantization.resolve_quantization(settings, machine, profile, disk=not arguments.gpu)
    shape = shape_of(settings)

    def made(draft: Draft | None) -> Plan | Refusal:
        return make_plan(PlanInputs(PlanSettings.of(settings), machine, profile, shape, free, draft=draft))

    if settings.speculative in SPECULATIVE_KEYWORDS:
        plan = made(None)
    else:
        from shoehorn.deployment import draft_model  # slow to import, as below

        beside = disk.disk_free(settings.models_dir) if free is None else free - shape.disk_bytes
        plan = draft_model.considered(settings, shape, None if arguments.gpu else beside, made)
    if arguments.json:
        print(json.dumps(plan.to_json(), indent=1, ensure_ascii=False))
    else:
        print("\n".join(_text(plan, settings)))
    return EXIT_DONE if isinstance(plan, Plan) else EXIT_DOES_NOT_FIT


def _text(plan: Plan | Refusal, settings: Settings) -> list[str]:
    """The plan for people, line by line."""
    lines = [f"{settings.model_id} with profile {plan.profile}", ""]
    if plan.vram:
        lines += [*_table(plan.vram[0], len(plan.vram)), ""]
    if isinstance(plan, Plan):
        rates = [f"{plan.expected_tokens_per_second[key]} tokens/s for {users}"
                 for key, users in (("batch_1", "one request"), ("batch_8", "eight together"))
                 if plan.expected_tokens_per_second[key] is not None]
        lines += [f"fits: {plan.kv_cache_tokens} tokens of context for all requests together"
                  + (f"; about {', '.join(rates)}" if rates else ""),
                  f"host memory {format_size(plan.host_bytes)}, of it pinned {format_size(plan.host_pinned_bytes)}; "
                  f"disk {format_size(plan.disk_bytes)}"]
    else:
        lines += [f"does not fit: {plan.cause}", *(f"  -> {remedy}" for remedy in plan.remedies)]
    width = max((len(reason.option) for reason in plan.reasons), default=0)
    return [*lines, "", *(f"{reason.option:{width}}  {_shown(reason.value):>12}  {reason.source}: {reason.text}"
                          for reason in plan.reasons)]


def _table(parts: VramParts, gpus: int) -> list[str]:
    sizes = parts.to_json()
    rows = [f"  {name:20}{format_size(sizes[key]):>12}" for name, key in _PARTS]
    return [f"memory of each of {gpus} GPUs" if gpus > 1 else "memory of the GPU", *rows]


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else json.dumps(value) if isinstance(value, dict) else str(value)
