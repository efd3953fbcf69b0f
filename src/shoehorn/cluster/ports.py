"""TCP ports of a node. They are fixed, so that a firewall or a NetworkPolicy can name them."""

from __future__ import annotations

GCS = 6379
NODE_MANAGER = 6380
OBJECT_MANAGER = 6381
RUNTIME_ENV_AGENT = 6382
AGENT_GRPC = 6383
AGENT_HTTP = 6384
RAY_METRICS = 6385
RAY_CLIENT = 6386
REPORTS = 6387
"""Service of the head that receives the reports of the other nodes."""

RAY_WORKERS = range(6400, 6500)
EPHEMERAL = range(40000, 41000)
"""Range of the ports of gloo, NCCL and ZMQ, which take any free one: `net.ipv4.ip_local_port_range` of the node."""

FIXED = frozenset({GCS, NODE_MANAGER, OBJECT_MANAGER, RUNTIME_ENV_AGENT, AGENT_GRPC, AGENT_HTTP, RAY_METRICS,
                   RAY_CLIENT, REPORTS})
"""Ports of Ray and of the reports."""
