"""A front as the appliance runs it, with three replicas."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoehorn.gateway.nginx_config import ROUTES
from shoehorn.runtime.state import Phase
from support.replicas import MODEL, StandinReplica, write_secret
from support.running import Appliance
from support.waiting import wait_until

POSTS = tuple(route.path for route in ROUTES if route.method == "POST")
_numbers = itertools.count()


def key_of(path: str) -> str:
    """Return the name of the key with 60 requests a minute that a test uses for one route."""
    return "minute-" + path.removeprefix("/v1/").replace("/", "-").replace("_", "-")


class Rig:
    """The front, its replicas, and requests to it."""

    def __init__(self, home: Path) -> None:
        self.secret = write_secret(home)
        self.replicas = {name: StandinReplica(home / name, name, self.secret) for name in ("a", "b", "c")}
        limits = {"free": "", "slots": "concurrent=4", "budget": "tokens_per_day=70", "twice": "requests_per_minute=2",
                  "spent": "tokens_per_day=14",
                  **{key_of(path): "requests_per_minute=60" for path in POSTS}}
        self._keys = {name: f"sk-{name}-0123456789" for name in limits}
        file = home / "keys"
        file.write_text("".join(f"{name} {self._keys[name]} {limit}\n" for name, limit in limits.items()))
        for replica in self.replicas.values():
            replica.start()
        self.front = Appliance(
            home / "front", ROLE="front", REPLICAS=",".join(each.address for each in self.replicas.values()),
            CLUSTER_SECRET_FILE=str(self.secret), API_KEYS_FILE=str(file), API_KEY="", DRAIN_TIMEOUT="20")
        self.front.wait_for(Phase.READY, 20)
        self.wait_for("a", "b", "c")

    def wait_for(self, *names: str) -> None:
        """Wait until exactly these replicas are ready for the front."""
        ports = {self.replicas[name].address for name in names}
        wait_until(lambda: {each["name"] for each in self.front.state.replicas if each["state"] == "ready"} == ports,
                   20, lambda: f"{names} are ready: {self.front.state.replicas}\n{self.front.output[-2000:]}")

    def restart(self, name: str) -> None:
        """Start a replica that was killed, and wait until all are ready."""
        self.replicas[name].start()
        self.replicas[name].wait()
        self.wait_for("a", "b", "c")

    def client(self, key: str = "free") -> httpx.AsyncClient:
        """Return a client with a key."""
        return httpx.AsyncClient(base_url=self.front.url, headers={"Authorization": f"Bearer {self._keys[key]}"},
                                 timeout=60, limits=httpx.Limits(max_connections=200), trust_env=False)


def body(prompt: str = "", **steer: Any) -> dict[str, Any]:
    """Return the body of a request; without a prompt each one has a prefix of its own."""
    return {"model": MODEL, "messages": [{"role": "user", "content": prompt or f"question {next(_numbers)}"}], **steer}


def run(work: Callable[[], Awaitable[None]]) -> None:
    """Run an asynchronous test."""
    asyncio.run(asyncio.wait_for(work(), 120))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A front with three ready replicas."""
    with ExitStack() as undo:
        front = Rig(tmp_path_factory.mktemp("front"))
        undo.callback(lambda: [each.kill() for each in front.replicas.values()])
        undo.callback(front.front.discard)
        yield front
