"""Agreement before the start, losses and rejoins, with real Ray on two machines. The stand-in takes the place of vLLM.

The tests are steps: each continues with the machines of the one before.
"""

from __future__ import annotations

import json
import shutil
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from shoehorn.cluster import ports, report
from shoehorn.common.errors import EXIT_BAD_SETTINGS
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase
from support.clients import BackgroundRequest, chat
from support.machines import Machine, Network, title
from support.running import DEMO_MODEL, STANDIN_ENGINE, standin
from support.waiting import wait_until

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def machines(network: Network) -> Iterator[dict[int, Machine]]:
    """Keep the machines that run, by number; the head runs all the time."""
    running = {1: Machine(network, 1, **standin())}
    yield running
    for each in running.values():
        each.discard()


@pytest.fixture(scope="module")
def changed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the demo model with one changed number of its last tensor."""
    folder = tmp_path_factory.mktemp("changed") / "model"
    shutil.copytree(DEMO_MODEL, folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    length, = struct.unpack("<Q", data[:8])
    assert json.loads(data[8:8 + length])
    data[-1] ^= 1
    weights.write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def other_versions(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a search path on which torch has another version."""
    folder = tmp_path_factory.mktemp("versions")
    (folder / "torch-9.9.dist-info").mkdir()
    (folder / "torch-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    return f"{folder}:{STANDIN_ENGINE}"


def start_worker(machines: dict[int, Machine], network: Network, *mounts: tuple[Path, Path],
                 **settings: str) -> Machine:
    """Start the second machine, in the place of the one before."""
    if 2 in machines:
        machines.pop(2).discard()
    machines[2] = Machine(network, 2, mounts=mounts, **{**standin(), **settings})
    return machines[2]


def is_loaded(machine: Machine) -> bool:
    """Return True if an engine was ever started."""
    return "all nodes agree" in machine.output


def test_exposed_secret_is_refused(network: Network) -> None:
    secret = network.folder / "exposed"
    secret.write_text("x" * 64)
    secret.chmod(0o644)
    machine = Machine(network, 2, CLUSTER_SECRET_FILE=str(secret), **standin())
    try:
        assert machine.wait(30) == EXIT_BAD_SETTINGS
        assert "chmod" in machine.output
    finally:
        machine.discard()


def test_network_of_clients_is_refused(network: Network) -> None:
    machine = Machine(network, 1, CLUSTER_NETWORK="isolated", RUN_DIR=str(network.folder / "refused"), **standin())
    try:
        assert machine.wait(30) == EXIT_BAD_SETTINGS
        assert "CLUSTER_NETWORK=trusted" in machine.output
    finally:
        machine.discard()


@pytest.mark.fault("A node of a cluster is missing, has other weights or another version",
                   "The engine is not started; phase `waiting`, which names the node and the difference.")
def test_head_waits_for_a_missing_node(machines: dict[int, Machine]) -> None:
    machines[1].wait_for_detail("1 of 2 nodes missing")


def test_node_with_one_changed_tensor_never_serves(machines: dict[int, Machine], network: Network,
                                                   changed_model: Path) -> None:
    worker = start_worker(machines, network, (changed_model, DEMO_MODEL))
    machines[1].wait_for_detail(f"{worker.address}: model differs")
    assert not is_loaded(machines[1])


def test_node_with_another_version_never_serves(machines: dict[int, Machine], network: Network,
                                                other_versions: str) -> None:
    worker = start_worker(machines, network, PYTHONPATH=other_versions)
    machines[1].wait_for_detail(f"{worker.address}: torch 9.9, but ")
    assert not is_loaded(machines[1])


def test_equal_node_that_comes_late_makes_the_head_ready(machines: dict[int, Machine], network: Network) -> None:
    worker = start_worker(machines, network)
    machines[1].wait_for(Phase.READY)
    assert chat(machines[1]).status_code == 200
    assert worker.phase is Phase.WAITING
    assert chat(worker).status_code in (401, 503)


def status_of_ray(machine: Machine, credentials: grpc.ChannelCredentials | None, token: str = "") -> grpc.StatusCode:
    """Ask Ray on the head for its nodes, as another host of the network; return the status."""
    address = f"{machine.address}:{ports.GCS}"
    with grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address) as channel:
        try:
            gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetAllNodeInfo(
                gcs_service_pb2.GetAllNodeInfoRequest(), timeout=20,
                metadata=[("authorization", f"Bearer {token}")] if token else [])
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK


