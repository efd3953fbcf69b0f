"""Command-line options that name a model, a machine and settings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from shoehorn.common.errors import SettingsError
from shoehorn.common.units import GIB, format_size, parse_size
from shoehorn.config import settings as settings_module
from shoehorn.config.settings import Settings
from shoehorn.hardware import gpu_specs
from shoehorn.hardware.types import Gpu, Hardware
from shoehorn.model import checkpoint
from shoehorn.model.files import LocalFiles
from shoehorn.model.shape import ModelShape


def add_target(parser: argparse.ArgumentParser) -> None:
    """What to plan for: model, machine, settings."""
    parser.add_argument("--model", metavar="DIR_OR_ID", help="a folder, or OWNER/NAME on the hub (MODEL_ID)")
    parser.add_argument("--gpu", metavar="SIZE[:NAME]", action="append", default=[],
                        help="plan for this card instead of the machine's own, like 24GB:RTX4090; once for each card. "
                             "GB as cards are sold, of which programs get a little less; GiB as they get them")
    parser.add_argument("--ram", metavar="SIZE", help="plan for this much host memory, like 64GiB")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[],
                        help="a setting as in the environment, like MAX_MODEL_LEN=4096")


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
        total = gpu_specs.usable_bytes(total / 10**9, name)
    if total < GIB:
        raise SettingsError(f"--gpu {word}: a card of {format_size(total)} is none.",
                            "Give the size with its unit, as --gpu 24GB:RTX4090.")
    generation, width = gpu_specs.typical_pcie(name)
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
    from shoehorn.deployment import served_model  # the hub's client is slow to import, and not needed for a folder

    ref = served_model.served_reference(settings)
    return served_model.served_shape(settings, ref, served_model.served_folder(settings.models_dir, ref))
