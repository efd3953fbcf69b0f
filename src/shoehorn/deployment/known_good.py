"""What worked after stepping down, kept in the volume for this machine, model and settings, and used at once next time.

Rules: the file is named by a hash of everything that the outcome depends on, so that a change of any of it forgets; a
file that cannot be read counts as none; nothing secret goes into the hash or the file.
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
from shoehorn.config.profiles import Profile
from shoehorn.config.settings import Settings
from shoehorn.hardware.types import Hardware
from shoehorn.model.shape import ModelShape

log = logging.getLogger("engine")

_SETTINGS = ("model_id", "model_revision", "vram_profile", "vram_limit", "quantization", "max_model_len",
             "max_num_seqs", "speculative", "vllm_extra_args")


def location(settings: Settings, hardware: Hardware, profile: Profile, shape: ModelShape) -> Path:
    """Where the memory of this start lies."""
    facts = {
        "version": __version__, "driver": hardware.driver_version, "host_memory": hardware.host_memory_bytes,
        "gpus": [(gpu.name, gpu.total_bytes) for gpu in hardware.gpus],
        "settings": {name: getattr(settings, name) for name in _SETTINGS},
        "profile": asdict(profile), "model": (shape.architecture, shape.weights_bytes, shape.disk_bytes)}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]
    return ModelsDir(settings.models_dir).known_good / f"{digest}.json"


def recall(path: Path) -> Mapping[str, object]:
    """The options that worked; none when nothing is known."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        options = document["options"]
        if not isinstance(options, dict):
            raise TypeError("options is no object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s cannot be used (%s)", path, error)
        return {}
    return options


def remember(path: Path, options: Mapping[str, object], text: str) -> None:
    """Keep what worked. A volume that cannot be written is logged: the server runs all the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"options": dict(options), "steps": text}, indent=1) + "\n")
    except OSError as error:
        log.warning("what worked cannot be remembered in %s: %s", path, error)
