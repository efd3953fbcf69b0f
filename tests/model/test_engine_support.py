"""Models that the engine builds itself, with code of the checkpoint, or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest

from fakes.checkpoint_files import CheckpointFiles
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.model.engine_support import require_buildable

CODE = {"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.Model"}
TOKENIZER_CODE = {"AutoTokenizer": ["tokenization.Tokenizer", None]}


def verdict(config: Mapping[str, Any], tokenizer: Mapping[str, Any] | None = None, **options: Any) -> str:
    """Return the error's code, and for missing code the part that needs it; `ok` without an error."""
    heads = {"config.json": json.dumps(config).encode(), **options.pop("others", {})}
    if tokenizer is not None:
        heads["tokenizer_config.json"] = json.dumps(tokenizer).encode()
    try:
        require_buildable(CheckpointFiles(heads), "a/b", **{"trusts_code": False, **options})
    except ModelUnavailableError as error:
        part = error.cause.partition("code for its ")[2].partition(" (")[0]
        return part or error.code
    return "ok"


@pytest.mark.parametrize(("config", "expected"), [
    ({"model_type": "internlm3", "architectures": ["InternLM3ForCausalLM"], "auto_map": CODE}, "configuration"),
    ({"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "auto_map": CODE}, "ok"),
    ({"model_type": "ernie4_5", "architectures": ["Ernie4_5ForCausalLM"], "auto_map": CODE}, "ok"),
    ({"model_type": "xverse", "architectures": ["XverseForCausalLM"], "auto_map": CODE}, "configuration"),
    ({"architectures": ["LongcatFlashForCausalLM"], "auto_map": CODE}, "ok"),
    ({"architectures": ["SomethingForCausalLM"], "auto_map": CODE}, "configuration"),
    # the configuration is known, the model is not
    ({"model_type": "llama", "architectures": ["MyLlamaForCausalLM"], "auto_map": CODE}, "model"),
    ({"model_type": "llama", "architectures": ["MyLlamaForCausalLM"]}, "unsupported_architecture"),
    ({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "auto_map": {"AutoModel": "m.M"}}, "ok"),
    # transformers' models, and conversions between tasks
    ({"model_type": "codegen", "architectures": ["CodeGenForCausalLM"]}, "ok"),
    ({"model_type": "qwen2", "architectures": ["Qwen2ForSequenceClassification"]}, "ok"),
    ({"model_type": "mistral", "architectures": ["MistralForRewardModeling"]}, "ok"),
    ({"model_type": "llama_nova", "architectures": ["LlamaForCausalLM"]}, "unsupported_architecture"),
    ({"model_type": "qwen3"}, "ok"),
])
def test_code_of_the_checkpoint_is_required_only_for_classes_that_nothing_else_has(
        config: dict[str, Any], expected: str) -> None:
    assert verdict(config) == expected


@pytest.mark.parametrize(("model_type", "tokenizer", "expected"), [
    ("chatglm", {"tokenizer_class": "ChatGLMTokenizer", "auto_map": TOKENIZER_CODE}, "tokenizer"),
    ("chatglm", {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": TOKENIZER_CODE}, "ok"),
    ("chatglm", {"tokenizer_class": "ChatGLMTokenizer", "auto_map": ["tokenization.Tokenizer", None]}, "tokenizer"),
    ("minicpm3", {"tokenizer_class": "MiniCPM3Tokenizer", "auto_map": TOKENIZER_CODE}, "ok"),
    ("llama", {"tokenizer_class": "XTokenizer", "auto_map": {"AutoProcessor": "processing.Processor"}}, "ok"),
    ("nemotron_h", {"tokenizer_class": "LlamaTokenizerFast", "auto_map": TOKENIZER_CODE}, "ok"),
])
def test_code_of_the_tokenizer(model_type: str, tokenizer: dict[str, Any], expected: str) -> None:
    assert verdict({"model_type": model_type}, tokenizer) == expected


def test_tokenizer_that_the_engine_does_not_use_needs_no_code() -> None:
    own = {"tokenizer_class": "XTokenizer", "auto_map": TOKENIZER_CODE}
    assert verdict({"model_type": "chatglm"}, own) == "tokenizer"
    assert verdict({"model_type": "chatglm"}, own, own_tokenizer=True) == "ok"
    assert verdict({"model_type": "chatglm"}, own, others={"tekken.json": b"{}"}) == "ok"


def test_trusted_code_serves_all_but_what_nothing_builds() -> None:
    assert verdict({"model_type": "x", "auto_map": CODE}, trusts_code=True) == "ok"
    assert verdict({"model_type": "x"}, trusts_code=True) == "unsupported_architecture"


def test_overrides_of_the_user_count() -> None:
    config = {"model_type": "llama", "architectures": ["MyLlamaForCausalLM"]}
    assert verdict(config, overrides={"architectures": ["LlamaForCausalLM"]}) == "ok"


def test_foreign_plugin_of_the_engine_may_add_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = SimpleNamespace(dist=SimpleNamespace(name="vllm-other-models"))
    monkeypatch.setattr(metadata, "entry_points", lambda group: [plugin] if group == "vllm.general_plugins" else [])
    assert verdict({"model_type": "llama", "architectures": ["MyLlamaForCausalLM"]}) == "ok"
