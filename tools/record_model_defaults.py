"""Recordings of what vLLM and transformers know of models, into src/shoehorn/model; run after an upgrade.

usage: python tools/record_model_defaults.py [--print]
model_defaults.json: defaults and key names of the configuration classes, for the reader of config.json.
engine_models.json: names of the classes that need no code of a checkpoint, one list per line.
transformers_models.json: architectures that vLLM serves with transformers' code -> whether their class states which
layers tensor parallelism divides (`base_model_tp_plan`); without that vLLM divides only attention and gated MLPs.
The package uses the recordings instead of importing vLLM or transformers. A test records again and compares.
Configuration classes whose module needs a library that is not installed are left out of the defaults.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from shoehorn.model.config_names import ATTRIBUTES, SECTIONS  # noqa: E402 - the package is not installed where this runs

MODEL = ROOT / "src" / "shoehorn" / "model"

OTHER_SIZES = (("num_hidden_layers", 1, 6), ("hidden_size", 2, 0), ("num_attention_heads", 2, 0), ("vocab_size", 2, 0),
               ("max_position_embeddings", 2, 0), ("intermediate_size", 2, 0))
"""Changes of an example: key, factor and addend; a value that they change is computed, not a default."""


def classes() -> Iterator[tuple[str, Any]]:
    """Yield each model type and its class: vLLM's own where it has one, as vLLM prefers it."""
    from transformers import CONFIG_MAPPING
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    for model_type in sorted({*CONFIG_MAPPING, *_CONFIG_REGISTRY}):
        try:
            yield model_type, (_CONFIG_REGISTRY if model_type in _CONFIG_REGISTRY else CONFIG_MAPPING)[model_type]
        except ImportError:
            continue


def entry(config_class: Any) -> dict[str, Any]:
    """Return the defaults of one class, its other names of attributes, the model types of its sections, its layers."""
    defaults = {name: parameter.default for name, parameter in
                inspect.signature(config_class.__init__).parameters.items()}
    defaults |= {name: getattr(config_class, name) for name in ATTRIBUTES if hasattr(config_class, name)}
    names = {name: own for name, own in getattr(config_class, "attribute_map", {}).items() if name in ATTRIBUTES}
    relevant = {*ATTRIBUTES, *names.values()}
    examples = instances(config_class)
    if len(examples) == 2:  # what the class computes, unless it depends on other values
        defaults |= {name: values[0] for name in relevant if defaults.get(name) in (None, inspect.Parameter.empty)
                     and len(values := [example.get(name) for example in examples]) == len(examples)
                     and len({json.dumps(value, default=str) for value in values}) == 1}
    values = {name: value for name, value in defaults.items()
              if name in relevant and type(value) in (int, float, bool, str) and value != "auto"}
    sections = {name: section.model_type for name, section in getattr(config_class, "sub_configs", {}).items()
                if getattr(section, "model_type", "")}
    if examples:
        sections |= {name: value["model_type"] for name, value in examples[0].items()
                     if isinstance(value, Mapping) and value.get("model_type") and name in SECTIONS}
    content = {"defaults": dict(sorted(values.items())), "names": dict(sorted(names.items())),
               "sections": dict(sorted(sections.items())), "layers": pattern(examples)}
    return {key: value for key, value in content.items() if value}


def instances(config_class: Any) -> list[dict[str, Any]]:
    """Return the values of an instance with the defaults, and of one with other sizes if the class allows these."""
    from huggingface_hub.errors import StrictDataclassError

    names, examples, changed = getattr(config_class, "attribute_map", {}), [], {}
    try:
        for _ in range(2):
            example = config_class(**changed).to_dict()
            examples.append(example)
            changed = {key: value * factor + more for name, factor, more in OTHER_SIZES
                       if type(value := example.get(key := names.get(name, name))) is int and value > 0}
    except (AssertionError, AttributeError, ImportError, KeyError, OSError, StrictDataclassError, TypeError, ValueError,
            ZeroDivisionError) as error:
        print(f"{config_class.__name__} is incomplete: {type(error).__name__}", file=sys.stderr)
    return examples


