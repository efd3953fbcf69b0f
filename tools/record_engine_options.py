"""Recording of vLLM's options and of the names of its parsers into src/shoehorn/config; run after an upgrade.

usage: python tools/record_engine_options.py [--print]
The appliance reads this recording instead of importing the engine. A test records again and compares.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import option_values

os.environ["HF_HUB_OFFLINE"] = "1"  # classes that name a default model would ask its hub for minutes

CONFIG = Path(__file__).resolve().parents[1] / "src" / "shoehorn" / "config"
TARGET = CONFIG / "vllm_options.json"


def kind_of(convert: Callable[[str], Any] | None) -> str:
    """Classify a converter of the parser by trying it: `int`, `size`, `float`, `json` or `text`.

    `size` is an integer that may be written `8k`; `json` an object, and sometimes text as well.
    """
    def tried(text: str) -> Any:
        try:
            return convert(text) if convert else text
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            return None

    if tried("1k") == 1000:
        return "size"
    if type(tried("7")) is int and tried("1.5") is None:
        return "int"
    if type(tried("1.5")) is float and tried("{}") is None:
        return "float"
    return "text" if isinstance(tried("{}"), str) else "json"


TRIALS = {"object": "{}", "list": "[]", "number": "1", "text": "word"}
"""One value of each JSON type; an option accepts a type if the parser and the field's own type accept the value."""


def field_types() -> dict[str, Any]:
    """Return the types of vLLM's options that are fields of its engine arguments, by name."""
    from dataclasses import fields

    from vllm.engine.arg_utils import AsyncEngineArgs

    return {field.name.replace("_", "-"): field.type for field in fields(AsyncEngineArgs)
            if not isinstance(field.type, str)}


def accepted_types(convert: Callable[[str], Any], hint: Any) -> list[str]:
    """Return the JSON types that an option accepts."""
    from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter

    def is_accepted(text: str) -> bool:
        try:
            value = convert(text)
            if hint is not None and isinstance(value, dict | list | int | str):
                TypeAdapter(hint).validate_python(value)
        except (PydanticUserError, PydanticSchemaGenerationError):  # a type that only vLLM understands
            return True
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            return False
        return True

    return [name for name, text in TRIALS.items() if is_accepted(text)]


def keys_of(convert: Callable[[str], Any], hint: Any) -> list[str]:
    """Return the keys of an option that refuses others; nothing for one that takes any key."""
    from typing import get_args

    for each in (hint, *get_args(hint)):
        names = sorted(getattr(each, "__dataclass_fields__", ()))
        if names:
            try:
                convert(json.dumps({"no_such_key": 1}))
            except (ValueError, TypeError, argparse.ArgumentTypeError):
                return names
    return []


def record(parser: argparse.ArgumentParser) -> dict[str, dict[str, Any]]:
    """Return every option by its name without dashes: `takes` (value, switch or list), `kind`, and if present
    `accepts` (JSON types), `keys` (of an object that refuses others), `values`, `choices`, `short` (other
    spellings) and `negatable`."""
    options: dict[str, dict[str, Any]] = {}
    hints, closed = field_types(), closed_lists()
    for action in parser._actions:
        long = [text for text in action.option_strings if text.startswith("--")]
        if not long or action.dest == "help":
            continue
        negatable = isinstance(action, argparse.BooleanOptionalAction)
        name = long[0].removeprefix("--")
        entry: dict[str, Any] = {"takes": "switch" if action.nargs == 0 else "list" if action.nargs == "+" else "value"}
        if action.nargs != 0:
            entry["kind"] = kind_of(action.type if callable(action.type) else None)
        if action.choices:
            entry["choices"] = sorted(str(choice) for choice in action.choices if choice is not None)
        if entry.get("kind") == "json" and callable(action.type):
            entry["accepts"] = accepted_types(action.type, hints.get(name))
            if values := values_of(name, hints.get(name)):
                entry["values"] = values
            if keys := keys_of(action.type, hints.get(name)) or config_keys().get(name):
                entry["keys"] = keys
        if name in closed:
            entry["choices"] = closed[name]
        if short := sorted(set(action.option_strings) - {f"--{name}", f"--no-{name}"}):
            entry["short"] = short
        if negatable:
            entry["negatable"] = True
        options[name] = entry
    return dict(sorted(options.items()))


def values_of(name: str, hint: Any) -> dict[str, Any]:
    """Return what the values inside an option accept by key; `*` stands for any key."""
    from typing import get_args

    from vllm.config import SpeculativeConfig

    for each in (SpeculativeConfig if name == "speculative-config" else hint, *get_args(hint)):
        if hasattr(each, "__pydantic_decorators__"):
            return option_values.of_class(each)
    if name == "limit-mm-per-prompt":
        return {"*": {"accepts": option_values.of_mapping(hint)}}
    return {}


def config_keys() -> dict[str, list[str]]:
    """Return the keys of options that the parser takes as they are and vLLM's configuration checks later."""
    from vllm.config import SpeculativeConfig

    return {"speculative-config": sorted(SpeculativeConfig.__dataclass_fields__)}


def closed_lists() -> dict[str, list[str]]:
    """Return the values of options that vLLM looks up in a registry after its parser."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return {"quantization": sorted(QUANTIZATION_METHODS), "load-format": sorted(_LOAD_FORMAT_TO_MODEL_LOADER)}


def record_parsers() -> dict[str, list[str]]:
    """Return the names of vLLM's parsers of thoughts and tool calls, by option."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    return {"reasoning-parser": sorted(ReasoningParserManager.list_registered()),
            "tool-call-parser": sorted(ToolParserManager.list_registered())}


def main() -> None:
    """Record the options; write or print them."""
    from vllm import __version__
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = record(make_arg_parser(FlexibleArgumentParser()))
    document = {"engine": f"vllm {__version__.split('+')[0]}", "options": options}
    text = json.dumps(document, indent=1) + "\n"
    if "--print" in sys.argv:
        sys.stdout.write(text)
    else:
        TARGET.write_text(text, encoding="utf-8")
        (CONFIG / "vllm_parsers.json").write_text(json.dumps(record_parsers(), indent=1) + "\n", encoding="utf-8")
        print(f"{TARGET}: {document['engine']}, {len(options)} options")


if __name__ == "__main__":
    main()
