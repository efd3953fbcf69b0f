"""Machines of a cluster on one host: network namespaces on a bridge, each with a /dev/shm of its own.

Rules: the test itself is another host of the same network; a cable is pulled at the bridge. Needs
root, which CI has; without it the tests fail.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil

from shoehorn.cluster import ports
from shoehorn.common.paths import HOME
from shoehorn.runtime.state import Phase
from support.running import Appliance
from support.waiting import wait_until

READY_SECONDS = 150
RAY_ON_CPU = HOME / "tests" / "fakes" / "ray_on_cpu"
SECRET = "canary-of-the-cluster-secret-0123456789abcdef"
COMMON = {"PYTHONPATH": str(RAY_ON_CPU), "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
          "CLUSTER_NETWORK": "trusted", "MAX_MODEL_LEN": "512", "MAX_NUM_SEQS": "4"}


def title(process: psutil.Process) -> str:
    """Return the command line of a process, or the name that it gave itself; "" if it has exited."""
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.NoSuchProcess:
        return ""


def run(*words: str) -> None:
    """Run a command of the system; fail with its error."""
    subprocess.run(words, check=True, capture_output=True, text=True)


def _add_namespace(name: str) -> bool:
    """Add a network namespace; return False if another test has it."""
    return subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0


class Network:
    """A network of machines, and of the test at `.254`."""

    def __init__(self) -> None:
        number = next(each for each in range(1, 250) if _add_namespace(f"shc{each}s"))
        self._name, self._prefix = f"shc{number}", f"10.77.{number}"
        self.folder = Path(tempfile.mkdtemp(prefix="shc-", dir="/tmp"))  # short: Ray's sockets are below
        self._switch = f"{self._name}s"  # a namespace too: the host's firewall does not apply there
        self._names = [self._switch]
        run("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", self._switch, "link", "set", "bridge", "up")
        run("ip", "link", "add", self._name, "type", "veth", "peer", "name", "test", "netns", self._switch)
        run("ip", "-n", self._switch, "link", "set", "test", "master", "bridge", "up")
        run("ip", "addr", "add", f"{self._prefix}.254/24", "dev", self._name)
        run("ip", "link", "set", self._name, "up")
        self.secret = self.folder / "secret"
        self.secret.write_text(SECRET)
        self.secret.chmod(0o600)

    def address(self, number: int) -> str:
        """Return the address of a machine, numbered from 1."""
        return f"{self._prefix}.{number}"

    def add(self, number: int) -> None:
        """Add a machine."""
        name = f"{self._name}n{number}"
        run("ip", "netns", "add", name)
        self._names.append(name)
        run("ip", "-n", self._switch, "link", "add", f"port{number}", "type", "veth", "peer", "name", "net0", "netns",
            name)
        run("ip", "-n", self._switch, "link", "set", f"port{number}", "master", "bridge", "up")
        run("ip", "-n", name, "addr", "add", f"{self.address(number)}/24", "dev", "net0")
        for device in ("lo", "net0"):
            run("ip", "-n", name, "link", "set", device, "up")
        span = f"{ports.EPHEMERAL[0]} {ports.EPHEMERAL[-1]}"
        run("ip", "netns", "exec", name, "sysctl", "-qw", f"net.ipv4.ip_local_port_range={span}")

    def within(self, number: int, mounts: Sequence[tuple[Path, Path]] = ()) -> list[str]:
        """Return the start of a command line that runs on a machine.

        Args:
            mounts: folders that the machine has in the place of others: (content, place).
        """
        steps = ["mount -t tmpfs tmpfs /dev/shm", *(f"mount --bind {content} {place}" for content, place in mounts),
                 'exec "$@"']
        return ["ip", "netns", "exec", f"{self._name}n{number}", "unshare", "-m", "sh", "-c", " && ".join(steps), "sh"]

    def cut(self, number: int) -> None:
        """Pull a machine's cable."""
        run("ip", "-n", self._switch, "link", "set", f"port{number}", "down")

    def join(self, number: int) -> None:
        """Plug it in again."""
        run("ip", "-n", self._switch, "link", "set", f"port{number}", "up")

    def remove(self) -> None:
        """Remove machines, network and files."""
        for name in self._names:
            run("ip", "netns", "del", name)
        shutil.rmtree(self.folder)


class Machine(Appliance):
    """An appliance on one machine of a network; the head is number 1."""

    def __init__(self, network: Network, number: int, nodes: int = 2, mounts: Sequence[tuple[Path, Path]] = (),
                 **settings: str) -> None:
        self.address = network.address(number)
        role = {"ROLE": "head", "CLUSTER_NODES": str(nodes)} if number == 1 else {
            "ROLE": "worker", "HEAD_ADDRESS": network.address(1)}
        own = {"NODE_ADDRESS": self.address, "CLUSTER_SECRET_FILE": str(network.secret)}
        super().__init__(network.folder / str(number), network.within(number, mounts),
                         **{**COMMON, **role, **own, **settings})
        self.url = f"http://{self.address}:{self.port}"

    def wait_for(self, phase: Phase, seconds: float = READY_SECONDS) -> None:
        """Wait for a phase, and for the mark of readiness, which is written last."""
        super().wait_for(phase, seconds)
        if phase is Phase.READY:
            wait_until((self.run_dir / "ready").exists, 5, "the mark of readiness")

    def engine_workers(self) -> list[psutil.Process]:
        """Return vLLM's worker processes on this machine."""
        return [each for each in self.descendants() if "RayWorkerProc" in title(each)]

    def wait_for_detail(self, words: str, seconds: float = 60) -> None:
        """Wait for the phase `waiting` with these words in its detail, which `/v1/*` answers with status 503."""
        wait_until(lambda: self.phase is Phase.WAITING and words in self.state.detail, seconds,
                   lambda: f"{words!r} in {self.state.detail!r}\n{self.output[-2000:]}")
        answer = httpx.post(f"{self.url}/v1/chat/completions", json={}, headers=self.headers(), timeout=30)
        assert answer.status_code == 503
        assert answer.json()["error"]["phase"] == "waiting", answer.text