def test_host_of_the_network_without_the_secret_is_refused(machines: dict[int, Machine]) -> None:
    paths, head = RunDir(machines[2].run_dir), machines[1]
    authority, pair = paths.cluster_authority.read_bytes(), paths.node_key.read_bytes()
    node = grpc.ssl_channel_credentials(authority, pair, pair)
    assert status_of_ray(head, node, paths.ray_token.read_text()) is grpc.StatusCode.OK
    assert status_of_ray(head, node) is grpc.StatusCode.UNAUTHENTICATED
    assert status_of_ray(head, node, "0" * 64) is grpc.StatusCode.UNAUTHENTICATED
    assert status_of_ray(head, grpc.ssl_channel_credentials(authority)) is grpc.StatusCode.UNAVAILABLE
    assert status_of_ray(head, None) is grpc.StatusCode.UNAVAILABLE
    stranger = ssl.create_default_context(cafile=str(paths.cluster_authority))
    with pytest.raises(httpx.TransportError):
        httpx.post(f"https://{head.address}:{ports.REPORTS}{report.PATH}", content="{}", verify=stranger)


@pytest.mark.fault("The network of a node is cut",
                   "Detected after 10 s; streams end with an error event, `/v1/*` answers 503 with phase `waiting` and "
                   "the name of the node; served again when the network is back.")
def test_cut_network_is_detected_and_repaired(machines: dict[int, Machine], network: Network) -> None:
    head, worker = machines[1], machines[2]
    streams = [BackgroundRequest(head, path) for path in ("/v1/chat/completions", "/v1/messages")]
    for stream in streams:
        assert stream.has_headers.wait(60)
    network.cut(2)
    try:
        head.wait_for_detail(worker.address)
        for stream in streams:
            stream.assert_ended_with_error()
    finally:
        network.join(2)
    head.wait_for(Phase.READY)
    assert head.state.failures == {"node_lost": 1}
    assert not (head.run_dir / "restarts.json").exists(), "a lost node does not count"


@pytest.mark.fault("`kill -9` of all processes of a worker, whose container is then restarted",
                   "Detected after 10 s at most; served again when it is back; nothing counts in the restart budget.")
def test_killed_machine_rejoins(machines: dict[int, Machine], network: Network) -> None:
    machines[2].kill()
    machines[1].wait_for_detail(machines[2].address)
    start_worker(machines, network)
    machines[1].wait_for(Phase.READY)
    assert not (machines[1].run_dir / "restarts.json").exists()


@pytest.mark.fault("`kill -9` of Ray's control service (GCS) on the head",
                   "All nodes begin a new session of Ray and serve again; no process of the old one remains.")
def test_killed_control_service_is_replaced(machines: dict[int, Machine]) -> None:
    old = [process for machine in machines.values() for process in machine.descendants() if "raylet" in title(process)]
    assert len(old) >= 2
    machines[1].find("gcs_server").kill()
    wait_until(lambda: machines[1].phase is not Phase.READY, 30, "the loss")
    machines[1].wait_for(Phase.READY)
    assert psutil.wait_procs(old, timeout=60)[1] == []


@pytest.mark.fault("`kill -9` of all processes of the head, whose container is then restarted",
                   "The workers wait for it and serve again with it; no process of the old Ray remains.")
def test_killed_head_rejoins(machines: dict[int, Machine], network: Network) -> None:
    old = [process for process in machines[2].descendants() if "raylet" in title(process)]
    machines[1].kill()
    wait_until(lambda: "no longer answers" in machines[2].state.detail, 60, "the lost head")
    assert machines[2].process.poll() is None
    machines.pop(1).discard()
    machines[1] = Machine(network, 1, **standin())
    machines[1].wait_for(Phase.READY)
    assert psutil.wait_procs(old, timeout=60)[1] == []


def test_stop_ends_all_processes(machines: dict[int, Machine]) -> None:
    for number in (1, 2):
        assert machines[number].stop() == 0
