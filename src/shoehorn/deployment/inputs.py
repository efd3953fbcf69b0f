"""Inputs of a plan, gathered from settings, machine, profile, model and disk."""

from __future__ import annotations

from pathlib import Path

from shoehorn.common.paths import PROFILES
from shoehorn.config.models_dir import ModelsDir
from shoehorn.config.profiles import AUTO, Profile, automatic, load
from shoehorn.config.settings import Settings
from shoehorn.deployment import auto_quantization
from shoehorn.hardware import bandwidth_probe, detect
from shoehorn.hardware.requirements import require_gpus
from shoehorn.hardware.types import Hardware


def resolve_quantization(settings: Settings) -> Settings:
    """The settings with `auto` decided, on this machine.

    Raises:
        ShoehornError: the machine or the model cannot be used.
    """
    machine = bandwidth_probe.with_measured_bandwidths(detect.detect(), ModelsDir(settings.models_dir).bandwidths)
    return auto_quantization.resolve_quantization(settings, machine, select(settings, machine))


def select(settings: Settings, hardware: Hardware, directory: Path = PROFILES) -> Profile:
    """The profile that VRAM_PROFILE means; `auto` decides nothing beforehand.

    Raises:
        SettingsError: there is no GPU for `auto`, or as `load` does.
    """
    if settings.vram_profile != AUTO:
        return load(settings.vram_profile, directory)
    require_gpus(hardware, AUTO)
    return automatic()
