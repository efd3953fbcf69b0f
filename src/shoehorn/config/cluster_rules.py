"""Rules for the settings of a cluster: which a role requires, and which contradict it."""

from __future__ import annotations

from collections.abc import Collection

REQUIRED = {"head": ("CLUSTER_NODES", "NODE_ADDRESS", "CLUSTER_SECRET_FILE"),
            "worker": ("HEAD_ADDRESS", "NODE_ADDRESS", "CLUSTER_SECRET_FILE"),
            "front": ("REPLICAS", "CLUSTER_SECRET_FILE")}
"""Settings that a role needs."""

_OF_CLUSTERS = ("CLUSTER_NODES", "HEAD_ADDRESS", "NODE_ADDRESS", "CLUSTER_SECRET_FILE", "CLUSTER_NETWORK")


def contradictions(role: str, head_address: str, node_address: str, names: Collection[str]) -> list[str]:
    """List what is missing or contradicts ROLE, one mistake a line.

    Args:
        names: of the settings that the user set.
    """
    is_replica = "REPLICA_PORT" in names
    mistakes = [f"{name}: missing, but ROLE={role} needs it"
                for name in REQUIRED.get(role, ()) if name not in names]
    if "REPLICAS" in names and role != "front":
        mistakes.append(f"REPLICAS is set, but ROLE={role}; set ROLE=front, or unset REPLICAS")
    if is_replica and role in ("front", "worker"):
        mistakes.append(f"REPLICA_PORT is set, but ROLE={role}; only single and head serve a front: unset REPLICA_PORT")
    if is_replica and "CLUSTER_SECRET_FILE" not in names and role == "single":
        mistakes.append("CLUSTER_SECRET_FILE: missing, but REPLICA_PORT needs it")
    if role in ("single", "front"):
        allowed = {"CLUSTER_SECRET_FILE"} if is_replica or role == "front" else set()
        mistakes += [f"{name} is set, but ROLE={role}; set ROLE=head or ROLE=worker, or unset {name}"
                     for name in _OF_CLUSTERS if name in names and name not in allowed]
    if role == "worker" and head_address and head_address == node_address:
        mistakes.append(f"HEAD_ADDRESS and NODE_ADDRESS are both {node_address}; NODE_ADDRESS is this "
                        "worker's own address")
    return mistakes
