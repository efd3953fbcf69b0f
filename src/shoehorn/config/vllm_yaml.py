"""Import of a `config.yaml` of vLLM, current or older, as a profile: VRAM_PROFILE=/config.yaml.

Rules: a removed option is dropped or translated, with a note; an option that Shoehorn sets is dropped, with a note that
names the setting; an unknown option is an error. Names may contain dashes or underscores.

Source: vLLM's release notes from 0.8 to 0.32, and the parsers of 0.8.5 and 0.32.0.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from typing import Any

from shoehorn.config import vllm_options


def _capture_size(value: object, engine: dict[str, object]) -> str:
    """Translate a limit in tokens of a sequence; current limits count tokens of a batch."""
    if value == 0:
        engine["enforce-eager"] = True
        return "replaced by enforce-eager, since 0 disabled CUDA graphs"
    return "dropped; CUDA graphs are now limited by batch size (max-cudagraph-capture-size)"


def _ray(value: object, engine: dict[str, object]) -> str:
    return "dropped; for several machines set ROLE=head and ROLE=worker" if value else "dropped"


def _rope(name: str) -> Callable[[object, dict[str, object]], str]:
    key = {"rope-scaling": "rope_scaling", "rope-theta": "rope_theta"}[name]

    def translate(value: object, engine: dict[str, object]) -> str:
        loaded = json.loads(value) if isinstance(value, str) and value.lstrip().startswith("{") else value
        overrides = engine.setdefault("hf-overrides", {})
        if isinstance(overrides, dict):
            overrides[key] = loaded
        return f"replaced by hf-overrides: {key}"

    return translate


def _runner(value: object, engine: dict[str, object]) -> str:
    if value in ("embedding", "embed", "classify", "score", "reward"):
        engine["runner"] = "pooling"
        return "replaced by runner: pooling"
    return "dropped; the model determines the runner"


def _structured(value: object, engine: dict[str, object]) -> str:
    engine["structured-outputs-config"] = {"backend": str(value).split(":")[0]}
    return "replaced by structured-outputs-config"


def _speculative(value: object, engine: dict[str, object]) -> str:
    config = engine.setdefault("speculative-config", {})
    if isinstance(config, dict):
        if value in ("[ngram]", "ngram"):
            config["method"] = "ngram"
        else:
            config["model"] = value
    return "replaced by speculative-config"


def _speculative_tokens(value: object, engine: dict[str, object]) -> str:
    config = engine.setdefault("speculative-config", {})
    if isinstance(config, dict):
        config["num_speculative_tokens"] = value
    return "replaced by speculative-config"


def _speculative_key(key: str) -> Callable[[object, dict[str, object]], str]:
    def translate(value: object, engine: dict[str, object]) -> str:
        config = engine.setdefault("speculative-config", {})
        if isinstance(config, dict):
            config[key] = value
        return f"replaced by speculative-config: {key}"

    return translate


def _pairs(value: object) -> tuple[object, str]:
    """Translate `image=2,video=1` to {"image": 2, "video": 1}."""
    words = [word.partition("=") for word in value.split(",")] if isinstance(value, str) else []
    if not words or not all(name.strip() and number.strip().isdigit() for name, _, number in words):
        return value, ""
    pairs = {name.strip(): int(number) for name, _, number in words}
    return pairs, f"written as {json.dumps(pairs)}, as vLLM now reads it"


def _compilation(value: object) -> tuple[object, str]:
    """Translate a level of compilation to the mode of the same number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"mode": value}, f"written as mode: {value}, as vLLM now reads it"
    if isinstance(value, dict) and "level" in value and "mode" not in value:
        return {("mode" if key == "level" else key): each for key, each in value.items()}, "level is now mode"
    return value, ""


def _length(value: object) -> tuple[object, str]:
    if value in ("auto", -1):
        return None, "dropped: the plan chooses the context length"
    return value, ""


_REWRITTEN: Mapping[str, Callable[[object], tuple[object, str]]] = {
    "limit-mm-per-prompt": _pairs, "compilation-config": _compilation, "max-model-len": _length}
"""Options whose values had another form: the new value (None drops the option), and a note or ""."""

_TRANSLATED: Mapping[str, Callable[[object, dict[str, object]], str]] = {
    "max-seq-len-to-capture": _capture_size, "max-context-len-to-capture": _capture_size, "worker-use-ray": _ray,
    "engine-use-ray": _ray, "rope-scaling": _rope("rope-scaling"), "rope-theta": _rope("rope-theta"),
    "task": _runner, "guided-decoding-backend": _structured, "speculative-model": _speculative,
    "num-speculative-tokens": _speculative_tokens,
    "ngram-prompt-lookup-max": _speculative_key("prompt_lookup_max"),
    "ngram-prompt-lookup-min": _speculative_key("prompt_lookup_min"),
    "speculative-max-model-len": _speculative_key("max_model_len"),
    "speculative-draft-tensor-parallel-size": _speculative_key("draft_tensor_parallel_size")}


def is_engine_config(document: Mapping[Any, Any]) -> bool:
    """Return whether a mapping is a configuration of vLLM: contains vLLM options and no key of a profile."""
    names = {str(key).replace("_", "-") for key in document}
    return not names & {"match", "engine", "environment", "description"} and bool(
        names & (vllm_options.recorded().keys() | _TRANSLATED.keys() | vllm_options.REMOVED.keys()))


def translate(document: Mapping[Any, Any]) -> tuple[dict[str, object], list[str], list[str]]:
    """Translate to (options of a profile, notes, mistakes); each note and mistake concerns one key."""
    engine: dict[str, object] = {}
    notes: list[str] = []
    mistakes: list[str] = []
    for key, value in document.items():
        name = str(key).replace("_", "-")
        if name in vllm_options.OWNED:
            setting = vllm_options.OWNED[name]
            notes.append(f"{key} dropped: " + (f"set {setting} instead" if setting else "set by Shoehorn"))
        elif name in _TRANSLATED:
            notes.append(f"{key} was removed from vLLM: {_TRANSLATED[name](value, engine)}")
        elif name in vllm_options.REMOVED:
            notes.append(f"{key} was removed from vLLM, dropped: {vllm_options.REMOVED[name]}")
        elif name in _REWRITTEN:
            new, note = _REWRITTEN[name](value)
            if note:
                notes.append(f"{key} {note}")
            if new is not None:
                engine[name] = new
        elif name not in vllm_options.recorded():
            similar = difflib.get_close_matches(name, vllm_options.recorded(), 1)
            mistakes.append(f"unknown vLLM option {key}" + (f"; did you mean {similar[0]}?" if similar else ""))
        elif value is False and vllm_options.recorded()[name].takes == "switch" \
                and not vllm_options.recorded()[name].negatable:
            continue  # off is the default
        elif name == "block-size" and value not in (16, 32, 64, 128, 256):
            notes.append(f"block_size {value} dropped: no longer supported by vLLM")
        else:
            engine[name] = value
    return engine, notes, mistakes
