"""Command line and environment of Ray on a node.

Rules:
- token and TLS from the secret of the cluster, no dashboard, no usage statistics, fixed ports, a bounded object store,
  and everything that Ray writes in RUN_DIR;
- a lost node is noticed after 14 s (Ray's default: 64 s), a lost head by its workers after 30 s;
- the environment is an allow-list of what belongs to the machine: vLLM's worker processes inherit it, and everything
  else comes from the head, so that no node has options of its own.
Source: ray 2.60.0, scripts/scripts.py and src/ray/common/ray_config_def.h.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from shoehorn.cluster import ports
from shoehorn.common.units import MIB
from shoehorn.runtime.run_dir import RunDir
from shoehorn_vllm.protocol import MEMORY_DIR_VARIABLE

JOINED = "Ray runtime started."
"""Line of `ray start` after it has joined."""

_OBJECT_STORE_BYTES = 100 * MIB
_LOG_BYTES = 8 * MIB

_NAMES = frozenset({"PATH", "HOME", "LANG", "TZ", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS",
                    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"})
_PREFIXES = ("LC_", "XDG_", "NVIDIA_", "NCCL_", "UCX_")


def of_machine(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that belong to the machine."""
    return {name: value for name, value in environment.items() if name in _NAMES or name.startswith(_PREFIXES)}


def network_variables(address: str, interface: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that keep the engine's traffic in the cluster's network; NCCL's own settings win."""
    return {"VLLM_HOST_IP": address, "GLOO_SOCKET_IFNAME": interface,
            "NCCL_SOCKET_IFNAME": environment.get("NCCL_SOCKET_IFNAME") or interface}


def credentials(paths: RunDir) -> dict[str, str]:
    """Return Ray's variables for token and TLS: names of files, no secret."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(paths.ray_token), "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_CERT": str(paths.node_certificate), "RAY_TLS_SERVER_KEY": str(paths.node_key),
            "RAY_TLS_CA_CERT": str(paths.cluster_authority), "RAY_USAGE_STATS_ENABLED": "0"}


def ray_environment(environment: Mapping[str, str], address: str, interface: str, paths: RunDir) -> dict[str, str]:
    """Return the environment of Ray and, through it, of vLLM's workers on this node."""
    return {
        **of_machine(environment), **network_variables(address, interface, environment), **credentials(paths),
        "RAY_health_check_initial_delay_ms": "2000", "RAY_health_check_period_ms": "2000",
        "RAY_health_check_timeout_ms": "4000", "RAY_health_check_failure_threshold": "3",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "30",
        "RAY_memory_monitor_refresh_ms": "0",  # it kills workers near full memory, which the plan uses
        "RAY_ROTATION_MAX_BYTES": str(_LOG_BYTES), "RAY_ROTATION_BACKUP_COUNT": "1",
        "VLLM_LOGGING_CONFIG_PATH": str(paths.engine_logging), MEMORY_DIR_VARIABLE: str(paths.engine_memory),
        "PYTHONUNBUFFERED": "1",
    }


def ray_arguments(address: str, head_address: str, places: int, paths: RunDir) -> list[str]:
    """Return the command line.

    Args:
        head_address: "" on the head.
        places: worker processes of the engine on this node: its GPUs.
    """
    role = [f"--address={head_address}:{ports.GCS}"] if head_address else [
        "--head", f"--port={ports.GCS}", "--include-dashboard=false", "--no-monitor",
        f"--ray-client-server-port={ports.RAY_CLIENT}"]
    return [
        str(Path(sys.executable).with_name("ray")), "start", *role, f"--node-ip-address={address}",
        f"--node-manager-port={ports.NODE_MANAGER}", f"--object-manager-port={ports.OBJECT_MANAGER}",
        f"--min-worker-port={ports.RAY_WORKERS[0]}", f"--max-worker-port={ports.RAY_WORKERS[-1]}",
        f"--runtime-env-agent-port={ports.RUNTIME_ENV_AGENT}", f"--dashboard-agent-grpc-port={ports.AGENT_GRPC}",
        f"--dashboard-agent-listen-port={ports.AGENT_HTTP}", f"--metrics-export-port={ports.RAY_METRICS}",
        "--num-cpus=1", f"--num-gpus={places}", f"--object-store-memory={_OBJECT_STORE_BYTES}",
        f"--temp-dir={paths.ray}", "--disable-usage-stats", "--log-style=record", "--block"]
