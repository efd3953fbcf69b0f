"""The compose files: settings, GPUs, privileges, and time to pull and to drain."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoehorn.config.other_variables import COMPOSE, INSIDE_ONLY, PASSED
from shoehorn.config.secrets import is_secret
from shoehorn.config.settings import TABLE
from shoehorn.engine.environment import BOUNDS, SWITCHES
from shoehorn.engine.restart_budget import LIMIT
from shoehorn.engine.timing import Timing
from shoehorn.runtime import shutdown
from shoehorn_vllm import protocol

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = {setting.name: setting.default for setting in TABLE}
RESET = object()
IMPORTED = {"MAX_REQUESTS_VARIABLE": {protocol.MAX_REQUESTS_VARIABLE},
            "MEMORY_DIR_VARIABLE": {protocol.MEMORY_DIR_VARIABLE}}
"""Constants of other modules that name a variable."""


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


def test_settings_and_variables_are_passed_on(gpu: dict[str, Any]) -> None:
    names = {setting.name for setting in TABLE} - INSIDE_ONLY
    names |= {f"{setting.name}_FILE" for setting in TABLE if setting.secret}
    names |= {variable.name for variable in PASSED}
    passed = {re.sub(r"\w+\$\{(\w+):\+_proxy\}", r"\1", entry, flags=re.IGNORECASE)
              for entry in gpu["environment"] if "=" not in entry}
    assert passed == names
    fixed = dict(entry.split("=", 1) for entry in gpu["environment"] if "=" in entry)
    assert fixed.pop("PUBLISHED_ADDRESS") == gpu["ports"][0].removesuffix(":6333")
    assert fixed == {name: DEFAULTS[name] for name in ("PORT", "METRICS_PORT")}
    assert gpu["env_file"] == [{"path": "${SHOEHORN_ENV_FILE:-.env}", "required": False}]


def test_table_lists_the_variables_that_the_code_reads() -> None:
    known = {setting.name for setting in TABLE} | {variable.name for variable in PASSED}
    read = {name: str(path) for path in (*sorted((ROOT / "src").rglob("*.py")), ROOT / "healthcheck" / "healthcheck.py")
            for name in _variables_read(ast.parse(path.read_text(encoding="utf-8")))}
    ours = set(read) - known
    assert {"SHOEHORN_TIMING", "VLLM_HOST_IP", "PORT"} <= set(read)
    own = {"SHOEHORN_OWNER", "SHOEHORN_MOST_REQUESTS", "SHOEHORN_MEMORY_DIR", "SHOEHORN_CPU_COMPUTE"}
    measurements = {"SHOEHORN_CPU_ISA", "SHOEHORN_CPU_THREADS", "SHOEHORN_CPU_SPIN_US", "CC"}
    assert ours == own | measurements, read  # set by its own programs; for builds, tests and measurements


def _variables_read(tree: ast.Module) -> set[str]:
    """Find names that a module looks up in the environment: literals, and constants in capitals."""
    constants = {target.id: {node.value for node in ast.walk(statement.value)
                             if isinstance(node, ast.Constant) and isinstance(node.value, str)}
                 for statement in tree.body if isinstance(statement, ast.Assign)
                 for target in statement.targets if isinstance(target, ast.Name)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args and \
                node.func.attr == "get":
            source, key = node.func.value, node.args[0]
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            source, key = node.value, node.slice
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            source, key = node.comparators[0], node.left
        else:
            continue
        if ast.unparse(source) not in ("environment", "os.environ"):
            continue
        if isinstance(key, ast.Constant):
            names.add(str(key.value))
        elif isinstance(key, ast.Name):
            names |= constants.get(key.id) or IMPORTED.get(key.id, set())
    return names


def test_variables_of_vllm_exist() -> None:
    names = {variable.name for variable in PASSED if variable.name.startswith("VLLM_")}
    specification = importlib.util.find_spec("vllm")
    assert specification is not None
    assert specification.origin is not None
    text = (Path(specification.origin).parent / "envs.py").read_text(encoding="utf-8")
    assert [name for name in sorted(names) if f'"{name}"' not in text] == []
    assert names >= BOUNDS.keys()


def test_no_variable_passed_on_is_a_switch_or_a_secret() -> None:
    names = {variable.name for variable in PASSED}
    assert names.isdisjoint(SWITCHES)
    assert not any(map(is_secret, names))


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
        assert service.keys().isdisjoint({"privileged", "cap_add", "ipc", "pid", "network_mode", "user"})


def test_machine_of_a_cluster_has_the_network_of_its_host_and_no_further_privilege() -> None:
    service = _service("docker-compose.cluster.yml")
    assert service.keys() == {"network_mode", "ports", "environment"}
    assert (service["network_mode"], service["ports"]) == ("host", RESET)
    names = {entry.partition("=")[0] for entry in service["environment"]}
    assert names <= {setting.name for setting in TABLE}
    assert names >= {"ROLE", "NODE_ADDRESS", "CLUSTER_SECRET_FILE"}


def test_table_has_every_variable_of_the_file() -> None:
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    assert dict(re.findall(r"\$\{(\w+):-([^}]*)\}", text)) == {each.name: each.default for each in COMPOSE}


@pytest.mark.parametrize("name", ["MODELS_DIR", "RUN_DIR", "PUBLISHED_ADDRESS"])
def test_example_lacks_what_compose_fixes(name: str) -> None:
    assert f"#{name}=" not in (ROOT / ".env.example").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("docker") is None, reason="needs docker compose")
@pytest.mark.parametrize(("host", "expected"), [
    ({"HTTPS_PROXY": "http://h:1", "no_proxy": "x", "CUDA_VISIBLE_DEVICES": "0"},
     {"HTTPS_PROXY": "http://h:1", "no_proxy": "x", "CUDA_VISIBLE_DEVICES": "0"}), ({}, {})])
def test_environment_of_the_host_is_passed_on(tmp_path: Path, host: dict[str, str], expected: dict[str, str]) -> None:
    """A proxy that is unset is not mentioned, so that Docker's client configuration still applies."""
    command = ["docker", "compose", "--env-file", os.devnull, "-f", str(ROOT / "docker-compose.yml"), "config",
               "--format", "json"]
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "SHOEHORN_ENV_FILE": os.devnull, **host}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60,
                          check=True)
    passed = json.loads(done.stdout)["services"]["shoehorn"]["environment"]
    names = {each.name for each in PASSED}
    assert {name: value for name, value in passed.items() if value and name in names} == expected
    assert {name for name in passed if name.lower().endswith("_proxy")} == {
        name for name in expected if name.lower().endswith("_proxy")}


