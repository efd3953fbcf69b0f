"""Grafana's dashboards: made by tools/dashboards.py, and each panel says what it shows, of metrics that exist."""

from __future__ import annotations

import importlib.util
import json
import re
from types import ModuleType
from typing import Any

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from shoehorn.common.paths import HOME
from shoehorn.observability import metrics

FOLDER = HOME / "monitoring" / "grafana"
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((FOLDER / "dashboards").glob("*.json"))}
PANELS = [(name, panel) for name, document in DASHBOARDS.items() for panel in document["panels"]]
UNITS = {"none", "short", "s", "bytes", "percentunit", "reqps", "celsius", "watt"}
"""Of Grafana's units (@grafana/data, valueFormats/categories.ts): another one would be shown as plain text."""

DUMP = (HOME / "tests" / "captures" / "vllm-0.32.0-cpu-metrics.txt").read_text(encoding="utf-8")


def generator() -> ModuleType:
    specification = importlib.util.spec_from_file_location("dashboards", HOME / "tools" / "dashboards.py")
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    __import__("sys").modules["dashboards"] = module  # dataclasses look it up
    specification.loader.exec_module(module)
    return module


def plain(query: str) -> str:
    """A query as Prometheus would get it."""
    for name, value in (("$__rate_interval", "1m"), ("$__range", "1h"), ("$__interval", "15s"), ("$instance", ".+"),
                        ("$gpu", "0")):
        query = query.replace(name, value)
    return query


def test_the_files_are_what_the_generator_makes() -> None:
    made = generator()
    assert set(DASHBOARDS) == set(made.DASHBOARDS)
    for name in DASHBOARDS:
        assert (FOLDER / "dashboards" / f"{name}.json").read_text() == made.document(name), "run: make dashboards"


@pytest.mark.parametrize(("name", "panel"), PANELS, ids=[f"{name}: {panel['title']}" for name, panel in PANELS])
def test_a_panel_says_what_it_shows(name: str, panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith((".", "error."))
    units = [panel["fieldConfig"]["defaults"]["unit"]]
    units += [property["value"] for override in panel["fieldConfig"]["overrides"] for property in override["properties"]
              if property["id"] == "unit"]
    assert set(units) <= UNITS
    assert panel["datasource"]["uid"] == "${datasource}"
    assert panel["targets"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert len({target["legendFormat"] for target in panel["targets"]}) == len(panel["targets"])
    for override in panel["fieldConfig"]["overrides"]:
        assert override["matcher"]["options"] in {target["legendFormat"] for target in panel["targets"]}
    of_the_moment = panel["type"] in ("stat", "bargauge")
    assert of_the_moment or panel["type"] == "timeseries"
    known_names = panel["options"].get("textMode") == "name"
    assert known_names == (panel["type"] == "stat" and "{{" in panel["targets"][0]["legendFormat"])
    known = {metric.name for metric in metrics.TABLE} | {metric for metric, _ in metrics.PER_KEY}
    known |= set(re.findall(r"^([a-z_:]+)[{ ]", DUMP, re.MULTILINE))
    for target in panel["targets"]:
        assert target["legendFormat"]
        assert (target["instant"], target["range"]) == (of_the_moment, not of_the_moment), "what is over would be shown"
        query = target["expr"]
        promql_parser.parse(plain(query))
        used = set(re.findall(r"\b(?:shoehorn_|vllm:|up\b|ALERTS\b)[a-z_]*", query))
        assert used, query
        assert used <= known | {"up", "ALERTS"}, used - known
        assert query.count('instance=~"$instance"') >= len(used)
        for counter in re.findall(r"(\w+ )?\(?((?:shoehorn_|vllm:)[a-z_]*_total)\{", query):
            assert "rate(" in query or "shoehorn_engine_" in counter[1], "a counter's value says little"
        for bound in re.findall(r"\[([^]]+)\]", query):
            assert bound in ("$__rate_interval", "$__range", "$__range:$__interval")


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_what_grafanas_own_types_know(name: str) -> None:
    """Read into the SDK's types and written again, nothing is lost or changed: a field they do not know would be."""
    register_default_plugins()
    again = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(DASHBOARDS[name])))
    assert again == DASHBOARDS[name]
    broken = json.loads(json.dumps(DASHBOARDS[name]))
    broken["panels"][0]["options"]["reduceOption"] = broken["panels"][0]["gridPosition"] = {}
    assert json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(broken))) == DASHBOARDS[name]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_well_laid_out(name: str) -> None:
    document = DASHBOARDS[name]
    panels = document["panels"]
    assert document["uid"] == f"shoehorn-{name}"
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, f"{panel['title']} lies over another"
        taken |= cells
    assert [variable["name"] for variable in document["templating"]["list"]][:2] == ["datasource", "instance"]


def test_no_two_dashboards_share_an_id() -> None:
    assert len({document["uid"] for document in DASHBOARDS.values()}) == len(DASHBOARDS) == 4


def test_grafana_finds_its_source_and_its_dashboards() -> None:
    compose = yaml.safe_load((HOME / "docker-compose.yml").read_text())
    grafana, prometheus = compose["services"]["grafana"], compose["services"]["prometheus"]
    assert grafana["profiles"] == prometheus["profiles"] == ["monitoring"]
    [source] = yaml.safe_load((FOLDER / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load((FOLDER / "provisioning/dashboards/shoehorn.yml").read_text())["providers"]
    mounts = dict(mount.removesuffix(":ro").split(":", 1) for mount in grafana["volumes"])
    assert mounts["./monitoring/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./monitoring/grafana/provisioning"] == "/etc/grafana/provisioning"
    assert "PASSWORD" not in str(grafana["environment"]).replace("GF_SECURITY_ADMIN_PASSWORD__FILE", "")
    assert all(port.startswith("127.0.0.1:") for port in (*grafana["ports"], *prometheus["ports"]))
    assert any("retention.time" in argument for argument in prometheus["command"])
