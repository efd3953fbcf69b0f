"""States of the replicas, from HAProxy's socket of statistics.

Rules: a state is read when it is asked for and never remembered here; without an answer of HAProxy nothing is known.
"""

from __future__ import annotations

import csv
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoehorn.config.replicas import Replica

READY, DRAINING, LOST = "ready", "draining", "lost"
STATES = (READY, DRAINING, LOST)
_LIMIT_SECONDS = 1.0
_BACKEND = "replicas"
_COMMAND = f"show stat {_BACKEND} 4 -1\n"
"""`4`: servers only (HAProxy's management guide, section 9.3)."""


@dataclass(frozen=True)
class ReplicaState:
    """One replica.

    Attributes:
        name: address as configured, without the default port.
        server: HAProxy's name of it.
        state: `ready`; `draining` (alive, gets no new requests); `lost` (no or a wrong answer).
        reason: HAProxy's result of the last check, for people.
        running: requests at this moment.
        requests: requests sent to it since HAProxy started.
        seconds: time in this state.
    """

    name: str
    server: str
    state: str
    reason: str
    running: int
    requests: int
    seconds: int

    def public(self) -> dict[str, Any]:
        """The fields for `/status`."""
        return {name: value for name, value in asdict(self).items() if name in ("name", "state", "reason")}


def read(path: Path, replicas: Sequence[Replica]) -> tuple[ReplicaState, ...] | None:
    """Read the states of all replicas; None if HAProxy does not answer."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_LIMIT_SECONDS)
            connection.connect(str(path))
            connection.sendall(_COMMAND.encode())
            with connection.makefile("r", encoding="utf-8") as file:
                text = file.read()
    except OSError:
        return None
    return parse(text, replicas)


def parse(text: str, replicas: Sequence[Replica]) -> tuple[ReplicaState, ...] | None:
    """Parse HAProxy's table; None if a replica is missing in it."""
    rows = {row["svname"]: row for row in csv.DictReader(text.lstrip("# ").splitlines())}
    try:
        return tuple(_state(replica, f"r{number}", rows[f"r{number}"]) for number, replica in enumerate(replicas, 1))
    except KeyError:
        return None


def _state(replica: Replica, server: str, row: dict[str, str]) -> ReplicaState:
    status = row["status"]
    state = READY if status.startswith("UP") else DRAINING if status.startswith(("NOLB", "DRAIN")) else LOST
    reason = "" if state == READY else " ".join(filter(None, (row["check_status"].lstrip("* "), row["check_code"],
                                                              row["last_chk"])))
    return ReplicaState(replica.name, server, state, reason, int(row["scur"] or 0), int(row["stot"] or 0),
                        int(row["lastchg"] or 0))
