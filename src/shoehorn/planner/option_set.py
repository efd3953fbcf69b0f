"""The engine's options under construction: each value with the one reason that stands for it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Reason:
    """Why an option has its value; `source` is `setting`, `profile`, `model`, `machine` or `step-down`."""

    option: str
    value: object
    source: str
    text: str


class Options:
    """vLLM's options without dashes in front; the last reason of an option stands.

    Attributes:
        values: what the engine gets.
        fixed: options that the user gave, which nothing may change.
    """

    def __init__(self) -> None:
        self.values: dict[str, object] = {}
        self.reasons: dict[str, Reason] = {}
        self.fixed: set[str] = set()

    def set(self, option: str, value: object, source: str, text: str) -> None:
        """Give an option a value."""
        self.values[option] = value
        self.reasons[option] = Reason(option, value, source, text)

    def fix(self, option: str, value: object, text: str) -> None:
        """Give an option the user's value, and say what it replaces."""
        before = self.reasons.get(option)
        instead = ""
        if before and before.value != value:
            instead = f" instead of {before.value} ({before.source} {before.text})"
        self.set(option, value, "setting", text + instead)
        self.fixed.add(option)

    def drop(self, option: str, source: str, text: str) -> None:
        """Take an option away, and say why."""
        before = self.values.pop(option, None)
        self.reasons[option] = Reason(option, None, source, text + (f" instead of {before}" if before else ""))

    def note(self, option: str, text: str) -> None:
        """Add a remark to an option's reason."""
        self.reasons[option] = replace(self.reasons[option], text=f"{self.reasons[option].text}; {text}")

    def remark(self, subject: str, value: object, source: str, text: str) -> None:
        """Add a reason that is not about an option; the engine gets no value."""
        self.reasons[subject] = Reason(subject, value, source, text)

    def number(self, option: str, default: float = 0) -> float:
        """A numerical value."""
        value = self.values.get(option, default)
        return value if isinstance(value, int | float) else default

    def whole(self, option: str, default: int = 0) -> int:
        """A numerical value as a whole number."""
        return int(self.number(option, default))
