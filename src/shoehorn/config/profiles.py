"""Profiles: one YAML file for each class of machine -> `Profile`, by name or path; or `auto`, which sets nothing.

Rules:
- a profile contains data only: `name`, `description`, `match` (class of machine), `engine` (vLLM options) and
  `environment` (the engine's variables); any other key and any unknown vLLM option is an error that names it;
- `cpu-offload-gb` and `max-model-len` are upper bounds: the plan uses less if the model needs or allows less;
- in vLLM's own config.yaml, `max-model-len` is meant as it stands, as on vLLM's command line;
- the plan chooses every option that a profile does not set;
- `auto` never selects a profile for the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shoehorn.common.errors import SettingsError
from shoehorn.common.paths import PROFILES
from shoehorn.common.units import parse_memory
from shoehorn.config import vllm_options, vllm_yaml

AUTO = "auto"

_KEYS = {"name", "description", "match", "engine", "environment"}


@dataclass(frozen=True)
class Match:
    """Class of machine that a profile serves.

    Attributes:
        device: `cuda` or `cpu`.
        vram_bytes: memory of each GPU; 0 if the file does not state it.
    """

    device: str
    gpus: int
    vram_bytes: int


@dataclass(frozen=True)
class Profile:
    """A profile.

    Attributes:
        engine: values by vLLM option name, without leading dashes.
        notes: options of an older vLLM that were dropped or translated.
        is_engine_config: the file is vLLM's own config.yaml.
    """

    name: str
    description: str
    match: Match
    engine: Mapping[str, object]
    environment: Mapping[str, str]
    notes: tuple[str, ...] = ()
    is_engine_config: bool = False

    @property
    def is_auto(self) -> bool:
        """True if the plan chooses every option."""
        return self.name == AUTO


def names(directory: Path = PROFILES) -> tuple[str, ...]:
    """Return the names of the profiles in a folder."""
    return tuple(sorted(path.stem for path in directory.glob("*.yaml")))


def load(name_or_path: str, directory: Path = PROFILES) -> Profile:
    """Read a profile.

    Raises:
        SettingsError: unknown or invalid profile; lists every mistake.
    """
    is_path = "/" in name_or_path or name_or_path.endswith((".yaml", ".yml"))
    if not is_path and name_or_path not in names(directory):
        raise SettingsError(f"VRAM_PROFILE={name_or_path}: unknown profile.",
                            f"Use one of {', '.join(names(directory))}, auto, or the path of a file.",
                            code="unknown_profile")
    path = Path(name_or_path) if is_path else directory / f"{name_or_path}.yaml"
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"Profile {path}: cannot be read: {error}.", "Correct VRAM_PROFILE.",
                            code="unreadable_profile") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"Profile {path}: invalid YAML: {error}.", "Correct the file.",
                            code="invalid_profile") from error
    return parse(document, str(path), path.stem)


def parse(document: object, where: str, name: str) -> Profile:
    """Parse a YAML document.

    Args:
        where: path for errors.
        name: of the profile if the document does not contain one.

    Raises:
        SettingsError: with every mistake, one a line.
    """
    mistakes: list[str] = []
    sections: dict[str, Any] = document if isinstance(document, dict) else {}
    if not isinstance(document, dict):
        mistakes.append(f"not a mapping; expected keys: {', '.join(sorted(_KEYS))}")
    notes: list[str] = []
    is_engine_config = vllm_yaml.is_engine_config(sections)
    if is_engine_config:
        translated, notes, mistakes = vllm_yaml.translate(sections)
        sections = {"description": "vLLM configuration file", "engine": translated}
    mistakes += [f"unknown key {key!r}; known keys: {', '.join(sorted(_KEYS))}"
                 for key in sections if key not in _KEYS]
    for key in ("match", "engine", "environment"):
        if not isinstance(sections.get(key) or {}, dict):
            mistakes.append(f"{key}: not a mapping")
    if mistakes:
        raise _invalid(where, mistakes)
    engine: dict[str, object] = {}
    for option, value in (sections.get("engine") or {}).items():
        try:
            engine[str(option)] = vllm_options.check(str(option), value)
        except ValueError as error:
            mistakes.append(f"engine: {error}")
    environment: dict[str, str] = {}
    for variable, value in (sections.get("environment") or {}).items():
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", str(variable)) or type(value) not in (str, int):
            mistakes.append(f"environment: {variable!r} must be an uppercase name with a string or integer value")
        environment[str(variable)] = str(value)
    try:
        match = _match(sections.get("match") or {})
    except ValueError as error:
        mistakes.append(f"match: {error}")
    if mistakes:
        raise _invalid(where, mistakes)
    return Profile(str(sections.get("name", name)), str(sections.get("description", "")).strip(), match, engine,
                   environment, tuple(notes), is_engine_config)


def automatic() -> Profile:
    """Return the profile that sets nothing."""
    return Profile(AUTO, "the best that this machine can do with this model", Match("cuda", 1, 0), {}, {})


def user_options(vram_profile: str, extra_args: Sequence[str]) -> dict[str, object]:
    """Return vLLM's options of the named profile and of VLLM_EXTRA_ARGS, which win.

    Raises:
        SettingsError: an invalid profile or argument.
    """
    profile = automatic() if vram_profile == AUTO else load(vram_profile)
    return {**profile.engine, **vllm_options.parse_arguments(extra_args)}


def _match(section: Mapping[str, Any]) -> Match:
    """Parse the section `match`. Raises ValueError."""
    if not section:
        return Match("cuda", 1, 0)
    unknown = set(section) - {"device", "gpus", "vram"}
    if unknown:
        raise ValueError(f"unknown key {', '.join(sorted(map(str, unknown)))}; known keys: device, gpus, vram")
    device, gpus, vram = section.get("device", "cuda"), section.get("gpus", 1), section.get("vram")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"invalid device {device!r}; write cuda or cpu")
    if device == "cpu":
        if "gpus" in section or "vram" in section:
            raise ValueError("gpus and vram are not allowed with device cpu")
        return Match("cpu", 0, 0)
    if type(gpus) is not int or gpus < 1:
        raise ValueError(f"gpus {gpus!r} is not a positive integer")
    if vram is None:
        raise ValueError("vram is missing; write the memory of each GPU, like 24GB")
    return Match("cuda", gpus, parse_memory(str(vram)))


def _invalid(where: str, mistakes: list[str]) -> SettingsError:
    return SettingsError("\n".join(f"Profile {where}: {mistake}." for mistake in mistakes),
                         "Correct the file and restart.", code="invalid_profile")
