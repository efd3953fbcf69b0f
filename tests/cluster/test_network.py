"""Networks of a node: its address is its own, and clients have another network."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoehorn.cluster import network
from shoehorn.common.errors import SettingsError
from shoehorn.config.settings import load

ONE = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"]}
TWO = {**ONE, "eth1": ["192.168.1.7"]}


def check(addresses: dict[str, list[str]], route: str, **settings: str) -> None:
    """Check a head with 10.0.0.1."""
    network.require_isolated(load({"ROLE": "head", "CLUSTER_NODES": "2", "NODE_ADDRESS": "10.0.0.1",
                                   "CLUSTER_SECRET_FILE": "/s", **settings}), addresses, route)


def worker(addresses: dict[str, list[str]], route: str) -> None:
    """Check a worker with 10.0.0.1."""
    network.require_isolated(load({"ROLE": "worker", "HEAD_ADDRESS": "10.0.0.9", "NODE_ADDRESS": "10.0.0.1",
                                   "CLUSTER_SECRET_FILE": "/s"}), addresses, route)


def test_network_of_its_own_is_accepted() -> None:
    check(TWO, "eth1")
    check(TWO, "")
    worker(ONE, "")


@pytest.mark.parametrize(("addresses", "route"), [(ONE, "eth0"), (TWO, "eth0"), (ONE, "")])
def test_network_of_clients_is_refused_unless_it_is_trusted(addresses: dict[str, list[str]], route: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check(addresses, route)
    assert caught.value.code == "cluster_network_shared"
    assert "CLUSTER_NETWORK=trusted" in caught.value.remedy
    check(addresses, route, CLUSTER_NETWORK="trusted")


def test_worker_in_the_network_of_its_default_route_is_refused() -> None:
    with pytest.raises(SettingsError):
        worker(TWO, "eth0")


def test_address_of_another_machine_is_refused_with_the_own_ones() -> None:
    with pytest.raises(SettingsError) as caught:
        check({"lo": ["127.0.0.1"], "eth0": ["10.0.0.5"]}, "", CLUSTER_NETWORK="trusted")
    assert caught.value.code == "unknown_node_address"
    assert "10.0.0.5" in caught.value.cause
    assert "127.0.0.1" not in caught.value.cause


def test_interface_of_the_default_route_is_read(tmp_path: Path) -> None:
    table = tmp_path / "route"
    head = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
    table.write_text(head + "eth0\t0000000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
                     "wlan0\t00000000\t0100000A\t0003\t0\t0\t600\t00000000\t0\t0\t0\n"
                     "eth1\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n")
    assert network.default_route(table) == "eth1"
    table.write_text(head)
    assert network.default_route(table) == ""
    assert network.default_route(tmp_path / "none") == ""
    assert "lo" in network.interfaces()
