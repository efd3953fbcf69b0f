"""Task of a model: text generation, embeddings, or classification and ranking.

Rules: decided as the engine does: by the modules of a sentence encoder, then by the architecture's name.

Source: vLLM 0.32.0, vllm/config/model.py (_get_default_runner_type, _SUFFIX_TO_DEFAULTS) and
vllm/transformers_utils/config.py (get_pooling_config).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum

from shoehorn.model.files import Files

_SUFFIXES = (("ForCausalLM", "generate"), ("ForConditionalGeneration", "generate"), ("ChatModel", "generate"),
             ("LMHeadModel", "generate"), ("Classification", "classify"), ("ClassificationModel", "classify"),
             ("ForRewardModeling", "reward"), ("RewardModel", "reward"), ("ForTextEncoding", "embed"),
             ("Model", "embed"))
"""Task by the end of an architecture's name; the first match counts."""

_OTHERWISE = {
    **dict.fromkeys(("ChatGLMModel", "MiDashengLMModel", "MossAudioModel", "Qwen2_5OmniModel", "UltravoxModel"),
                    "generate"),
    **dict.fromkeys(("BertForMaskedLM", "RobertaForMaskedLM", "ColPaliForRetrieval"), "embed"),
    "JinaVLForRanking": "classify"}
"""Architectures of vLLM's registry whose task is not the one of their name's end."""


_SENTENCE_KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")


class Task(Enum):
    """Purpose of a model."""

    GENERATE = "generate"
    EMBED = "embed"
    CLASSIFY = "classify"
    REWARD = "reward"

    @property
    def is_pooling(self) -> bool:
        """Return whether the model returns a vector or a score instead of text."""
        return self is not Task.GENERATE


def of_architecture(architecture: str) -> Task:
    """Return the task of an architecture by its name."""
    named = (task for suffix, task in _SUFFIXES if architecture.endswith(suffix))
    return Task(_OTHERWISE.get(architecture) or next(named, "generate"))


def read(files: Files, architecture: str) -> Task:
    """Determine the task of a checkpoint.

    Raises:
        ModelUnavailableError: a file that exists cannot be fetched.
    """
    if _is_sentence_encoder(files, files.names()):
        return Task.EMBED
    return of_architecture(architecture)


def sentence_limit(files: Files, names: Mapping[str, int]) -> int:
    """Return the tokens of a text that a sentence encoder takes; 0 if it states none. vLLM's limit of the context."""
    name = next((f"sentence_{kind}_config.json" for kind in _SENTENCE_KINDS if f"sentence_{kind}_config.json" in names),
                "")
    document = _json(files, name) if name else None
    limit = document.get("max_seq_length") if isinstance(document, dict) else None
    return limit if isinstance(limit, int) and limit > 0 else 0


def _is_sentence_encoder(files: Files, names: Mapping[str, int]) -> bool:
    if "modules.json" not in names:
        return False
    modules = _json(files, "modules.json")
    return isinstance(modules, list) and any(
        isinstance(each, dict) and str(each.get("type")).rsplit(".", 1)[-1] == "Pooling" for each in modules)


def _json(files: Files, name: str) -> object:
    try:
        document: object = json.loads(files.read(name))
    except (ValueError, RecursionError):
        return None
    return document
