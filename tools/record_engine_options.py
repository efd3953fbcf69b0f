"""Recording of vLLM's options and of the names of its parsers into src/shoehorn/config; run after an upgrade.

usage: python tools/record_engine_options.py [--print]
The appliance reads this recording instead of importing the engine. A test records again and compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def record(parser: argparse.ArgumentParser) -> dict[str, dict[str, Any]]:
    """Return every option by its name without dashes: `takes` (value, switch or list), `kind`, and if present
    `choices`, `short` (other spellings) and `negatable`."""
    options: dict[str, dict[str, Any]] = {}
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
        if short := sorted(set(action.option_strings) - {f"--{name}", f"--no-{name}"}):
            entry["short"] = short
        if negatable:
            entry["negatable"] = True
        options[name] = entry
    return dict(sorted(options.items()))


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
