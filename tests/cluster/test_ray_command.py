"""Ray's command line and environment, and the environment that reaches the other nodes."""

from __future__ import annotations

from pathlib import Path

from shoehorn.cluster import ports, ray_command
from shoehorn.engine.environment import engine_environment, for_cluster
from shoehorn.runtime.run_dir import RunDir

PATHS = RunDir(Path("/run/shoehorn"))
CONTAINER = {
    "PATH": "/usr/bin", "HOME": "/home/shoehorn", "NCCL_DEBUG": "WARN", "CUDA_VISIBLE_DEVICES": "0",
    "LC_ALL": "C.UTF-8", "API_KEY": "canary", "CLUSTER_SECRET_FILE": "/run/secrets/cluster", "HF_TOKEN": "canary",
    "AWS_SECRET": "canary",
    "MY_LICENCE": "canary", "HTTPS_PROXY": "http://user:canary@proxy", "VLLM_EXTRA_ARGS": "--max-num-seqs 2",
    "VLLM_PP_LAYER_PARTITION": "1,2", "LD_LIBRARY_PATH": "/usr/local/cuda", "MODEL_ID": "a/b"}


def test_only_variables_of_the_machine_reach_ray() -> None:
    environment = ray_command.ray_environment(CONTAINER, "10.0.0.2", "eth1", PATHS)
    assert not any("canary" in value for value in environment.values())
    own = {name: value for name, value in environment.items() if name in CONTAINER}
    assert own == {name: CONTAINER[name] for name in (
        "PATH", "HOME", "NCCL_DEBUG", "CUDA_VISIBLE_DEVICES", "LC_ALL", "LD_LIBRARY_PATH")}
    assert environment["VLLM_HOST_IP"] == "10.0.0.2"
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "eth1"
    assert (environment["RAY_AUTH_MODE"], environment["RAY_USE_TLS"]) == ("token", "1")


def test_interface_of_nccl_may_be_another_one() -> None:
    environment = ray_command.ray_environment({"NCCL_SOCKET_IFNAME": "ib0"}, "10.0.0.2", "eth1", PATHS)
    assert (environment["NCCL_SOCKET_IFNAME"], environment["GLOO_SOCKET_IFNAME"]) == ("ib0", "eth1")


def test_only_listed_variables_of_the_engine_reach_other_nodes() -> None:
    environment = for_cluster(engine_environment(CONTAINER, {"VLLM_PP_LAYER_PARTITION": "2,2"}, Path("/run/shoehorn")))
    assert not any("canary" in value for value in environment.values())
    assert environment["VLLM_PP_LAYER_PARTITION"] == "2,2"
    assert environment.keys() & {"API_KEY", "MY_LICENCE", "HTTPS_PROXY", "MODEL_ID", "CLUSTER_SECRET_FILE"} == set()


def test_all_ports_are_fixed_and_the_dashboard_is_off() -> None:
    head = ray_command.ray_arguments("10.0.0.1", "", 2, PATHS)
    worker = ray_command.ray_arguments("10.0.0.2", "10.0.0.1", 1, PATHS)
    assert {"--head", "--include-dashboard=false", "--no-monitor", "--num-gpus=2", "--block",
            "--temp-dir=/run/shoehorn/ray"} <= set(head)
    assert {"--address=10.0.0.1:6379", "--node-ip-address=10.0.0.2", "--num-gpus=1"} <= set(worker)
    for words in (head, worker):
        named = {int(word.partition("=")[2]) for word in words if "-port=" in word}
        assert named <= ports.FIXED | set(ports.RAY_WORKERS)
    assert not any("canary" in word or "token" in word for word in head)
