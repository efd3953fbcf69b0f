"""vLLM's own `config.yaml`, also one written for an older vLLM, as a profile: VRAM_PROFILE=/config.yaml.

Rules: an option that is gone is dropped or translated, each with a note; one that the appliance fixes is dropped, with
the setting to use; an unknown one is refused by name. Names may have dashes or underscores.

Source: vLLM's release notes from 0.8 to 0.32, and the parsers of 0.8.5 and 0.32.0.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from typing import Any

from shoehorn.config import vllm_options


def _capture_size(value: object, engine: dict[str, object]) -> str:
    """max-seq-len-to-capture counted tokens of a sequence; graphs are captured by tokens of a batch now."""
    if value == 0:
        engine["enforce-eager"] = True
        return "0 meant no CUDA graphs: enforce-eager"
    return "graphs are captured by batch size, not by length; left out (max-cudagraph-capture-size sets that)"


def _ray(value: object, engine: dict[str, object]) -> str:
    if value:
        engine["distributed-executor-backend"] = "ray"
        return "distributed-executor-backend: ray"
    return "left out"


def _rope(name: str) -> Callable[[object, dict[str, object]], str]:
    key = {"rope-scaling": "rope_scaling", "rope-theta": "rope_theta"}[name]

    def translate(value: object, engine: dict[str, object]) -> str:
        loaded = json.loads(value) if isinstance(value, str) and value.lstrip().startswith("{") else value
        overrides = engine.setdefault("hf-overrides", {})
        if isinstance(overrides, dict):
            overrides[key] = loaded
        return f"hf-overrides: {key}"

    return translate


def _runner(value: object, engine: dict[str, object]) -> str:
    if value in ("embedding", "embed", "classify", "score", "reward"):
        engine["runner"] = "pooling"
        return "runner: pooling"
    return "left out: the model decides"


def _structured(value: object, engine: dict[str, object]) -> str:
    engine["structured-outputs-config"] = {"backend": str(value).split(":")[0]}
    return "structured-outputs-config"


def _speculative(value: object, engine: dict[str, object]) -> str:
    config = engine.setdefault("speculative-config", {})
    if isinstance(config, dict):
        if value in ("[ngram]", "ngram"):
            config["method"] = "ngram"
        else:
            config["model"] = value
    return "speculative-config"


def _speculative_tokens(value: object, engine: dict[str, object]) -> str:
    config = engine.setdefault("speculative-config", {})
    if isinstance(config, dict):
        config["num_speculative_tokens"] = value
    return "speculative-config"


_TRANSLATED: Mapping[str, Callable[[object, dict[str, object]], str]] = {
    "max-seq-len-to-capture": _capture_size, "max-context-len-to-capture": _capture_size, "worker-use-ray": _ray,
    "engine-use-ray": _ray, "rope-scaling": _rope("rope-scaling"), "rope-theta": _rope("rope-theta"),
    "task": _runner, "guided-decoding-backend": _structured, "speculative-model": _speculative,
    "num-speculative-tokens": _speculative_tokens}


def is_engine_config(document: Mapping[Any, Any]) -> bool:
    """Whether a YAML mapping is vLLM's own rather than a profile: no key of a profile, and one of an option's form."""
    names = {str(key).replace("_", "-") for key in document}
    return not names & {"match", "engine", "environment", "description"} and bool(
        names & (vllm_options.recorded().keys() | _TRANSLATED.keys() | vllm_options.REMOVED.keys()))


def translate(document: Mapping[Any, Any]) -> tuple[dict[str, object], list[str], list[str]]:
    """(options for a profile, notes, mistakes), each note and mistake one sentence about one key."""
    engine: dict[str, object] = {}
    notes: list[str] = []
    mistakes: list[str] = []
    for key, value in document.items():
        name = str(key).replace("_", "-")
        if name in vllm_options.OWNED:
            setting = vllm_options.OWNED[name]
            notes.append(f"{key} is left out: " + (f"set {setting}" if setting else "Shoehorn fixes it"))
        elif name in _TRANSLATED:
            notes.append(f"{key} is gone: {_TRANSLATED[name](value, engine)}")
        elif name in vllm_options.REMOVED:
            notes.append(f"{key} is gone and left out: {vllm_options.REMOVED[name]}")
        elif name not in vllm_options.recorded():
            near = difflib.get_close_matches(name, vllm_options.recorded(), 1)
            mistakes.append(f"{key} is no option of the engine" + (f"; did you mean {near[0]}?" if near else ""))
        elif value is False and vllm_options.recorded()[name].takes == "switch" \
                and not vllm_options.recorded()[name].negatable:
            continue  # switched off is how it is anyway
        elif name == "block-size" and value not in (16, 32, 64, 128, 256):
            notes.append(f"block_size {value} is none that the engine has any more: left out")
        else:
            engine[name] = value
    return engine, notes, mistakes
