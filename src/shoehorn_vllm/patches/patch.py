"""Replacement of one function of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Patch:
    """A function that takes the place of the engine's own.

    Attributes:
        owner: module or class of the engine that the function belongs to.
        name: of the function in `owner`.
        function: gets the engine's own function as its first argument, then the call's arguments.
    """

    owner: Any
    name: str
    function: Callable[..., Any]

    def apply(self) -> None:
        """Replace the function; a second time has no effect."""
        if self._applied() is not None:
            return
        original = getattr(self.owner, self.name)

        def replacement(*arguments: Any, **named: Any) -> Any:
            return self.function(original, *arguments, **named)

        replacement.patch, replacement.original = self, original  # type: ignore[attr-defined]  # read by `_applied`
        setattr(self.owner, self.name, replacement)

    def revert(self) -> None:
        """Put the engine's own function back, if it was replaced."""
        if (original := self._applied()) is not None:
            setattr(self.owner, self.name, original)

    def _applied(self) -> Callable[..., Any] | None:
        """The engine's own function while it is replaced; else None."""
        current = getattr(self.owner, self.name)
        original: Callable[..., Any] | None = current.original if getattr(current, "patch", None) == self else None
        return original
