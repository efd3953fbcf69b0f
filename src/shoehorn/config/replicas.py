"""Addresses of the replicas behind a front (REPLICAS)."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

DEFAULT_PORT = 6335
MAX_REPLICAS = 256

_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)*")
_FORM = re.compile(r"(?:\[(?P<six>[0-9a-f:.]+)\]|(?P<host>[a-z0-9.-]+))(?::(?P<port>[0-9]{1,5}))?")


@dataclass(frozen=True)
class Replica:
    """One replica: host name or IP address, and its REPLICA_PORT."""

    host: str
    port: int

    @property
    def is_name(self) -> bool:
        """The host is a name that has to be resolved."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return True
        return False

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"{self._bracketed}:{self.port}"

    @property
    def name(self) -> str:
        """The address without the default port, for people."""
        return self._bracketed if self.port == DEFAULT_PORT else self.address

    @property
    def _bracketed(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def parse(text: str) -> tuple[Replica, ...]:
    """Parse HOST[:PORT], separated by commas or blanks."""
    replicas = tuple(_parse_one(word) for word in text.replace(",", " ").lower().split())
    if not replicas:
        raise ValueError("names no replica; write HOST or HOST:PORT, separated by commas")
    if repeated := sorted({replica.address for replica in replicas if replicas.count(replica) > 1}):
        raise ValueError(f"{repeated[0]} is listed twice")
    if len(replicas) > MAX_REPLICAS:
        raise ValueError(f"{len(replicas)} replicas; at most {MAX_REPLICAS} are supported")
    return replicas


def _parse_one(word: str) -> Replica:
    match = _FORM.fullmatch(word)
    host = (match["six"] or match["host"]) if match else ""
    port = int(match["port"] or DEFAULT_PORT) if match else 0
    if not _is_host(host) or not 0 < port < 65536:
        raise ValueError(f"{word!r} is not HOST or HOST:PORT, for example 10.0.0.2 or gpu1.example.com:6335; write an "
                         "IPv6 address in brackets")
    return Replica(host, port)


def _is_host(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return bool(_NAME.fullmatch(host)) and not re.fullmatch(r"[0-9.]+", host)
    return True
