"""The plugin's environment variables with a few words as values."""

from __future__ import annotations


class SettingError(ValueError):
    """An environment variable has an invalid value."""


def check(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return the value of the environment variable.

    Raises:
        SettingError: it is not one of `allowed`.
    """
    if value not in allowed:
        raise SettingError(f"{name}={value}: invalid. Set {' or '.join(allowed)}.")
    return value
