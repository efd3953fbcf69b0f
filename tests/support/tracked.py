"""Containers of tests: each is removed after its test, and its warnings fail the test.

Rules: a log line of level WARNING or above fails the test that started the container unless a pattern expects it:
`KNOWN` for every container, `announce` for one. No port and no name is fixed in advance.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from shoehorn.common.paths import HOME
from shoehorn.config.other_variables import PASSED
from shoehorn.config.settings import TABLE
from support.waiting import SLACK, wait_until

IMAGE = "shoehorn:cpu"
BUILD_CANARY = "sk-canary-of-the-build-7c41d5"
COMPOSE = ("compose", "--env-file", os.devnull, "-f", str(HOME / "docker-compose.yml"),
           "-f", str(HOME / "docker-compose.cpu.yml"))

_LEVEL = re.compile(r"\b(?:WARN|WARNING|ERROR|CRIT|CRITICAL|FATAL)\b|\[(?:warn|error|crit|alert|emerg)\]"
                    r"|Traceback|\b\w+Warning:")

KNOWN = {
    "Triton is not installed": "the CPU environment leaves Triton out, since it has no CPU backend",
    "Model Runner V2 requires Triton": "the same",
    "reduce_op. is deprecated": "vLLM's own code",
    "Enforce eager set|Inductor compilation was disabled": "the cpu profile asks for it",
    "Reset SSM cache type": "logged for every model, also without such a cache",
    "numa_(?:migrate_pages|set_membind) failed": "needs a capability that the container drops",
    "(?:libtcmalloc|libiomp) is not found": "speed of a CPU server, which serves for tests only",
    "sampling parameters have been overridden by the model's": "intended by the model",
    "Found ulimit of": "the host's hard limit on open files is below what vLLM would like",
}
ENDING = (r"WARN received SIGTERM indicating exit request", r"WARN stopped: watcher \(terminated by SIGTERM\)")
"""Lines of supervisord at every stop."""
INTERRUPTED = (r"Traceback", r"\[shutdown\]", r"resource_tracker: There appear to be",
               r"ERROR .* \[async_llm\.py:\d+\]")
"""Lines of vLLM when it is stopped before it serves or during a stream, or when its engine core has exited."""


def clean_environment(**settings: str) -> dict[str, str]:
    """Return this process's environment for compose without variables for the container and without .env."""
    ours = {name for row in TABLE for name in (row.name, f"{row.name}_FILE")} | {each.name for each in PASSED}
    rest = {name: value for name, value in os.environ.items() if name not in ours}
    return {**rest, "SHOEHORN_ENV_FILE": os.devnull, **settings}


def docker(*arguments: str, timeout: float = 60, environment: Mapping[str, str] | None = None,
           accept: tuple[int, ...] = (0,)) -> str:
    """Run the docker client and return its standard output; fail with both streams on another exit code."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=timeout, env=environment)
    if done.returncode not in accept:
        pytest.fail(f"docker {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


class Container:
    """One container, running or stopped."""

    def __init__(self, identity: str) -> None:
        self.id = identity
        self._announced = list(KNOWN)

    def announce(self, *patterns: str) -> None:
        """Expect log lines that match one of the regular expressions."""
        self._announced += patterns

    @property
    def logs(self) -> str:
        """Output so far."""
        done = subprocess.run(["docker", "logs", self.id], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              timeout=60, check=True)
        return done.stdout

    def inspect(self) -> dict[str, Any]:
        """Return Docker's description."""
        description: dict[str, Any] = json.loads(docker("inspect", self.id))[0]
        return description

    def execute(self, *command: str, accept: tuple[int, ...] = (0,)) -> str:
        """Run a command in the container and return its standard output."""
        return docker("exec", self.id, *command, accept=accept)

    def processes(self) -> list[tuple[int, int, str]]:
        """Return (process id, uid, command line) of every process in the container."""
        table = docker("top", self.id, "-eo", "pid,uid,args").splitlines()[1:]
        return [(int(pid), int(uid), arguments) for pid, uid, arguments in (line.split(None, 2) for line in table)]

    def url(self, port: int) -> str:
        """Return the address of a published port."""
        return f"http://{docker('port', self.id, str(port)).split()[0]}"

    def phase(self) -> str:
        """Return the phase in /status; empty while there is no answer."""
        published = docker("port", self.id, "6333", accept=(0, 1)).split()  # 1: the container is not up
        try:
            return str(httpx.get(f"http://{published[0]}/status", timeout=30).json()["phase"]) if published else ""
        except httpx.TransportError:
            return ""

    def wait_for(self, phase: str, seconds: float) -> None:
        """Wait for a phase; fail at once if the container exits first."""
        def reached() -> bool:
            state = self.inspect()["State"]
            if not state["Running"] or state["Restarting"]:
                pytest.fail(f"exited before {phase}:\n{self.logs[-4000:]}")
            return self.phase() == phase

        wait_until(reached, seconds, f"phase {phase}")

    def wait(self, seconds: float) -> int:
        """Wait for the exit and return the exit code."""
        return int(docker("wait", self.id, timeout=SLACK * seconds))

    def stop(self) -> tuple[int, float]:
        """Run `docker stop` with the container's grace period; return the exit code and the seconds that it took."""
        self.announce(*ENDING)
        begin = time.monotonic()
        docker("stop", self.id, timeout=120)
        code, seconds = int(self.inspect()["State"]["ExitCode"]), time.monotonic() - begin
        print(f"docker stop: exit code {code} after {seconds:.1f} s")
        return code, seconds

    def unannounced(self) -> list[str]:
        """Return log lines of level WARNING or above that no pattern expects."""
        announced = re.compile("|".join(self._announced))
        return [line for line in self.logs.splitlines() if _LEVEL.search(line) and not announced.search(line)]

    def remove(self) -> None:
        """Remove the container and its anonymous volumes."""
        docker("rm", "--force", "--volumes", self.id)
