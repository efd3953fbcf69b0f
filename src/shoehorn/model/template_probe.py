"""Rendering of a chat template with a one-line conversation, to find out what it does with tools and thoughts.

Rules: a template is a program of the model's author, so it runs in a sandbox, like in the engine, and its loops and
products are bounded; a template that fails to render gives no prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import date
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

PROBE_TOOL = "shoehorn_probe_tool"
"""Name of the tool that the probe offers: a template that shows it to the model mentions it in the prompt."""

_MAX_STEPS = 10_000
"""Steps of all loops over `range` in one rendering."""

_MAX_LENGTH = 1 << 20
"""Length of a repeated text or list, in characters or items."""

_TOOLS = [{"type": "function", "function": {
    "name": PROBE_TOOL, "description": "Probe.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "City."}},
                   "required": ["city"]}}}]
_GENERATION_TAG = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")
"""Marks of the training library around answers; the engine skips them too."""


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Environment of one rendering."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self._steps = 0
        self.filters["tojson"] = _to_json
        self.globals |= {"raise_exception": _raise, "strftime_now": _date, "range": self._range}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse powers, and products that repeat a long text or list."""
        factors = (left, right)
        sizes = [abs(each) if isinstance(each, int | float) else len(each) for each in factors]
        if operator == "**" or sizes[0] * sizes[1] > _MAX_LENGTH:
            raise SecurityError("a product is too large")
        return super().call_binop(context, operator, left, right)

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self._steps += len(numbers)
        if self._steps > _MAX_STEPS:
            raise SecurityError("a loop is too long")
        return numbers


def prompts(template: str, special_tokens: Mapping[str, str], *, with_tools: bool = False, **variables: object,
            ) -> Iterator[str]:
    """Render the template for a user who says hello; yield each form of the conversation that it accepts.

    Args:
        special_tokens: for example bos_token.
        with_tools: offer the tool `PROBE_TOOL`.
        variables: of the template, for example enable_thinking.
    """
    hello: dict[str, object] = {"role": "user", "content": "Hello"}
    conversations = ([hello], [{"role": "system", "content": "Be brief."}, hello],
                     [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}])
    for messages in conversations:
        values = {"messages": messages, "add_generation_prompt": True, **special_tokens, **variables}
        if with_tools:
            values["tools"] = _TOOLS
        try:
            yield _BoundedEnvironment().from_string(_GENERATION_TAG.sub("", template)).render(values)
        except (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
                RecursionError):  # whatever a program in a template can raise
            continue


def variables(template: str) -> frozenset[str]:
    """Return the names that the template expects from its caller; none if it cannot be parsed."""
    try:
        parsed = _BoundedEnvironment().parse(_GENERATION_TAG.sub("", template))
    except (jinja2.TemplateError, RecursionError):
        return frozenset()
    return frozenset(meta.find_undeclared_variables(parsed))


def _to_json(value: object, indent: int | None = None, ensure_ascii: bool = False, **_: object) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, default=str)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _date(form: str) -> str:
    return date(2026, 1, 1).strftime(form)
