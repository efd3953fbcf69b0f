"""Networks of a node: the one of the cluster, and the one of clients.

Rules: what Ray, NCCL, gloo and ZMQ exchange in the cluster's network includes prompts, and any other host in it can run
code on the nodes (SECURITY.md). So the start is refused where clients share that network, unless
CLUSTER_NETWORK=trusted.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from shoehorn.common.errors import SettingsError
from shoehorn.config.settings import Settings

_LOOPBACK = "lo"
_NO_DESTINATION = "00000000"


def interfaces() -> dict[str, list[str]]:
    """Return the IPv4 addresses of each interface of this network namespace."""
    return {name: [each.address for each in addresses if each.family is socket.AF_INET]
            for name, addresses in psutil.net_if_addrs().items()}


def default_route(table: Path = Path("/proc/net/route")) -> str:
    """Return the interface of the default route; "" without one."""
    try:
        rows = [line.split() for line in table.read_text(encoding="utf-8").splitlines()[1:]]
    except OSError:
        return ""
    routes = [(int(row[6]), row[0]) for row in rows if row[1] == _NO_DESTINATION and row[7] == _NO_DESTINATION]
    return min(routes, default=(0, ""))[1]


def interface_of(address: str, addresses: Mapping[str, Sequence[str]]) -> str:
    """Return the interface that has NODE_ADDRESS.

    Raises:
        SettingsError: none has it.
    """
    for name, own in addresses.items():
        if address in own:
            return name
    known = ", ".join(each for name, own in addresses.items() if name != _LOOPBACK for each in own) or "none"
    raise SettingsError(f"NODE_ADDRESS={address}: not an address of this machine, which has: {known}.",
                        "Set NODE_ADDRESS to the one in the cluster's network. A container has the machine's addresses "
                        "with docker-compose.cluster.yml, or docker run --network host.", code="unknown_node_address")


def require_isolated(settings: Settings, addresses: Mapping[str, Sequence[str]], route: str) -> None:
    """Check that clients do not share the cluster's network.

    Args:
        addresses: of each interface; route: interface of the default route.

    Raises:
        SettingsError: they share it, or NODE_ADDRESS is unknown here.
    """
    interface = interface_of(settings.node_address, addresses)
    if settings.cluster_network == "trusted":
        return
    others = [name for name, own in addresses.items() if own and name not in (_LOOPBACK, interface)]
    if interface == route or (settings.role == "head" and not others):
        raise SettingsError(
            f"NODE_ADDRESS={settings.node_address}: its network ({interface}) is also that of clients. Between nodes "
            "prompts travel unencrypted, and any host in that network can run code on the nodes.",
            "Connect the nodes by a network of their own (a second network, a VLAN, WireGuard) and set NODE_ADDRESS to "
            "the address there; or set CLUSTER_NETWORK=trusted if you trust everybody in this network.",
            code="cluster_network_shared")
