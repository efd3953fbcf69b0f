"""Layout of RUN_DIR: names on disk are fixed, and only one module contains them."""

from __future__ import annotations

import ast
from pathlib import Path

from shoehorn.common.paths import HOME
from shoehorn.runtime.run_dir import RunDir

NAMES = {
    "lock": "lock", "empty": "nothing", "state": "state.json", "ready_mark": "ready", "not_live_mark": "not-live",
    "plan": "plan.json", "welcome": "welcome.txt", "engine_socket": "engine.sock", "engine_config": "vllm.yaml",
    "engine_log": "engine.log", "engine_logging": "engine-logging.json", "engine_memory": "engine-memory",
    "expert_lookups": "engine-memory/experts.json",
    "engine_alive": "engine.alive", "restarts": "restarts.json", "engine_group": "engine.group",
    "admissions": "admissions", "idle_mark": "idle", "wake_request": "wake",
    "fork_server_group": "fork-server.group", "pull_group": "pull.group", "drain_request": "drain",
    "drain_result": "drained.json",
    "cluster": "cluster", "ray_token": "cluster/ray-token",
    "cluster_authority": "cluster/authority.pem", "node_certificate": "cluster/node.pem",
    "node_key": "cluster/node.key", "node_reports": "nodes.json", "head_orders": "orders.json",
    "ray": "ray", "ray_state": "ray.json", "ray_group": "ray.group",
    "supervisord_config": "supervisord.conf", "supervisord_pid": "supervisord.pid", "exit_code": "exit_code",
    "nginx_config": "nginx.conf", "nginx_pid": "nginx.pid", "keys_socket": "keys.sock", "setting_key": "keys.json",
    "balancer_config": "haproxy.cfg", "balancer_socket": "haproxy.sock", "balancer_stats": "haproxy-stats.sock",
    "peer_authority": "peers.pem", "peer_pair": "peer.pem", "leaving_mark": "lame-duck",
    "tls_pair": "tls.pem", "tls_candidate": "tls.pem.candidate",
}
ORDINARY = {"lock", "ready", "drain", "nothing", "keys.json", "exit_code", "idle",
            "ray", "cluster"}
"""Names that mean other things elsewhere: MODELS_DIR has a `keys.json` too."""


def test_names_on_disk_do_not_change() -> None:
    run_dir = RunDir(Path("/run/shoehorn"))
    properties = {name for name, value in vars(RunDir).items() if isinstance(value, property)}
    assert properties == {*NAMES, "groups"}
    assert {name: getattr(run_dir, name) for name in NAMES} == {name: run_dir.path / file
                                                                for name, file in NAMES.items()}
    assert run_dir.unavailable_body("openai").name == "unavailable.json"
    assert run_dir.unavailable_body("anthropic").name == "unavailable.anthropic.json"
    assert run_dir.nginx_temporary("body").name == "nginx-body"
    assert run_dir.token("HF_TOKEN").name == "hf_token"


def test_no_other_module_spells_a_name_of_run_dir() -> None:
    names = set(NAMES.values()) - ORDINARY
    for path in sorted((HOME / "src").rglob("*.py")):
        if path.name == "run_dir.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in names, f"{path}:{node.lineno}"
    template = (HOME / "gateway" / "nginx.conf.j2").read_text(encoding="utf-8")
    assert not [name for name in names if name in template]
