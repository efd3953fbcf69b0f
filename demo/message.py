"""One message of a conversation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """One message. Roles are those of the OpenAI API, and `tools` for the list of tools, always first.

    An assistant's `content` contains its calls, and the thought before the answer, between tags.

    Attributes:
        is_forced: the answer begins as a grammar forces it to, so its first token is not learned.
    """

    role: str
    content: str
    is_forced: bool = False
