"""Error bodies of the OpenAI and the Anthropic API that the appliance itself answers with."""

from __future__ import annotations

import json
from collections.abc import Mapping

from shoehorn_vllm.protocol import anthropic_error, openai_error


def error_bodies(status: int, message: str, code: str | None = None,
                 extra: Mapping[str, object] | None = None) -> dict[str, str]:
    """The bodies of one error in the forms `openai` and `anthropic`.

    Args:
        code: instead of the status's own (`shoehorn_vllm.protocol.ERROR_FORMS`).
        extra: further fields of the OpenAI error.
    """
    return {"openai": _dump({"error": {**openai_error(status, message, code), **(extra or {})}}),
            "anthropic": _dump(anthropic_error(status, message))}


def _dump(document: object) -> str:
    return json.dumps(document) + "\n"
