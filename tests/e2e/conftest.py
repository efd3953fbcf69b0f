"""Fixtures: a shared ready appliance, and starts of a test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from running import Appliance

from shoehorn.state import Phase


@pytest.fixture(scope="session")
def appliance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    """A ready appliance with the demo model, shared: tests may not stop it, and leave it ready."""
    running = Appliance(tmp_path_factory.mktemp("appliance"), API_KEY="")  # so it makes a key
    running.wait_for(Phase.READY)
    yield running
    running.discard()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Appliance]]:
    """Starts appliances of a test's own, which end with it."""
    started: list[Appliance] = []

    def make(**settings: str) -> Appliance:
        started.append(Appliance(tmp_path, **settings))
        return started[-1]

    yield make
    for each in started:
        each.discard()


@pytest.fixture
def client(appliance: Appliance) -> Iterator[httpx.Client]:
    """An HTTP client with the key."""
    with httpx.Client(base_url=appliance.url, headers=appliance.headers(), timeout=60) as made:
        yield made
