"""The compose files: settings, GPUs, privileges, and time to pull and to drain."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoehorn.config.settings import TABLE
from shoehorn.engine.restart_budget import LIMIT
from shoehorn.engine.timing import Timing
from shoehorn.runtime import shutdown

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = {setting.name: setting.default for setting in TABLE}
RESET = object()


class _Loader(yaml.SafeLoader):
    """YAML loader with the tags of compose that remove or replace a key of the first file."""


_Loader.add_constructor("!reset", lambda _loader, _node: RESET)
_Loader.add_constructor("!override", lambda loader, node: loader.construct_mapping(node))


def _service(name: str) -> dict[str, Any]:
    with (ROOT / name).open(encoding="utf-8") as file:
        document = yaml.load(file, _Loader)  # noqa: S506  # a SafeLoader with two more tags
    service: dict[str, Any] = document["services"]["shoehorn"]
    return service


@pytest.fixture
def gpu() -> dict[str, Any]:
    return _service("docker-compose.yml")


@pytest.fixture
def cpu() -> dict[str, Any]:
    return _service("docker-compose.cpu.yml")


def _seconds(text: str) -> int:
    match = re.fullmatch(r"(?:\$\{\w+:-)?(\d+)([smh])\}?", text)
    assert match
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def test_all_gpus_are_reserved_except_by_the_cpu_file(gpu: dict[str, Any], cpu: dict[str, Any]) -> None:
    assert gpu["deploy"]["resources"]["reservations"]["devices"] == [
        {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
    assert cpu["deploy"] is RESET
    assert cpu["build"]["args"]["FLAVOUR"] == "cpu"


def test_every_setting_is_passed_on(gpu: dict[str, Any]) -> None:
    inside_only = {"PORT", "METRICS_PORT", "MODELS_DIR", "RUN_DIR"}  # ports are published, folders mounted
    names = {setting.name for setting in TABLE} - inside_only
    names |= {f"{setting.name}_FILE" for setting in TABLE if setting.secret}
    assert set(gpu["environment"]) == names  # without values


def test_there_is_time_to_drain_and_to_pull(gpu: dict[str, Any]) -> None:
    assert _seconds(gpu["stop_grace_period"]) >= int(DEFAULTS["DRAIN_TIMEOUT"]) + 30
    assert _seconds(gpu["healthcheck"]["start_period"]) >= 6 * 3600
    assert "test" not in gpu["healthcheck"]  # the image defines the check


def test_kubernetes_probes_wait_for_a_pull_and_for_an_engine_restart() -> None:
    document = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    block = re.search(r"^( *)startupProbe:.*\n(?:\1\w.*\n|\1 .*\n)+", document, re.MULTILINE)
    assert block
    probes = yaml.safe_load(textwrap.dedent(block[0]))
    assert [probes[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")] == [
        "/livez", "/livez", "/readyz"]  # live during a pull of hours
    assert {probes[name]["httpGet"]["port"] for name in probes if name.endswith("Probe")} == {int(DEFAULTS["PORT"])}
    patience = probes["livenessProbe"]["periodSeconds"] * probes["livenessProbe"]["failureThreshold"]
    assert patience > shutdown.MARGIN_SECONDS + Timing().restart_delay(LIMIT - 1) + 10
    assert probes["terminationGracePeriodSeconds"] >= int(DEFAULTS["DRAIN_TIMEOUT"]) + 30


def test_container_has_no_privileges(gpu: dict[str, Any], cpu: dict[str, Any]) -> None:
    assert gpu["cap_drop"] == ["ALL"]
    assert gpu["security_opt"] == ["no-new-privileges:true"]
    assert gpu["read_only"] is True
    assert gpu["ulimits"]["core"] == 1
    assert all(port.startswith(("${BIND:-127.0.0.1}:", "127.0.0.1:")) for port in gpu["ports"])
    for service in (gpu, cpu):
        assert service.keys().isdisjoint({"privileged", "cap_add", "ipc", "pid", "network_mode", "user", "env_file"})


def test_comment_documents_every_variable_of_the_file() -> None:
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    head = text.partition("\nname:")[0]
    variables = set(re.findall(r"\$\{(\w+):-", text))
    assert set(re.findall(r"^#   ([A-Z_]+) ", head, flags=re.MULTILINE)) == variables
