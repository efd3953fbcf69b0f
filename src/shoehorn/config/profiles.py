"""Profiles: one YAML file a class of machine -> `Profile`, by name or by path; or `auto`, which leaves all to the plan.

Rules:
- a profile is data only: `name`, `description`, `match` (what machine it is for), `engine` (vLLM's own options) and
  `environment` (the engine's variables); any other key is refused by name, and so is an option that vLLM lacks;
- `cpu-offload-gb` and `max-model-len` are upper bounds: the plan takes less where the model needs or allows less;
- what a profile leaves open, the plan fills in for the machine and the model;
- a profile for the CPU is never used unasked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shoehorn.common.errors import SettingsError
from shoehorn.common.paths import PROFILES
from shoehorn.common.units import parse_size
from shoehorn.config import vllm_options, vllm_yaml

AUTO = "auto"

_KEYS = {"name", "description", "match", "engine", "environment"}

@dataclass(frozen=True)
class Match:
    """The machine that a profile is for: `device` is `cuda` or `cpu`; `vram_bytes` is that of each GPU, 0 where the
    file says nothing (then it is used when named, never chosen)."""

    device: str
    gpus: int
    vram_bytes: int


@dataclass(frozen=True)
class Profile:
    """A profile; `engine` maps vLLM's option names, without dashes in front, to their values.

    `notes` say what was dropped or translated of a file for an older engine.
    """

    name: str
    description: str
    match: Match
    engine: Mapping[str, object]
    environment: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def is_auto(self) -> bool:
        """Whether everything is left to the plan."""
        return self.name == AUTO


def names(directory: Path = PROFILES) -> tuple[str, ...]:
    """The names of the profiles in a folder."""
    return tuple(sorted(path.stem for path in directory.glob("*.yaml")))


def load(name_or_path: str, directory: Path = PROFILES) -> Profile:
    """Read a profile.

    Raises:
        SettingsError: there is no such profile, or it holds mistakes; names every one.
    """
    is_path = "/" in name_or_path or name_or_path.endswith((".yaml", ".yml"))
    if not is_path and name_or_path not in names(directory):
        raise SettingsError(f"VRAM_PROFILE={name_or_path} is no profile.",
                            f"Use one of {', '.join(names(directory))}, auto, or the path of a file.")
    path = Path(name_or_path) if is_path else directory / f"{name_or_path}.yaml"
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"The profile {path} cannot be read: {error}", "Correct VRAM_PROFILE.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"The profile {path} is no YAML: {error}", "Correct the file.") from error
    return parse(document, str(path), path.stem)


def parse(document: object, where: str, name: str) -> Profile:
    """A profile of its YAML document; `where` names it in errors, `name` is used when it has none.

    Raises:
        SettingsError: with every mistake, one a line.
    """
    mistakes: list[str] = []
    sections: dict[str, Any] = document if isinstance(document, dict) else {}
    if not isinstance(document, dict):
        mistakes.append(f"holds no mapping; it needs {', '.join(sorted(_KEYS))}")
    notes: list[str] = []
    if vllm_yaml.is_engine_config(sections):
        translated, notes, mistakes = vllm_yaml.translate(sections)
        sections = {"description": "vLLM's own configuration", "engine": translated}
    mistakes += [f"has the unknown key {key!r}; known are {', '.join(sorted(_KEYS))}"
                 for key in sections if key not in _KEYS]
    for key in ("match", "engine", "environment"):
        if not isinstance(sections.get(key) or {}, dict):
            mistakes.append(f"{key} is not a mapping")
    if mistakes:
        raise _refused(where, mistakes)
    engine: dict[str, object] = {}
    for option, value in (sections.get("engine") or {}).items():
        try:
            engine[str(option)] = vllm_options.check(str(option), value)
        except ValueError as error:
            mistakes.append(f"engine: {error}")
    environment: dict[str, str] = {}
    for variable, value in (sections.get("environment") or {}).items():
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", str(variable)) or type(value) not in (str, int):
            mistakes.append(f"environment: {variable!r} is not a variable with a text or whole number as value")
        environment[str(variable)] = str(value)
    try:
        match = _match(sections.get("match") or {})
    except ValueError as error:
        mistakes.append(f"match: {error}")
    if mistakes:
        raise _refused(where, mistakes)
    return Profile(str(sections.get("name", name)), str(sections.get("description", "")).strip(), match, engine,
                   environment, tuple(notes))


def automatic() -> Profile:
    """The profile that leaves everything to the plan."""
    return Profile(AUTO, "the best that this machine can do with this model", Match("cuda", 1, 0), {}, {})


def _match(section: Mapping[str, Any]) -> Match:
    """What a profile is for. Raises ValueError."""
    if not section:
        return Match("cuda", 1, 0)
    unknown = set(section) - {"device", "gpus", "vram"}
    if unknown:
        raise ValueError(f"{', '.join(sorted(map(str, unknown)))} is unknown; known are device, gpus, vram")
    device, gpus, vram = section.get("device", "cuda"), section.get("gpus", 1), section.get("vram")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device {device!r} is neither cuda nor cpu")
    if device == "cpu":
        if "gpus" in section or "vram" in section:
            raise ValueError("a profile for the CPU has neither gpus nor vram")
        return Match("cpu", 0, 0)
    if type(gpus) is not int or gpus < 1:
        raise ValueError(f"gpus {gpus!r} is not a whole number from 1 on")
    if vram is None:
        raise ValueError("vram is missing; write what each GPU has, like 24GB")
    return Match("cuda", gpus, parse_size(str(vram)))


def _refused(where: str, mistakes: list[str]) -> SettingsError:
    return SettingsError("\n".join(f"The profile {where}: {mistake}." for mistake in mistakes),
                         "Correct the file and start again.")
