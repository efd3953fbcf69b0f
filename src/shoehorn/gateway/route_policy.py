"""The decisions about the engine's routes (gateway/routes.yaml), and the document made from them.

Rules: every route has exactly one decision with a reason; what is served is what `gateway.ROUTES` lets pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from shoehorn.common.paths import GATEWAY

Decision = Literal["served", "own", "closed"]


@dataclass(frozen=True)
class Decided:
    """One route of the engine.

    Attributes:
        method: of HTTP; WEBSOCKET, or MOUNT for a tree of paths.
        path: with `{name}` where anything may stand.
        when: what the engine needs to have it; empty where every language model has it.
    """

    method: str
    path: str
    decision: Decision
    reason: str
    when: str

    @property
    def name(self) -> str:
        """As the engine's list has it."""
        return f"{self.method} {self.path}"


def read(path: Path = GATEWAY / "routes.yaml") -> tuple[Decided, ...]:
    """All decisions, in the order of the file.

    Raises:
        ValueError: a decision that there is not, or two about one route.
    """
    found: dict[str, Decided] = {}
    for group in yaml.safe_load(path.read_text(encoding="utf-8")):
        if group["decision"] not in ("served", "own", "closed"):
            raise ValueError(f"{group['decision']} is no decision")
        for name in group["routes"]:
            if name in found:
                raise ValueError(f"{name} is decided twice")
            method, _, target = name.partition(" ")
            found[name] = Decided(method, target, group["decision"], group["reason"], group.get("when", ""))
    return tuple(found.values())


_INTRODUCTION = """# Routes

What the gateway makes of every route that the engine's API server can have, in this version and with any switch. Tests
build the engine's server and fail for a route without a decision, and send each one through nginx with and without a
key. A path that is not in this table is 404 as well; under `/v1/` a request without a key gets 401 before that.

| answer | without a key | with a key |
|---|---|---|
| served | 401 | the engine's |
| own | the gateway's | the gateway's |
| closed | 404, under `/v1/` 401 | 404 |
"""

_TITLES = {"served": "Served", "own": "The gateway's own", "closed": "Closed"}


def document() -> str:
    """The text of docs/routes.md."""
    text = [_INTRODUCTION]
    for decision, title in _TITLES.items():
        text.append(f"\n## {title}\n\n| route | where the engine has it | why |\n|---|---|---|\n")
        for route in read():
            if route.decision == decision:
                text.append(f"| `{route.name}` | {route.when or 'always'} | {route.reason} |\n")
    return "".join(text)
