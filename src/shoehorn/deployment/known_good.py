"""Last known-good vLLM options after a step-down, stored in the volume for one machine, model and settings.

Rules: the file name is a hash of everything that a start depends on, so that any change invalidates it; an unreadable
file is ignored; neither the hash nor the file contains a secret.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from shoehorn import __version__
from shoehorn.common.atomic_file import write_atomic
from shoehorn.config.models_dir import ModelsDir
from shoehorn.config.profiles import AUTO, Profile
from shoehorn.config.settings import Settings
from shoehorn.hardware.types import Hardware
from shoehorn.model.shape import ModelShape

log = logging.getLogger("engine")

_SETTINGS = ("model_id", "model_revision", "vram_profile", "vram_limit", "quantization", "max_model_len",
             "max_num_seqs", "speculative", "vllm_extra_args")


_AUTO_DESCRIPTION = "the best that this machine can do with this model"


def _first_form(profile: Profile) -> dict[str, object]:
    """Return a profile's fields as the first version hashed them, so that no known options are lost.

    The description of `auto` had another wording; `is_engine_config` came later, and counts where it is true.
    """
    facts = asdict(profile) | ({"description": _AUTO_DESCRIPTION} if profile.name == AUTO else {})
    return {name: value for name, value in facts.items() if name != "is_engine_config" or value}


def location(settings: Settings, hardware: Hardware, profile: Profile, shape: ModelShape) -> Path:
    """Return the file of the known-good options of a start."""
    facts = {
        "version": __version__, "driver": hardware.driver_version, "host_memory": hardware.host_memory_bytes,
        "gpus": [(gpu.name, gpu.total_bytes) for gpu in hardware.gpus],
        "settings": {name: getattr(settings, name) for name in _SETTINGS},
        "profile": _first_form(profile),
        "model": (shape.architecture, shape.weights_bytes, shape.disk_bytes)}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]
    return ModelsDir(settings.models_dir).known_good / f"{digest}.json"


def read(path: Path) -> Mapping[str, object]:
    """Return the known-good options; empty without a valid file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        options = document["options"]
        if not isinstance(options, dict):
            raise TypeError("options: not an object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("Ignoring unreadable known-good options path=%s error=%s", path, error)
        return {}
    return options


def write(path: Path, options: Mapping[str, object], steps: str) -> None:
    """Save the options of a start that succeeded after the given steps. A write failure is only logged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"options": dict(options), "steps": steps}, indent=1) + "\n")
    except OSError as error:
        log.warning("Cannot save known-good options path=%s error=%s", path, error)
