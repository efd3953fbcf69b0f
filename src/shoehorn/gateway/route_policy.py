"""Decisions about the engine's routes (gateway/routes.yaml).

Rules: every route has exactly one decision with a reason; the routes served are those of `nginx_config.ROUTES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from shoehorn.common.paths import GATEWAY

Decision = Literal["served", "own", "closed"]


@dataclass(frozen=True)
class RouteDecision:
    """The decision about one route of the engine.

    Attributes:
        method: of HTTP; WEBSOCKET, or MOUNT for a tree of paths.
        path: with `{name}` for variable parts.
        when: condition under which the engine has the route; empty where every language model has it.
    """

    method: str
    path: str
    decision: Decision
    reason: str
    when: str

    @property
    def name(self) -> str:
        """Method and path, as in the engine's list."""
        return f"{self.method} {self.path}"


def read(path: Path = GATEWAY / "routes.yaml") -> tuple[RouteDecision, ...]:
    """Read all decisions, in the order of the file.

    Raises:
        ValueError: a decision is unknown, or a route has two.
    """
    decisions: dict[str, RouteDecision] = {}
    for group in yaml.safe_load(path.read_text(encoding="utf-8")):
        if group["decision"] not in ("served", "own", "closed"):
            raise ValueError(f"unknown decision {group['decision']!r}")
        for name in group["routes"]:
            if name in decisions:
                raise ValueError(f"{name}: decided twice")
            method, _, target = name.partition(" ")
            decisions[name] = RouteDecision(method, target, group["decision"], group["reason"], group.get("when", ""))
    return tuple(decisions.values())
