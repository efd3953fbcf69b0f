"""One model on two machines: real Ray and vLLM with the demo model, divided by matrices or by layers.

Two network namespaces with a /dev/shm each take the place of the machines; a plugin under tests/ lets vLLM's CPU build
use Ray.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from shoehorn.cluster import ports
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase
from support.clients import UNQUANTIZED, BackgroundRequest, answers
from support.machines import READY_SECONDS, SECRET, Machine, Network
from support.running import TEST_KEY
from support.waiting import wait_until

pytestmark = pytest.mark.cluster
BY_MATRICES = "--tensor-parallel-size 2"
BY_LAYERS = "--pipeline-parallel-size 2 --no-enforce-eager -cc.mode=2 -cc.backend=eager"
"""vLLM 0.32.0 makes the buffer between stages on a CPU only while it compiles."""


class Pair:
    """Head and worker."""

    def __init__(self, network: Network, extra: str) -> None:
        self.head = Machine(network, 1, VLLM_EXTRA_ARGS=extra)
        self.worker = Machine(network, 2)

    def discard(self) -> None:
        """End both."""
        for machine in (self.head, self.worker):
            machine.discard()

    def descendants(self) -> list[psutil.Process]:
        """Return all processes of both machines."""
        return [*self.head.descendants(), *self.worker.descendants()]


@pytest.fixture(scope="module")
def pair(network: Network) -> Iterator[Pair]:
    """Start two machines that divide the matrices."""
    machines = Pair(network, BY_MATRICES)
    try:
        machines.head.wait_for(Phase.READY, READY_SECONDS)
        yield machines
    finally:
        machines.discard()


def test_two_machines_answer_as_one(pair: Pair) -> None:
    assert answers(pair.head) == UNQUANTIZED
    assert len(pair.head.engine_workers()) == len(pair.worker.engine_workers()) == 1


def test_no_secret_reaches_an_environment_an_argument_or_a_log(pair: Pair) -> None:
    token = RunDir(pair.worker.run_dir).ray_token.read_text()
    secrets = (SECRET, token, TEST_KEY)
    searched = 0
    for process in pair.descendants():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            shown = process.cmdline() + Path(f"/proc/{process.pid}/environ").read_text(errors="replace").split("\0")
            searched += any(text.startswith("VLLM_HOST_IP=") for text in shown)
            assert not [text for text in shown if any(secret in text for secret in secrets)], process
    assert searched >= len(pair.head.engine_workers() + pair.worker.engine_workers()) == 2
    for machine in (pair.head, pair.worker):
        files = [path for path in machine.run_dir.rglob("*") if path.is_file() and path.parent.name != "cluster"]
        assert any("raylet" in path.name for path in files), "Ray's logs are searched too"
        for path in files:
            content = path.read_bytes()
            assert not [secret for secret in secrets if secret.encode() in content], path
        assert not [secret for secret in secrets if secret in machine.output]


def listening(machine: Machine, network: Network, number: int) -> set[tuple[str, int]]:
    """Return address and port of each TCP socket that listens on a machine, other than on its loopback."""
    table = subprocess.run([*network.within(number), "cat", "/proc/net/tcp", "/proc/net/tcp6"], check=True,
                           capture_output=True, text=True).stdout
    sockets = set()
    for local, state in re.findall(r"^ *\d+: (\S+) \S+ (\S\S)", table, re.MULTILINE):
        address, port = local.split(":")
        if state == "0A" and address != "0100007F":
            sockets.add((address, int(port, 16)))
    return sockets


@pytest.mark.parametrize("number", [1, 2])
def test_listening_ports_are_those_of_the_list(pair: Pair, network: Network, number: int) -> None:
    machine = (pair.head, pair.worker)[number - 1]
    allowed = {machine.port, machine.metrics_port, *ports.FIXED, *ports.RAY_WORKERS, *ports.EPHEMERAL}
    used = {port for _, port in listening(machine, network, number)}
    assert used - allowed == set()
    assert machine.port in used


@pytest.mark.fault("`kill -9` of vLLM's worker on another machine",
                   "Detected within 5 s; streams end with an error event; the engine is restarted.")
def test_killed_worker_process_ends_readiness(pair: Pair) -> None:
    stream = BackgroundRequest(pair.head, max_tokens=400)
    wait_until(lambda: len(stream.text) > 200, 30, "a stream")
    old = pair.head.engine_workers() + pair.worker.engine_workers()
    assert len(old) == 2
    pair.worker.engine_workers()[0].kill()
    wait_until(lambda: not (pair.head.run_dir / "ready").exists(), 5, "the end of readiness")
    stream.assert_ended_with_error()
    assert psutil.wait_procs(old, timeout=30)[1] == []
    pair.head.wait_for(Phase.READY, READY_SECONDS)
    assert "node_lost" not in pair.head.state.failures
    assert answers(pair.head) == UNQUANTIZED


@pytest.mark.fault("A machine is lost while the engine is idle", "Not ready within 5 s; the 503 names the machine.")
def test_lost_machine_is_named(pair: Pair) -> None:
    old = pair.head.engine_workers()
    pair.worker.kill()
    wait_until(lambda: not (pair.head.run_dir / "ready").exists(), 5, "the end of readiness")
    pair.head.wait_for_detail(pair.worker.address)
    assert psutil.wait_procs(old, timeout=60)[1] == [], "the head's part of the old engine has ended"
    assert pair.head.state.failures["node_lost"] == 1


def test_machines_that_divide_the_layers_answer_as_one(pair: Pair, network: Network) -> None:
    pair.discard()
    machines = Pair(network, BY_LAYERS)
    try:
        machines.head.wait_for(Phase.READY, READY_SECONDS)
        assert answers(machines.head) == UNQUANTIZED
    finally:
        machines.discard()
