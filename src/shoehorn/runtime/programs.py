"""Modules that run as programs of their own, `python -m MODULE`: the only place that spells their names."""

from __future__ import annotations

SUPERVISORD = "shoehorn.runtime.supervisord"
EVENT_LISTENER = "shoehorn.runtime.event_listener"
ENGINE = "shoehorn.engine.main"
KEYS = "shoehorn.gateway.service"
FRONT = "shoehorn.front.main"
EXPORTER = "shoehorn.observability.exporter"
NODES = "shoehorn.cluster.service"
RAY = "shoehorn.cluster.ray_program"
CLI = "shoehorn.cli"
VLLM = "vllm.entrypoints.launchers.api_server.entry"
FORK_SERVER = "shoehorn_vllm.fork_server.__main__"
