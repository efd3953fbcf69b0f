"""Every route of the installed engine has a decision, and the served ones are those of the gateway."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shoehorn.common.paths import HOME
from shoehorn.gateway import nginx_config, route_policy

TABLE = route_policy.read()


@pytest.fixture(scope="module")
def engine() -> dict[str, list[str]]:
    """The engine's routes by the condition that adds them."""
    done = subprocess.run([sys.executable, str(HOME / "tools" / "engine_routes.py")], capture_output=True, text=True,
                          timeout=300, check=True)
    routes: dict[str, list[str]] = json.loads(done.stdout)
    return routes


@pytest.mark.contract
def test_every_route_of_the_engine_has_a_decision(engine: dict[str, list[str]]) -> None:
    real = {route: condition for condition, routes in engine.items() for route in routes}
    assert {route.name: route.when for route in TABLE} == real, "decide about new routes in gateway/routes.yaml"


@pytest.mark.contract
def test_route_list_of_the_engine_is_plausible(engine: dict[str, list[str]]) -> None:
    known = {"POST /v1/chat/completions", "POST /invocations", "MOUNT /metrics", "GET /openapi.json"}
    assert known <= set(engine[""])
    assert engine["any other task"] == engine["everything at once"] == []  # the conditions before name them all
    assert "POST /collective_rpc" in engine["VLLM_SERVER_DEV_MODE=1"]


def test_served_routes_are_those_of_the_gateway() -> None:
    served = {(route.method, route.path) for route in TABLE if route.decision == "served"}
    assert served == {(route.method, route.path) for route in nginx_config.ROUTES}


def test_missing_optional_packages_are_in_no_lock() -> None:
    for name in ("cpu", "gpu"):
        lock = (HOME / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
        assert not any(line.startswith("cohere==") for line in lock.splitlines())


def test_every_decision_has_a_reason() -> None:
    assert [route.name for route in TABLE if len(route.reason) < 10 or not route.reason.endswith(".")] == []


@pytest.mark.parametrize(("text", "complaint"), [
    ("- {decision: open, reason: x, routes: [GET /a]}", "unknown decision 'open'"),
    ("- {decision: closed, reason: x, routes: [GET /a, GET /a]}", "decided twice"),
])
def test_invalid_table_is_rejected(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "routes.yaml").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        route_policy.read(tmp_path / "routes.yaml")
