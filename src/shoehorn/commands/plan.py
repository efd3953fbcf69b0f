"""`shoehorn plan`: what would be started on this machine or on another, from the model's config and headers alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from shoehorn import checkpoint, hardware, profiles, speed
from shoehorn import settings as settings_module
from shoehorn.checkpoint import ModelShape
from shoehorn.errors import EXIT_DOES_NOT_FIT, EXIT_DONE, SettingsError
from shoehorn.hardware import Gpu, Hardware
from shoehorn.plan import Plan, Refusal, make_plan
from shoehorn.settings import Settings
from shoehorn.speculation import Draft
from shoehorn.tensor_files import LocalFiles
from shoehorn.units import GIB, format_size, parse_size
from shoehorn.vram_parts import VramParts

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


def add_target(parser: argparse.ArgumentParser) -> None:
    """What to plan for: model, machine, settings."""
    parser.add_argument("--model", metavar="DIR_OR_ID", help="a folder, or OWNER/NAME on the hub (MODEL_ID)")
    parser.add_argument("--gpu", metavar="SIZE[:NAME]", action="append", default=[],
                        help="plan for this card instead of the machine's own, like 24GB:RTX4090; once for each card. "
                             "GB as cards are sold, of which programs get a little less; GiB as they get them")
    parser.add_argument("--ram", metavar="SIZE", help="plan for this much host memory, like 64GiB")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[],
                        help="a setting as in the environment, like MAX_MODEL_LEN=4096")


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Print a plan, exit code 0, or a refusal, exit code 3."""
    settings = settings_module.load(settings_of(arguments, environment))
    machine = machine_of(arguments, hardware.detect())
    profile = profiles.select(settings, machine)
    free = None
    if not arguments.gpu and settings.model_source != "local" and settings.models_dir.is_dir():
        free = hardware.disk_free(settings.models_dir) + hardware.disk_used(settings.models_dir / settings.model_id)
    if machine.gpus:
        from shoehorn import quantization  # slow to import, as below

        settings = quantization.settled(settings, machine, profile, disk=not arguments.gpu)
    shape = shape_of(settings)

    def made(draft: Draft | None) -> Plan | Refusal:
        return make_plan(settings, machine, profile, shape, free, draft=draft)

    if settings.speculative in settings_module.GUESSES:
        plan = made(None)
    else:
        from shoehorn import drafts  # slow to import, as below

        beside = hardware.disk_free(settings.models_dir) if free is None else free - shape.disk_bytes
        plan = drafts.considered(settings, shape, None if arguments.gpu else beside, made)
    if arguments.json:
        print(json.dumps(plan.to_json(), indent=1, ensure_ascii=False))
    else:
        print("\n".join(_text(plan, settings)))
    return EXIT_DONE if isinstance(plan, Plan) else EXIT_DOES_NOT_FIT


def settings_of(arguments: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, str]:
    """The settings: the environment's, with what the command line says in their place."""
    result = dict(environment)
    for word in arguments.set:
        name, equals, value = word.partition("=")
        if not equals or name not in {setting.name for setting in settings_module.TABLE}:
            raise SettingsError(f"--set {word}: {name} is no setting.",
                                "Write --set KEY=VALUE; docs/configuration.md lists the settings.")
        result[name] = value
    if arguments.model:
        path = Path(arguments.model)
        local = path.is_dir() or arguments.model.startswith(("/", "./", "../"))
        result["MODEL_ID"] = str(path.absolute()) if local else arguments.model
        if local:
            result["MODEL_SOURCE"] = "local"
        elif result.get("MODEL_SOURCE") == "local":
            del result["MODEL_SOURCE"]
    if getattr(arguments, "profile", None):
        result["VRAM_PROFILE"] = arguments.profile
    return result


def machine_of(arguments: argparse.Namespace, here: Hardware) -> Hardware:
    """This machine, or the one described; host memory that is not described is unknown there (0)."""
    gpus, memory, notes = here.gpus, here.host_memory_bytes, here.notes
    if arguments.gpu:
        gpus, memory, notes = tuple(_gpu(index, word) for index, word in enumerate(arguments.gpu)), 0, ()
    available = here.host_available_bytes
    if arguments.ram:
        memory = available = _size("--ram", arguments.ram)
    return Hardware(gpus, here.driver_version, memory, available, here.cpus, notes, here.amx)


def _gpu(index: int, word: str) -> Gpu:
    size, _, name = word.partition(":")
    total = _size("--gpu", size)
    if size.strip().lower().endswith("gb"):
        total = hardware.total_of_sold(total / 10**9, name)
    if total < GIB:
        raise SettingsError(f"--gpu {word}: a card of {format_size(total)} is none.",
                            "Give the size with its unit, as --gpu 24GB:RTX4090.")
    generation, width = speed.usual_link(name)
    return Gpu(index, "", name, total, total, (0, 0), generation, width, False)


def _size(option: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise SettingsError(f"{option}: {error}") from error


def shape_of(settings: Settings) -> ModelShape:
    """The model that the settings name, as it will be served."""
    if settings.model_source == "local" and settings.quantization != "int4":
        return checkpoint.read(LocalFiles(Path(settings.model_id)))
    from shoehorn import converted  # the hub's client is slow to import, and not needed for a folder

    return converted.shape(settings, converted.served(settings))


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
