"""docs/routes.md, from the decisions in gateway/routes.yaml."""

from __future__ import annotations

from shoehorn.gateway import route_policy

_INTRODUCTION = """# Routes

The gateway's treatment of every route that the engine's API server can have, in this version and with any option. Tests
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
        text.append(f"\n## {title}\n\n| route | condition in the engine | reason |\n|---|---|---|\n")
        for route in route_policy.read():
            if route.decision == decision:
                text.append(f"| `{route.name}` | {route.when or 'always'} | {route.reason} |\n")
    return "".join(text)
