"""Every possible route of the engine through a real nginx, with and without a key, as gateway/routes.yaml decides.

The engine behind it is a stand-in that would answer all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fakes.engine import FakeEngine
from shoehorn.gateway import route_policy
from shoehorn.gateway.route_policy import RouteDecision
from support.gateway_process import KEY, Gateway, authorization, request

pytestmark = pytest.mark.process

_UPGRADE = "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, FakeEngine]]:
    """A ready gateway."""
    with Gateway(tmp_path_factory.mktemp("gateway")) as gate, gate.engine() as engine:
        yield gate, engine


def _targets(route: RouteDecision) -> list[str]:
    """Paths that the route matches."""
    path = route.path.replace("{response_id}", "resp_1").replace("{adapter_name}", "mine")
    return [path, f"{path}/", f"{path}/x"] if route.method == "MOUNT" else [path]


def _status(gate: Gateway, method: str, target: str, headers: str) -> int:
    body = "Content-Length: 0\r\n" if method in ("POST", "PUT", "PATCH") else ""
    wire = "GET" if method in ("WEBSOCKET", "MOUNT") else method
    answer = gate.send(request(target, headers + body + (_UPGRADE if method == "WEBSOCKET" else ""), method=wire))
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize("route", route_policy.read(), ids=lambda route: route.name)
def test_route_is_answered_as_decided(ready: tuple[Gateway, FakeEngine], route: RouteDecision) -> None:
    gate, engine = ready
    engine.requests.clear()
    for target in _targets(route):
        bare = [_status(gate, method, target, "") for method in {route.method, *_METHODS}]
        if route.decision != "own":
            assert set(bare) <= {401, 404}, target
        assert engine.requests == [], f"{target} reached the engine without a key"
        with_key = _status(gate, route.method, target, authorization(KEY))
        expected = {"served": 200, "own": 200, "closed": 404}[route.decision]
        assert with_key == expected, target
        assert len(engine.requests) == (1 if route.decision == "served" else 0)
