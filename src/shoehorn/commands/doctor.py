"""`shoehorn doctor`: checks of everything that serving needs; a failed check has a remedy."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec

from shoehorn.common import disk
from shoehorn.common.errors import EXIT_BAD_SETTINGS, EXIT_DONE, SettingsError, ShoehornError
from shoehorn.common.units import format_size
from shoehorn.config import settings as settings_module
from shoehorn.config.settings import Settings
from shoehorn.deployment import inputs, served_model
from shoehorn.hardware import container_limits, detect, requirements
from shoehorn.hardware.types import Hardware
from shoehorn.store.model_check import check_model
from shoehorn.store.reference import model_reference


@dataclass(frozen=True)
class Check:
    """One check. `remedy` is empty if it passed or has no remedy."""

    name: str
    passed: bool
    found: str  # language: quoted, a key of --json
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print a list of {name, passed, found, remedy}")


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Print every check; return 0 if all passed, otherwise 2."""
    try:
        visible = inputs.gpu_environment(settings_module.load(environment), environment)
    except SettingsError:  # a check reports it
        visible = dict(environment)
    checks = examine(environment, requirements.usable(detect.detect(environment=visible)))
    if arguments.json:
        print(json.dumps([asdict(check) for check in checks], indent=1, ensure_ascii=False))
    else:
        for check in checks:
            print(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.found}")
            if check.remedy:
                print(f"     -> {check.remedy}")
    return EXIT_DONE if all(check.passed for check in checks) else EXIT_BAD_SETTINGS


def examine(environment: Mapping[str, str], machine: Hardware) -> list[Check]:
    """Run all checks, in the order of a start."""
    try:
        settings = settings_module.load(environment)
    except SettingsError as error:
        return [Check("settings", False, error.cause, error.remedy)]
    return [Check("settings", True, f"{len(settings.given)} set"), _gpus(settings, machine),
            Check("memory", True, f"{format_size(machine.host_memory_bytes)} usable, {machine.cpus:g} CPUs"),
            _volume(settings), _model(settings), _shared_memory(), _locked_memory(machine),
            _program("nginx", "install it, or put /usr/sbin on PATH"), _engine()]


def _gpus(settings: Settings, machine: Hardware) -> Check:
    try:
        requirements.check_kind(machine)
    except ShoehornError as error:
        return Check("gpu", False, error.cause, error.remedy)
    if machine.gpus:
        gpus = "; ".join(f"{gpu.index}: {gpu.name}, {format_size(gpu.total_bytes)}, {format_size(gpu.free_bytes)} free"
                          for gpu in machine.gpus)
        return Check("gpu", True, "; ".join((gpus, f"driver {machine.driver_version}", *machine.gpu_remarks)))
    return Check("gpu", settings.vram_profile == "cpu", "; ".join(("none", *machine.gpu_remarks, *machine.notes)),
                 "" if settings.vram_profile == "cpu" else
                 "start the container with a GPU (docker run --gpus all), or set VRAM_PROFILE=cpu")


def _volume(settings: Settings) -> Check:
    directory = settings.models_dir
    if not directory.is_dir():
        return Check("volume", False, f"{directory} not found", f"mount a volume at {directory}, or set MODELS_DIR")
    if not os.access(directory, os.W_OK):
        return Check("volume", False, f"{directory}: permission denied for user {os.geteuid()}",
                     f"on the host: sudo chown -R {os.geteuid()} THE_MOUNTED_FOLDER")
    return Check("volume", True, f"{directory}, {format_size(disk.disk_free(directory))} free")


def _model(settings: Settings) -> Check:
    """Check that the model is available, and that the engine can build it."""
    try:
        check_model(served_model.model_files(settings, model_reference(settings)), settings)
    except ShoehornError as error:
        return Check("model", False, error.cause, error.remedy)
    return Check("model", True, settings.model_id)


def _shared_memory() -> Check:
    free = container_limits.free_shared_memory()
    enough = free >= container_limits.SHARED_MEMORY_BYTES
    return Check("shared memory", enough, f"{format_size(free)} free in /dev/shm",
                 "" if enough else container_limits.SHARED_MEMORY_REMEDY)


def _locked_memory(machine: Hardware) -> Check:
    limit = container_limits.locked_memory_limit()
    unlimited = limit is None or not machine.gpus
    return Check("locked memory", unlimited, "unlimited" if limit is None else f"at most {format_size(limit)}",
                 "" if unlimited else container_limits.MEMLOCK_REMEDY)


def _program(name: str, remedy: str) -> Check:
    path = shutil.which(name)
    return Check(name, bool(path), path or "not found on PATH", "" if path else remedy)


def _engine() -> Check:
    installed = find_spec("vllm") is not None
    return Check("vllm", installed, "installed" if installed else "not installed", "" if installed else "make setup")