def pattern(examples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the types of layers that repeat in every example; empty without types, or if they do not repeat."""
    lists = [next((example[key] for key in ("layers_block_type", "layer_types") if example.get(key)), ())
             for example in examples]
    if len(lists) < 2 or not all(lists) or len({len(types) for types in lists}) < len(lists):
        return []
    for period in range(1, min(map(len, lists)) // 2 + 1):
        if all(types[number] == lists[0][number % period] for types in lists for number in range(len(types))):
            return list(lists[0][:period])
    return []


def record() -> dict[str, Any]:
    """Return the entry of every model type."""
    return {model_type: content for model_type, config_class in classes() if (content := entry(config_class))}


def engine_models() -> dict[str, list[str]]:
    """Return the names of configurations, architectures and tokenizers that are part of vLLM or transformers.

    Returns:
        configurations: model types whose configuration class is known; unnamed: architectures whose config.json may
        lack the model type; engine: architectures of vLLM, which serves those of `transformers` with its general model;
        tokenizers: tokenizer classes; tokenizer_types: model types with a tokenizer class of their own; own_tokenizer:
        model types whose tokenizer is loaded without the checkpoint's class.
    """
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto
    from transformers.models.auto import tokenization_auto as tokenization
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.tokenizers import registry
    from vllm.transformers_utils import config

    def names_of(mapping: object) -> set[str]:
        values = mapping.values() if isinstance(mapping, Mapping) else ()
        return {name for value in values for name in (value if isinstance(value, list | tuple) else [value]) if name}

    loaded = {model_type: config_class.__name__ for model_type, config_class in classes()}
    architectures = {name for key, mapping in vars(modeling_auto).items()
                     if key.startswith("MODEL_") and key.endswith("_NAMES") for name in names_of(mapping)}
    by_class = tokenization.TOKENIZER_MAPPING._reverse_config_mapping
    tokenizers = {name for name in dir(transformers) if name.endswith(("Tokenizer", "TokenizerFast", "Backend"))}
    content = {
        "configurations": {*CONFIG_MAPPING, *config._CONFIG_REGISTRY},
        "unnamed": set(config._ARCHITECTURE_TO_MODEL_TYPE),
        "engine": set(ModelRegistry.get_supported_archs()),
        "transformers": {name for name in architectures if hasattr(transformers, name)},
        "tokenizers": {*names_of(tokenization.TOKENIZER_MAPPING_NAMES), *tokenizers, "BloomTokenizer"},
        "tokenizer_types": {model_type for model_type, name in loaded.items()
                            if by_class.get(name) in tokenization.TOKENIZER_MAPPING_NAMES},
        "own_tokenizer": {*tokenization.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
                          *registry._MODEL_TYPES_WITH_INCORRECT_TOKENIZER_CLASS}}
    return {name: sorted(values) for name, values in content.items()}


def transformers_models() -> dict[str, bool]:
    """Return the architectures of vLLM's registry that transformers' code serves, and whether they have a plan."""
    import transformers
    from vllm.model_executor.models.registry import ModelRegistry

    recorded = {}
    for architecture, model in ModelRegistry.models.items():
        if getattr(model, "module_name", "").endswith(".transformers") and not architecture.startswith("Transformers"):
            config_class = getattr(getattr(transformers, architecture, None), "config_class", None)
            recorded[architecture] = bool(getattr(config_class, "base_model_tp_plan", None))
    return dict(sorted(recorded.items()))


def lines(entries: Mapping[str, Any]) -> str:
    """Write one entry per line."""
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(each)}" for name, each in entries.items()) + "\n}\n"


def recordings() -> dict[str, str]:
    """Return the content of each file by name."""
    return {"model_defaults.json": lines(record()), "engine_models.json": lines(engine_models()),
            "transformers_models.json": lines(transformers_models())}


def main() -> int:
    """Write the recordings, or print them as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true")
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    texts = recordings()
    if parser.parse_args().print:
        print(json.dumps(texts))
    else:
        for name, text in texts.items():
            (MODEL / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
