"""Rules for the settings of a cluster: which a role requires, and which contradict it."""

from __future__ import annotations

from collections.abc import Collection

REQUIRED = {"head": ("CLUSTER_NODES", "NODE_ADDRESS", "CLUSTER_SECRET_FILE"),
            "worker": ("HEAD_ADDRESS", "NODE_ADDRESS", "CLUSTER_SECRET_FILE")}
"""Settings that a role needs."""

_OF_CLUSTERS = ("CLUSTER_NODES", "HEAD_ADDRESS", "NODE_ADDRESS", "CLUSTER_SECRET_FILE", "CLUSTER_NETWORK")


def contradictions(role: str, head_address: str, node_address: str, names: Collection[str]) -> list[str]:
    """List what is missing or contradicts ROLE, one mistake a line.

    Args:
        names: of the settings that the user set.
    """
    if role == "front":
        return ["ROLE=front: unsupported by this version; use single, head or worker"]
    if role == "single":
        return [f"{name} is set, but ROLE=single; set ROLE=head or ROLE=worker, or unset {name}"
                for name in _OF_CLUSTERS if name in names]
    mistakes = [f"{name}: missing, but ROLE={role} needs it"
                for name in REQUIRED[role] if name not in names]
    if role == "worker" and head_address and head_address == node_address:
        mistakes.append(f"HEAD_ADDRESS and NODE_ADDRESS are both {node_address}; NODE_ADDRESS is this "
                        "worker's own address")
    return mistakes
