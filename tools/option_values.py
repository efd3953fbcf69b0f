"""Types and closed lists of the values inside vLLM's JSON options, found by trials on its configuration classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from enum import Enum
from typing import Any, Literal, get_args, get_origin, get_type_hints

TRIALS: Mapping[str, object] = {"object": {}, "list": [], "integer": 7, "number": 0.5, "boolean": True, "null": None,
                                "digits": "7", "text": "no_such_word"}
"""One value of each kind. `digits` is a text with a number."""

_NEED_A_MODEL = frozenset({"SpeculativeConfig"})
"""Classes whose checks load the configuration of a model."""


def of_class(config_class: type, depth: int = 1) -> dict[str, dict[str, Any]]:
    """Return what each key of a configuration class accepts: `accepts` (kinds), `choices`, `keys` of an object.

    A key that accepts every kind is left out, and one that the class converts while it loads a model.
    """
    from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter

    entries = {}
    converted = {name for each in config_class.__pydantic_decorators__.field_validators.values()
                 if each.info.mode != "after" for name in each.info.fields}
    for key, hint in get_type_hints(config_class, include_extras=True).items():
        if key not in config_class.__dataclass_fields__ or (
                key in converted and config_class.__name__ in _NEED_A_MODEL):
            continue
        try:
            adapter = TypeAdapter(config_class if key in converted else dict[str, hint])
        except (PydanticSchemaGenerationError, PydanticUserError, AttributeError):  # a type that only vLLM understands
            continue
        accepts = [kind for kind, value in TRIALS.items() if not _is_refused(adapter, key, value)]
        words = sorted({word for word in _words(hint) if not _is_refused(adapter, key, word)}, key=str)
        entry: dict[str, Any] = {"accepts": accepts}
        if words and ("integer" if type(words[0]) is int else "text") not in accepts:
            entry["choices"] = words
        inner = next((each for each in _types(hint) if is_dataclass(each)), None)
        if inner and depth:
            entry["accepts"] = ["object", *({"null"} & set(accepts))]
            entry["keys"] = dict.fromkeys(inner.__dataclass_fields__) | of_class(inner, depth - 1)
        if len(accepts) < len(TRIALS):
            entries[key] = entry
    return dict(sorted(entries.items()))


def of_mapping(hint: Any) -> list[str]:
    """Return the kinds that the values of an object with free keys accept."""
    from pydantic import TypeAdapter

    adapter = TypeAdapter(hint)
    return [kind for kind, value in TRIALS.items() if not _is_refused(adapter, "", value)]


def _is_refused(adapter: Any, key: str, value: object) -> bool:
    """Return whether a value is refused because of its own type; other errors do not count."""
    from pydantic import ValidationError

    try:
        adapter.validate_python({key or "key": value})
    except ValidationError as error:
        return any(not key or (each["loc"] and each["loc"][0] == key) for each in error.errors(include_url=False))
    except KeyError:  # a name that is looked up
        return True
    except (AssertionError, AttributeError, ImportError, NotImplementedError, OSError, RuntimeError, TypeError,
            ValueError):  # of the whole configuration
        return False
    return False


def _types(hint: Any) -> Iterator[Any]:
    """Yield a type and those inside it."""
    yield hint
    for each in get_args(hint):
        yield from _types(each)


def _words(hint: Any) -> Iterator[str | int]:
    """Yield the texts and integers that a type lists."""
    for each in _types(hint):
        if get_origin(each) is Literal:
            yield from (word for word in get_args(each) if type(word) in (str, int))
        elif isinstance(each, type) and issubclass(each, Enum):
            yield from (word for member in each for word in (member.name, member.value) if type(word) in (str, int))
