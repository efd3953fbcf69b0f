"""vLLM's parsers against the tables: which tokens each requires, and which report no tags of thoughts."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from shoehorn.config import vllm_parsers
from shoehorn.planner import parser_table
from shoehorn.planner.parser_table import REASONING_TOKENS, TOOL_TOKENS
from shoehorn_vllm.api.abilities import WITHOUT_TAGS

pytestmark = [pytest.mark.contract, pytest.mark.filterwarnings("ignore")]  # of the libraries that vLLM imports

OWN_METADATA = {"hf"}
"""Requires metadata of the tokenizer, not a token."""
OWN_SUFFIX = {"hy_v3", "hy_v4"}
"""Their tokens end in a suffix that each tokenizer chooses."""
OFF_BY_DEFAULT = parser_table.OFF_BY_DEFAULT
"""Report their tags only while they are switched on; the plan sets them."""


class Vocabulary(dict[str, int]):
    """A vocabulary that contains every token, but for the given ones."""

    def __init__(self, absent: frozenset[str]) -> None:
        super().__init__()
        self._absent = absent

    def get(self, token: str, default: Any = None) -> Any:
        return default if token in self._absent else hash(token) % 100_000

    def __getitem__(self, token: str) -> Any:
        return self.get(token)

    def __contains__(self, token: object) -> bool:
        return token not in self._absent


class Tokenizer:
    """As much of a tokenizer as parsers ask for when they are created."""

    init_kwargs: dict[str, object] = {}  # noqa: RUF012  # nothing changes it
    chat_template = None
    eos_token, eos_token_id, name_or_path = "</s>", 2, "invented"

    def __init__(self, absent: frozenset[str] = frozenset()) -> None:
        self._vocabulary = Vocabulary(absent)

    def get_vocab(self) -> Vocabulary:
        return self._vocabulary

    get_added_vocab = get_vocab
    vocab = property(get_vocab)

    def convert_tokens_to_ids(self, token: str) -> Any:
        return self._vocabulary.get(token)

    def encode(self, text: str, **_: object) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(map(chr, ids))


def created(option: str, name: str, absent: frozenset[str] = frozenset()) -> Any:
    """Create vLLM's parser; None where it refuses the tokenizer."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    logging.disable(logging.CRITICAL)
    kinds = {"reasoning-parser": ReasoningParserManager.get_reasoning_parser,
             "tool-call-parser": ToolParserManager.get_tool_parser}
    thinking = {"chat_template_kwargs": {"thinking": True}} if option == "reasoning-parser" else {}
    try:
        return kinds[option](name)(Tokenizer(absent), **thinking)
    except (RuntimeError, ValueError):
        return None


EVERY = frozenset(token for each in (*REASONING_TOKENS.values(), *TOOL_TOKENS.values()) for token in each)


@pytest.mark.parametrize(("option", "tokens"), [("reasoning-parser", REASONING_TOKENS),
                                                ("tool-call-parser", TOOL_TOKENS)])
def test_parsers_require_the_tokens_of_the_table_and_no_others(option: Any, tokens: dict[str, tuple[str, ...]]) -> None:
    for name in set(vllm_parsers.names(option)) - OWN_METADATA - OWN_SUFFIX:
        required = frozenset(tokens.get(name, ()))
        assert created(option, name), name
        assert created(option, name, EVERY - required), f"{name} requires more than {set(required)}"
        for token in required:
            assert created(option, name, frozenset({token})) is None, f"{name} does not require {token}"


def test_parsers_without_tags_are_the_listed_ones() -> None:
    names = set(vllm_parsers.names("reasoning-parser")) - OWN_METADATA
    without = {name for name in names if not created("reasoning-parser", name).reasoning_start_str}
    assert without - OFF_BY_DEFAULT == WITHOUT_TAGS
