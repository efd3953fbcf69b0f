"""A replica as the appliance runs it, with a stand-in for vLLM: the announcement of its stop."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fakes.ports import free_port
from shoehorn.runtime import peer_certificates, shutdown
from shoehorn.runtime.state import Phase
from support.replicas import write_secret
from support.running import Appliance, standin
from support.waiting import wait_until

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("front")]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    return write_secret(tmp_path)


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def replica(tmp_path: Path, secret: Path, port: int) -> Iterator[Appliance]:
    """A ready replica."""
    running = Appliance(tmp_path / "replica", API_KEY="", REPLICA_PORT=str(port), CLUSTER_SECRET_FILE=str(secret),
                        **standin())
    try:
        running.wait_for(Phase.READY, 60)
        yield running
    finally:
        running.discard()


@pytest.fixture
def front(tmp_path: Path, secret: Path, port: int) -> Iterator[httpx.Client]:
    """The connections of a front."""
    own = peer_certificates.issue(secret.read_text(), "front")
    file = tmp_path / "pair.pem"
    file.write_bytes(own.pair)
    context = ssl.create_default_context(cadata=own.authority.decode())
    context.check_hostname = False
    context.load_cert_chain(file)
    with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=context,
                      headers={"X-Shoehorn-Key": "phone"}) as client:
        yield client


def test_stop_is_announced_before_requests_are_refused(replica: Appliance, front: httpx.Client) -> None:
    assert "created the API key" not in replica.output  # the front has the keys
    wait_until(lambda: front.get("/readyz").status_code == 200, 5, "the front sees a ready replica")
    usage = front.get("/-/usage").json()
    assert usage["run"]
    ended: list[int] = []
    stop = threading.Thread(target=lambda: ended.append(replica.stop(seconds=60)))
    stop.start()
    began = time.monotonic()
    wait_until(lambda: front.get("/readyz").status_code == 404, 10, "the stop is announced")
    announced = time.monotonic()
    assert replica.phase is Phase.READY
    assert front.get("/v1/models").status_code == 200  # still served
    wait_until(lambda: replica.phase is Phase.STOPPING, 10, "the replica stops")
    assert time.monotonic() - announced > 0.8 * (shutdown.LEAVING_SECONDS - (announced - began))
    stop.join()
    assert ended == [0]
