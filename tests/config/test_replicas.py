"""REPLICAS and REPLICA_PORT: addresses, roles and contradictions."""

from __future__ import annotations

import pytest

from shoehorn.common.errors import SettingsError
from shoehorn.config.replicas import MAX_REPLICAS, Replica, parse
from shoehorn.config.settings import load

FRONT = {"ROLE": "front", "REPLICAS": "gpu1", "CLUSTER_SECRET_FILE": "/run/secrets/cluster"}
REPLICA = {"REPLICA_PORT": "6335", "CLUSTER_SECRET_FILE": "/run/secrets/cluster"}


def test_addresses() -> None:
    replicas = parse("10.0.0.2, GPU-1.example.com:7000 [fd00::2]\n[fd00::3]:7001")
    assert replicas == (Replica("10.0.0.2", 6335), Replica("gpu-1.example.com", 7000), Replica("fd00::2", 6335),
                        Replica("fd00::3", 7001))
    assert [each.address for each in replicas] == [
        "10.0.0.2:6335", "gpu-1.example.com:7000", "[fd00::2]:6335", "[fd00::3]:7001"]
    assert [each.name for each in replicas] == ["10.0.0.2", "gpu-1.example.com:7000", "[fd00::2]", "[fd00::3]:7001"]
    assert [each.is_name for each in replicas] == [False, True, False, False]


@pytest.mark.parametrize("text", [
    "http://gpu1", "gpu1:", "gpu1:0", "gpu1:65536", "gpu_1", "-gpu", "a..b", "10.0.0.256", "10.0.0", "fd00::2",
    "[fd00::2", "[gpu1]", "gpu1 if TRUE;x", "gpu1#x", ",", "gpu1,gpu1:6335", "a" * 64, "gpu1:6335:6335", "gpu1\"",
    ",".join(f"gpu{number}" for number in range(MAX_REPLICAS + 1))])
def test_invalid_addresses_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse(text)


@pytest.mark.parametrize(("settings", "named"), [
    ({**FRONT, "REPLICAS": ""}, "REPLICAS"), ({**FRONT, "CLUSTER_SECRET_FILE": ""}, "CLUSTER_SECRET_FILE"),
    ({**FRONT, "REPLICA_PORT": "6335"}, "REPLICA_PORT"), ({**FRONT, "CLUSTER_NODES": "2"}, "CLUSTER_NODES"),
    ({"REPLICAS": "gpu1"}, "REPLICAS"), ({"REPLICA_PORT": "6335"}, "CLUSTER_SECRET_FILE"),
    ({"CLUSTER_SECRET_FILE": "/x"}, "CLUSTER_SECRET_FILE"), ({**REPLICA, "IDLE_STOP": "30m"}, "IDLE_STOP"),
    ({**REPLICA, "REPLICA_PORT": "6333"}, "PORT"), ({**REPLICA, "REPLICA_PORT": "6334"}, "METRICS_PORT"),
    ({"ROLE": "worker", "HEAD_ADDRESS": "10.0.0.2", "NODE_ADDRESS": "10.0.0.3", **REPLICA}, "REPLICA_PORT")])
def test_contradictions_are_named(settings: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(settings)
    assert named in str(caught.value)


@pytest.mark.parametrize("settings", [FRONT, REPLICA, {
    "ROLE": "head", "CLUSTER_NODES": "2", "NODE_ADDRESS": "10.0.0.2", **REPLICA}])
def test_roles_of_replicas_are_valid(settings: dict[str, str]) -> None:
    assert load(settings).cluster_secret_file
