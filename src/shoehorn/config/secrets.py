"""Names of settings and environment variables that hold secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SECRET = re.compile(r"(?:^|_)(?:API_?KEY|ACCESS_KEY|AUTH|CREDENTIALS?|PASSWD|PASSWORD|SECRET|TOKEN)(?:_FILE)?$")


def is_secret(name: str) -> bool:
    """Return whether a variable's name is that of a secret, or of a secret's file."""
    return bool(_SECRET.search(name.upper()))


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without its secrets."""
    return {name: value for name, value in environment.items() if not is_secret(name)}
