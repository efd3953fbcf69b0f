"""Command-line options that name a model, a machine and settings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from shoehorn.common.errors import SettingsError
from shoehorn.common.units import GIB, format_size, parse_memory
from shoehorn.config import settings as settings_module
from shoehorn.config import spelling
from shoehorn.config.settings import Settings
from shoehorn.deployment import inputs
from shoehorn.hardware import gpu_specs
from shoehorn.hardware.types import Gpu, Hardware


def add_target(parser: argparse.ArgumentParser) -> None:
    """Add the options of a planning target: model, machine, settings."""
    parser.add_argument("--model", metavar="DIR_OR_ID", help="a folder, or OWNER/NAME on the hub (MODEL_ID)")
    parser.add_argument("--gpu", metavar="SIZE[:NAME]", action="append", default=[],
                        help="plan for this GPU instead of the machine's own, for example 24GB:RTX4090; repeat the "
                             "option for each GPU. GB is the size as sold, of which programs get a little less; GiB is "
                             "the usable size")
    parser.add_argument("--ram", metavar="SIZE", help="plan for this much host memory, for example 64GiB")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[],
                        help="a setting as in the environment, for example MAX_MODEL_LEN=4096")


def read_settings(arguments: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with the settings of the command line."""
    result = dict(environment)
    if not is_this_machine(arguments) and environment.get("VRAM_PROFILE") == "cpu":
        del result["VRAM_PROFILE"]  # of the image for the CPU; the described GPU counts
    for word in arguments.set:
        name, equals, value = word.partition("=")
        if not equals or name not in {setting.name for setting in settings_module.TABLE}:
            similar = spelling.nearest(name, (setting.name for setting in settings_module.TABLE))
            raise SettingsError(f"--set {word}: unknown setting {name}.",
                                (f"Did you mean {similar}? " if similar else "")
                                + "Type --set KEY=VALUE; docs/configuration.md lists the settings.",
                                code="unknown_setting")
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


def is_this_machine(arguments: argparse.Namespace) -> bool:
    """Return False if `--gpu` describes another machine, whose models volume is unknown."""
    return not arguments.gpu and not getattr(arguments, "node", None)


def read_machine(arguments: argparse.Namespace, settings: Settings, environment: Mapping[str, str]) -> Hardware:
    """Return this machine or the described one, whose host memory is unknown (0) without `--ram`."""
    here = inputs.detect_machine(settings, environment, measure=False)
    return _described(here, arguments.gpu, arguments.ram) if arguments.gpu or arguments.ram else here


def read_nodes(arguments: argparse.Namespace, settings: Settings, environment: Mapping[str, str]) -> list[Hardware]:
    """Return the machines that `--node` describes, each with the host memory of `--ram`."""
    here = inputs.detect_machine(settings, environment, measure=False)
    return [_described(here, node.split(","), arguments.ram, "--node") for node in arguments.node]


def _described(here: Hardware, words: Sequence[str], ram: str | None, option: str = "--gpu") -> Hardware:
    """Return this machine with described GPUs, if there are any, and a described host memory."""
    if words:
        gpus = tuple(_gpu(index, word.strip(), option) for index, word in enumerate(words))
        here = replace(here, gpus=gpus, host_memory_bytes=0, notes=(), gpu_remarks=())
    if ram:
        memory = _size("--ram", ram)
        here = replace(here, host_memory_bytes=memory, host_available_bytes=memory)
    return here


def _gpu(index: int, word: str, option: str) -> Gpu:
    size, _, name = word.partition(":")
    total = _size(option, size)
    if size.strip().lower().endswith("gb"):
        total = gpu_specs.usable_bytes(total / 10**9, name)
    if total < GIB:
        raise SettingsError(f"{option} {word}: invalid GPU size {format_size(total)}.",
                            f"Type the size with its unit, for example {option} 24GB:RTX4090.", code="invalid_size")
    generation, width = gpu_specs.typical_pcie(name)
    return Gpu(index, "", name, total, total, (0, 0), generation, width, False, ordinal=index)


def _size(option: str, text: str) -> int:
    try:
        return parse_memory(text)
    except ValueError as error:
        raise SettingsError(f"{option}: {error}.", f"Type, for example: {option} 24GB",
                            code="invalid_size") from error
