"""Settings of a cluster: addresses, what a role requires, and what contradicts it."""

from __future__ import annotations

import pytest

from shoehorn.common.errors import SettingsError
from shoehorn.config.settings import load

HEAD = {"ROLE": "head", "CLUSTER_NODES": "2", "NODE_ADDRESS": "10.77.0.1",
        "CLUSTER_SECRET_FILE": "/run/secrets/cluster"}
WORKER = {"ROLE": "worker", "HEAD_ADDRESS": "10.77.0.1", "NODE_ADDRESS": "10.77.0.2",
          "CLUSTER_SECRET_FILE": "/run/secrets/cluster"}


def mistakes(environment: dict[str, str]) -> list[str]:
    """Return the mistakes that the settings are refused for."""
    with pytest.raises(SettingsError) as caught:
        load(environment)
    return caught.value.cause.splitlines()


def test_roles_accept_what_they_need() -> None:
    assert load({}).role == "single"
    assert load(HEAD).cluster_nodes == 2
    assert load(WORKER).head_address == "10.77.0.1"
    assert load({**WORKER, "HEAD_ADDRESS": "shoehorn-0.group.default.svc", "CLUSTER_NODES": "2"}).role == "worker"


@pytest.mark.parametrize("role", [HEAD, WORKER])
def test_missing_setting_of_a_role_is_named(role: dict[str, str]) -> None:
    needed = role.keys() - {"ROLE"}
    assert {line.split(":")[0] for line in mistakes({"ROLE": role["ROLE"]})} == needed


@pytest.mark.parametrize("name", ["CLUSTER_NODES", "HEAD_ADDRESS", "NODE_ADDRESS", "CLUSTER_SECRET_FILE",
                                  "CLUSTER_NETWORK"])
def test_setting_of_a_cluster_without_a_role_is_refused(name: str) -> None:
    assert mistakes({name: {**HEAD, **WORKER, "CLUSTER_NETWORK": "trusted"}[name]}) == [
        f"{name} is set, but ROLE=single; set ROLE=head or ROLE=worker, or unset {name}"]


def test_worker_names_another_machine_as_its_head() -> None:
    assert "own address" in mistakes({**WORKER, "HEAD_ADDRESS": "10.77.0.2"})[0]


@pytest.mark.parametrize(("address", "words"), [
    ("8.8.8.8", "public address"), ("127.0.0.1", "other machines"), ("0.0.0.0", "other machines"),
    ("224.0.0.1", "public address"), ("240.0.0.1", "other machines"), ("fd00::1", "not an IPv4"),
    ("node1", "not an IPv4"), ("10.0.0.256", "not an IPv4")])
def test_unusable_address_of_a_node_is_refused(address: str, words: str) -> None:
    line, = mistakes({**HEAD, "NODE_ADDRESS": address})
    assert line.startswith("NODE_ADDRESS: ")
    assert words in line


@pytest.mark.parametrize("address", ["10.0.0.1", "172.16.3.4", "192.168.1.2", "100.64.0.7", "169.254.10.1"])
def test_addresses_of_private_networks_are_accepted(address: str) -> None:
    assert load({**HEAD, "NODE_ADDRESS": address}).node_address == address


@pytest.mark.parametrize("address", ["http://head", "head:6379", "-head", "8.8.8.8", "10.0.0", "head_1"])
def test_invalid_address_of_the_head_is_refused(address: str) -> None:
    assert mistakes({**WORKER, "HEAD_ADDRESS": address})[0].startswith("HEAD_ADDRESS: ")


@pytest.mark.parametrize(("name", "value"), [("ROLE", "leader"), ("CLUSTER_NODES", "1"), ("CLUSTER_NODES", "two"),
                                             ("CLUSTER_NETWORK", "open")])
def test_invalid_value_is_refused(name: str, value: str) -> None:
    assert mistakes({**HEAD, name: value})[0].startswith(f"{name}: ")
