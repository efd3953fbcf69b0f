"""The compose files: what a GPU host needs, what the settings table knows, and nothing that Docker would ignore."""

from __future__ import annotations

import re
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
    """Knows compose's own tags, which take a key of the first file away or replace it whole."""


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


def test_all_gpus_are_reserved_and_the_cpu_file_takes_that_back(gpu: dict[str, Any], cpu: dict[str, Any]) -> None:
    assert gpu["deploy"]["resources"]["reservations"]["devices"] == [
        {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
    assert cpu["deploy"] is RESET
    assert cpu["build"]["args"]["FLAVOUR"] == "cpu"


def test_every_setting_is_handed_on_and_nothing_else(gpu: dict[str, Any]) -> None:
    inside_only = {"PORT", "METRICS_PORT", "MODELS_DIR", "RUN_DIR"}  # ports are published, folders mounted
    wanted = {setting.name for setting in TABLE} - inside_only
    wanted |= {f"{setting.name}_FILE" for setting in TABLE if setting.secret}
    assert set(gpu["environment"]) == wanted  # names only


def test_the_ports_are_published_on_loopback_unless_told_otherwise(gpu: dict[str, Any]) -> None:
    port, metrics = DEFAULTS["PORT"], DEFAULTS["METRICS_PORT"]
    assert gpu["ports"] == [f"${{BIND:-127.0.0.1}}:${{PORT:-{port}}}:{port}",
                            f"127.0.0.1:${{METRICS_PORT:-{metrics}}}:{metrics}"]


def test_there_is_time_to_drain_and_to_pull(gpu: dict[str, Any]) -> None:
    assert _seconds(gpu["stop_grace_period"]) >= int(DEFAULTS["DRAIN_TIMEOUT"]) + 30
    assert _seconds(gpu["healthcheck"]["start_period"]) >= 6 * 3600
    assert "test" not in gpu["healthcheck"]  # the image says how to check


def test_the_probes_for_kubernetes_wait_for_a_pull_and_outlast_the_appliances_own_restart_of_its_engine() -> None:
    document = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    block = re.search(r"For Kubernetes:\n\n((?:    .*\n)+)", document)
    assert block
    probes = yaml.safe_load(block[1])
    assert [probes[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")] == [
        "/livez", "/livez", "/readyz"]  # live while it pulls, for hours
    assert {probes[name]["httpGet"]["port"] for name in probes if name.endswith("Probe")} == {int(DEFAULTS["PORT"])}
    patience = probes["livenessProbe"]["periodSeconds"] * probes["livenessProbe"]["failureThreshold"]
    assert patience > shutdown.MARGIN_SECONDS + Timing().restart_delay(LIMIT - 1) + 10
    assert probes["terminationGracePeriodSeconds"] >= int(DEFAULTS["DRAIN_TIMEOUT"]) + 30


def test_big_models_get_the_memory_they_need(gpu: dict[str, Any]) -> None:
    assert gpu["ulimits"]["memlock"] == -1
    assert gpu["ulimits"]["nofile"] >= 65536
    assert gpu["shm_size"] == "8gb"


def test_nothing_is_writable_but_what_has_to_be(gpu: dict[str, Any]) -> None:
    assert gpu["read_only"] is True
    assert [entry.split(":")[0] for entry in gpu["tmpfs"]] == ["/tmp", DEFAULTS["RUN_DIR"], "/home/shoehorn"]
    assert "exec" in gpu["tmpfs"][0].split(":")[1].split(",")  # compiled kernels are loaded from there
    assert gpu["volumes"] == ["models:/models", "cache:/var/cache/shoehorn",
                              "${SECRETS_DIR:-./secrets}:/run/secrets:ro"]


def test_no_privilege_is_kept(gpu: dict[str, Any], cpu: dict[str, Any]) -> None:
    assert gpu["cap_drop"] == ["ALL"]
    assert gpu["security_opt"] == ["no-new-privileges:true"]
    assert gpu["ulimits"]["core"] == 1
    for service in (gpu, cpu):
        assert service.keys().isdisjoint({"privileged", "cap_add", "ipc", "pid", "network_mode", "user", "env_file"})


def test_a_refusal_is_not_repeated_for_ever(gpu: dict[str, Any]) -> None:
    assert gpu["restart"] == "${RESTART:-on-failure:3}"


def test_the_cpu_file_changes_only_what_it_must(cpu: dict[str, Any]) -> None:
    assert set(cpu) == {"image", "build", "environment", "deploy", "ulimits"}
    assert cpu["environment"] == ["VRAM_PROFILE=${VRAM_PROFILE:-cpu}"]
    assert cpu["ulimits"] == {"core": 1}


def test_the_comment_names_every_variable_of_this_file() -> None:
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    head = text.partition("\nname:")[0]
    variables = set(re.findall(r"\$\{(\w+):-", text))
    assert set(re.findall(r"^#   ([A-Z_]+) ", head, flags=re.MULTILINE)) == variables
