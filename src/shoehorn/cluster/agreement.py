"""Agreement of the nodes before the engine starts, and what ends it.

Rules: an engine whose nodes have different weights or versions answers wrong text with status 200 (observed with vLLM
0.32.0), so it is not started before all nodes report the same; every obstacle names the node and what differs. Pure
functions of the reports.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from shoehorn.cluster.node_files import Received
from shoehorn.cluster.report import SILENCE_SECONDS, NodeReport, RaySession

Gpus = tuple[tuple[str, int], ...]


def present(reports: Mapping[str, Received], now: float) -> dict[str, NodeReport]:
    """Return the reports of the nodes that are not lost, by address."""
    return {address: each.report for address, each in sorted(reports.items()) if now - each.at <= SILENCE_SECONDS}


def missing(own: NodeReport, reports: Mapping[str, Received], nodes: int, now: float) -> list[str]:
    """List obstacles to a plan: missing, failed or superfluous nodes, and other versions.

    Args:
        own: the head's report.
        reports: of the other nodes.
        nodes: that are expected, the head included.
        now: monotonic seconds.
    """
    here = present(reports, now)
    obstacles = [f"{address}: no report for {now - each.at:.0f} s" for address, each in sorted(reports.items())
                 if address not in here]
    lacking = nodes - 1 - len(here)
    if lacking > 0:
        still = f"{lacking} of {nodes} nodes missing"
        obstacles = [f"{still} ({'; '.join(obstacles)})" if obstacles else
                     f"{still}; start it with ROLE=worker HEAD_ADDRESS={own.address}"]
    elif lacking < 0:
        obstacles = [f"{len(here) + 1} nodes, but CLUSTER_NODES={nodes}: {', '.join([own.address, *here])}"]
    else:
        obstacles = []
    obstacles += [f"{address}: failed: {report.cause}" for address, report in here.items() if report.cause]
    return obstacles + [
        f"{address}: {name} {report.versions.get(name, 'none')}, but {version} on {own.address}"
        for address, report in here.items() for name, version in own.versions.items()
        if report.versions.get(name) != version]


def gpus_of(report: NodeReport) -> Gpus:
    """Return name and bytes of each GPU of a node."""
    return tuple((str(gpu["name"]), int(gpu["total_bytes"])) for gpu in report.hardware.get("gpus", ()))


def differences(own: NodeReport, here: Mapping[str, NodeReport], planned: Collection[Gpus]) -> list[str]:
    """List obstacles to a start of the planned engine: incomplete or other weights, another folder, Ray not joined.

    Args:
        planned: GPUs of each node that the plan counts on.
    """
    obstacles = []
    for address, report in here.items():
        if not report.digest:
            obstacles.append(f"{address}: {report.detail or 'fetching the model'}")
        elif report.digest != own.digest:
            obstacles.append(f"{address}: model differs (files {report.digest[:12]}, but {own.digest[:12]} on "
                             f"{own.address}); verify both with: shoehorn pull --verify")
        elif report.path != own.path:
            obstacles.append(f"{address}: model in {report.path}, but in {own.path} on {own.address}; mount it at the "
                             "same path")
        elif gpus_of(report) not in planned:
            obstacles.append(f"{address}: came back with other GPUs; restart the head, which plans again")
        elif report.ray.session != own.ray.session or not report.ray.session:
            obstacles.append(f"{address}: joining Ray")
    if not own.ray.session:
        obstacles.append(f"{own.address}: starting Ray")
    return obstacles


def loss(start: Mapping[str, RaySession], reports: Mapping[str, Received], own: RaySession, address: str,
         now: float) -> str:
    """Return which node was lost since the engine's start and why; "" if none.

    Args:
        start: Ray of each node at the engine's start, by address, the head's included.
        own: Ray of the head now; address: of the head.
    """
    for node, ray in start.items():
        if node == address:
            if own.instance != ray.instance:
                return f"{node}: Ray was restarted"
            continue
        received = reports.get(node)
        if received is None or now - received.at > SILENCE_SECONDS:
            return f"{node}: no report for {now - received.at:.0f} s" if received else f"{node}: no report"
        if received.report.cause:
            return f"{node}: failed: {received.report.cause}"
        if received.report.ray.instance != ray.instance:
            return f"{node}: Ray was restarted"
    return ""
