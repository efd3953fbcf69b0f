"""Fixtures: a shared ready appliance, starts of a test's own, and a browser to look at them with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser

from shoehorn.runtime.state import Phase
from support.browser import Visit, Visits, launched
from support.running import TEST_KEY, Appliance
from support.waiting import wait_until


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    """A ready appliance with the demo model, shared: tests may not stop it, and leave it ready."""
    running = Appliance(tmp_path_factory.mktemp("appliance"), API_KEY="")  # so it makes a key
    try:
        running.wait_for(Phase.READY)
        wait_until(lambda: "\ncurl " in running.output, 20, "it tells how to ask")
        yield running
    finally:
        running.discard()


@pytest.fixture
def appliance(shared: Appliance) -> Appliance:
    """The shared appliance; what its engine failed before counts no more, since five failures an hour would end it."""
    (shared.run_dir / "restarts.json").unlink(missing_ok=True)
    return shared


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
    for each in started:
        assert TEST_KEY not in each.output


@pytest.fixture
def client(appliance: Appliance) -> Iterator[httpx.Client]:
    """An HTTP client with the key."""
    with httpx.Client(base_url=appliance.url, headers=appliance.headers(), timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A browser for one module: while it runs, nothing else in this thread can run an event loop."""
    with launched() as browser:
        yield browser


@pytest.fixture
def visit(chromium: Browser, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Visits]:
    """Opens the page. At the test's end screenshots are kept, and nothing forbidden may have happened."""
    visits: list[Visit] = []

    def make(url: str, **how: object) -> Visit:
        visits.append(Visit(chromium, url, **how))
        return visits[-1]

    yield make
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(visits):
        each.page.screenshot(path=folder / f"{request.node.name}-{number}.png".replace("/", "-"), full_page=True)
    for each in visits:
        each.close()
