"""Headers between the front's program, HAProxy and the replicas; no client can send or see them."""

from __future__ import annotations

AFFINITY_HEADER = "X-Shoehorn-Affinity"
"""Of a request: the digest by which HAProxy chooses a replica."""

REPLICA_HEADER = "X-Shoehorn-Replica"
"""Of a request: the server name of the one replica that may get it; of an answer: the one that sent it."""
