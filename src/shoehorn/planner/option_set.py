"""vLLM's options with the one reason of each. Every change returns a new set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from shoehorn.planner.reasons import SETTING, Reason


@dataclass(frozen=True)
class OptionSet:
    """vLLM's options without leading dashes; the last reason of an option counts.

    Attributes:
        values: only options that vLLM gets.
        reasons: by option, or by subject of a remark.
        fixed: options that planning may not change: from the user, or from the last known good configuration.
    """

    values: Mapping[str, object] = field(default_factory=dict)
    reasons: Mapping[str, Reason] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()

    def set(self, option: str, value: object, source: str, code: str, **params: object) -> OptionSet:
        """Give an option a value."""
        return self.apply(Reason(option, value, source, code, params))

    def apply(self, reason: Reason) -> OptionSet:
        """Give an option the value of a reason."""
        return replace(self, values={**self.values, reason.option: reason.value},
                       reasons={**self.reasons, reason.option: reason})

    def set_by_user(self, option: str, value: object, code: str = "set", **params: object) -> OptionSet:
        """Give an option the user's value, which planning may not change."""
        before = self.reasons.get(option)
        replaces = before if before and before.value != value else None
        return self.apply(Reason(option, value, SETTING, code, params, replaces)).fix(option)

    def fix(self, *options: str) -> OptionSet:
        """Forbid planning to change options."""
        return replace(self, fixed=self.fixed.union(options))

    def drop(self, option: str, source: str, code: str, **params: object) -> OptionSet:
        """Take an option away, with a reason."""
        replaces = self.reasons.get(option) if option in self.values else None
        reason = Reason(option, None, source, code, params, replaces)
        return replace(self.without(option), reasons={**self.reasons, option: reason})

    def without(self, option: str) -> OptionSet:
        """Take a value away; its reason stays."""
        return replace(self, values={name: value for name, value in self.values.items() if name != option})

    def amend(self, option: str, value: object) -> OptionSet:
        """Change an option's value under the same reason."""
        return self.apply(replace(self.reasons[option], value=value))

    def remark(self, subject: str, value: object, source: str, code: str, **params: object) -> OptionSet:
        """Add a reason that is about no option; vLLM gets nothing."""
        return replace(self, reasons={**self.reasons, subject: Reason(subject, value, source, code, params)})

    def note(self, option: str, note: str, **params: object) -> OptionSet:
        """Add a note to an option's reason."""
        reason = self.reasons[option]
        noted = replace(reason, notes=(*reason.notes, note), params={**reason.params, **params})
        return replace(self, reasons={**self.reasons, option: noted})

    def source_of(self, option: str) -> str:
        """Source of an option's reason; empty for an option without one."""
        return self.reasons[option].source if option in self.reasons else ""

    def number(self, option: str, default: float = 0) -> float:
        """Return a numeric value, or the default."""
        value = self.values.get(option, default)
        return value if isinstance(value, int | float) else default

    def integer(self, option: str, default: int = 0) -> int:
        """Return a numeric value as an integer, or the default."""
        return int(self.number(option, default))