@pytest.mark.skipif(shutil.which("docker") is None, reason="needs docker compose")
def test_env_file_reaches_the_container_whole(tmp_path: Path) -> None:
    """Compose itself reads the file; the host's environment overrides it."""
    (tmp_path / "own.env").write_text(
        "SHOEHORN_ENV_FILE=own.env\nMODEL_ID=a/b\nMODELID=c/d\nPORT=8000\nBIND=0.0.0.0\nhttps_proxy=http://u:p#w@proxy:1\n"
        "CUDA_VISIBLE_DEVICES=1\nNCCL_UNLISTED=2\nMODELS_VOLUME=/mnt/disk\nHF_TOKEN=from-the-file\n", encoding="utf-8")
    for name in ("docker-compose.yml", "docker-compose.cpu.yml"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    command = ["docker", "compose", "--env-file", "own.env", "-f", "docker-compose.yml", "-f", "docker-compose.cpu.yml",
               "config", "--format", "json"]
    host = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "HF_TOKEN": "host"}
    done = subprocess.run(command, cwd=tmp_path, env=host, capture_output=True, text=True, timeout=60, check=True)
    service = json.loads(done.stdout)["services"]["shoehorn"]
    expected = {"MODEL_ID": "a/b", "MODELID": "c/d", "PORT": "6333", "PUBLISHED_ADDRESS": "0.0.0.0:8000",
                "HF_TOKEN": "host", "https_proxy": "http://u:p#w@proxy:1",
                "CUDA_VISIBLE_DEVICES": "1", "NCCL_UNLISTED": "2"}
    assert {name: service["environment"][name] for name in expected} == expected
    assert service["volumes"][0]["source"] == "/mnt/disk"
    assert (service["ports"][0]["published"], service["ports"][0]["target"]) == ("8000", 6333)
