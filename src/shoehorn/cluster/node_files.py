"""Files of RUN_DIR by which the programs of one node know the cluster: reports, orders, and this node's Ray.

Rules: each file has one writer and is replaced as a whole; a missing or damaged one counts as empty.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoehorn.cluster.report import HeadOrders, NodeReport, RaySession
from shoehorn.common.atomic_file import write_atomic
from shoehorn.runtime.run_dir import RunDir


@dataclass(frozen=True)
class Received:
    """A report and the monotonic time of this machine at which it arrived."""

    report: NodeReport
    at: float


def write_reports(paths: RunDir, reports: Mapping[str, Received]) -> None:
    """Write the latest report of each node, by address. The program `nodes` does."""
    _write(paths.node_reports, {address: {"at": each.at, "report": asdict(each.report)}
                                for address, each in reports.items()})


def read_reports(paths: RunDir) -> dict[str, Received]:
    """Read the latest report of each node, by address."""
    try:
        return {address: Received(NodeReport.from_json(each["report"]), float(each["at"]))
                for address, each in _read(paths.node_reports).items()}
    except (ValueError, TypeError, KeyError):
        return {}


def write_orders(paths: RunDir, orders: HeadOrders) -> None:
    """Write the head's orders. The engine program does, on the head its own, on a worker those it received."""
    _write(paths.head_orders, asdict(orders))


def read_orders(paths: RunDir) -> HeadOrders:
    """Read the head's orders."""
    try:
        return HeadOrders.from_json(_read(paths.head_orders))
    except ValueError:
        return HeadOrders()


def write_ray(paths: RunDir, ray: RaySession) -> None:
    """Write the state of this node's Ray. The program `ray` does."""
    _write(paths.ray_state, asdict(ray))


def read_ray(paths: RunDir) -> RaySession:
    """Read the state of this node's Ray."""
    try:
        return RaySession(**_read(paths.ray_state))
    except TypeError:
        return RaySession()


def _write(path: Path, document: object) -> None:
    write_atomic(path, json.dumps(document) + "\n", 0o600)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
