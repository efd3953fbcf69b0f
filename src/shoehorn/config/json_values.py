"""Check of the values inside vLLM's JSON options against the recorded types and closed lists of its configuration.

Rules: what pydantic converts is accepted, such as a number in quotes; a key without a record accepts anything.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

_SWITCH_WORDS = frozenset({"0", "1", "true", "false", "yes", "no", "on", "off", "t", "f", "y", "n"})
_FORMS = {"object": "a JSON object", "list": "a list", "integer": "an integer", "number": "a number",
          "boolean": "true or false", "null": "null", "text": "a text"}

_NUMBER, _INTEGER = {"accepts": ("integer", "number", "null")}, {"accepts": ("integer", "null")}

GENERATION: Mapping[str, Any] = {
    "temperature": _NUMBER, "top_p": _NUMBER, "min_p": _NUMBER, "repetition_penalty": _NUMBER, "top_k": _INTEGER,
    "max_new_tokens": _INTEGER}
"""Keys of `override-generation-config` that vLLM reads. Its configuration does not check them: every request fails."""


def check_value(where: str, value: object, record: Mapping[str, Any]) -> None:
    """Check one value.

    Args:
        where: option and key, for the error.
        record: `accepts` (kinds), `choices` and `keys` (of an object), as tools/option_values.py writes them.

    Raises:
        ValueError: another type, word or key; says what to write.
    """
    accepts, choices = record["accepts"], [str(choice) for choice in record.get("choices", ())]
    if isinstance(value, dict) and "keys" in record:
        for key, inner in value.items():
            if key not in record["keys"]:
                similar = difflib.get_close_matches(str(key), record["keys"], 1)
                raise ValueError(f"{where}: unknown key {key!r}" + (f"; did you mean {similar[0]}?" if similar else ""))
            if record["keys"][key]:
                check_value(f"{where}.{key}", inner, record["keys"][key])
        return
    if (not isinstance(value, bool) and str(value) in choices) or _kinds(value) & set(accepts):
        return
    if "boolean" in accepts and str(value).lower() in _SWITCH_WORDS:
        return
    if choices:
        similar = difflib.get_close_matches(str(value), choices, 1)
        raise ValueError(f"{where}: {value!r} is not one of {', '.join(choices)}"
                         + (f"; did you mean {similar[0]}?" if similar else ""))
    wider = {"integer": "number", "boolean": "integer"}
    forms = [form for kind, form in _FORMS.items() if kind in accepts and wider.get(kind) not in accepts]
    raise ValueError(f"{where}: {value!r} is not {' or '.join(forms)}")


def _kinds(value: object) -> set[str]:
    """Return the recorded kinds that a value is."""
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return {"integer", "number"}
    if isinstance(value, str):
        return {"text", "digits"} if re.fullmatch(r"-?\d+", value) else {"text"}
    return {"object" if isinstance(value, dict) else "list" if isinstance(value, list) else
            "number" if isinstance(value, float) else "null"}
