"""Names of vLLM's parsers of thoughts and tool calls, as recorded data.

Rules: tools/record_engine_options.py writes `vllm_parsers.json` from vLLM's registries; a test compares the two.
"""

from __future__ import annotations

import difflib
import functools
import json
from importlib import resources
from typing import Literal

Option = Literal["reasoning-parser", "tool-call-parser"]
"""vLLM's options that take a parser's name."""

AUTO, OFF = "auto", "off"
"""Values of the settings besides the name of a parser."""


@functools.cache
def names(option: Option) -> tuple[str, ...]:
    """Return the names of vLLM's registry for an option, sorted."""
    document = json.loads(resources.files("shoehorn.config").joinpath("vllm_parsers.json").read_text(encoding="utf-8"))
    return tuple(document[option])


def unknown(option: Option, name: str) -> str:
    """Say that a name is in no registry, with the nearest one."""
    similar = difflib.get_close_matches(name, names(option), 1)
    return f"unknown parser {name!r}" + (f" (did you mean {similar[0]}?)" if similar else "")
