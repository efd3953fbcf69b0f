"""Distribution of the tests over workers, a shared ready appliance, own appliances of a test, and a browser.

Rules: all tests of the shared appliance run on one worker, in the order of their files; the tests of any other file
run on one worker as well, since they share that file's fixtures. Tests of tests/shoehorn_vllm/patches import vLLM when
they are collected, so they are collected only when the contract tier runs.
"""

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

IMPORTS_VLLM = Path(__file__).parent / "shoehorn_vllm" / "patches"
FIRST = ("engine", "process")
"""Markers of the slow tiers, slowest first: they start first, so that the short tests fill the workers at the end."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip tests that import vLLM when the marker expression excludes them."""
    excluded = "not contract" in config.getoption("markexpr")
    return True if excluded and collection_path == IMPORTS_VLLM else None


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Assign each test to a group for one worker, and sort the slow groups to the front."""
    def rank(item: pytest.Item) -> int:
        if "shared_appliance" in getattr(item, "fixturenames", ()):
            return -1
        return next((place for place, name in enumerate(FIRST) if item.get_closest_marker(name)), len(FIRST))

    for item in items:
        shares_appliance = rank(item) == -1
        if shares_appliance or not item.get_closest_marker("browser"):
            file = str(item.path.relative_to(config.rootpath))
            item.add_marker(pytest.mark.xdist_group("real-engine" if shares_appliance else file))
    items.sort(key=rank)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Fail where pytest-xdist does not put the groups into effect: tests would lose the fixtures that they share."""
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in grouped):
        pytest.exit("pytest-xdist ignores the groups of tests: use the pytest of requirements/dev.txt", returncode=3)


@pytest.fixture(scope="session")
def shared_appliance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    """Start one ready appliance with the demo model. Tests may not stop it, and leave it ready."""
    running = Appliance(tmp_path_factory.mktemp("appliance"), API_KEY="")  # so that it generates a key
    try:
        running.wait_for(Phase.READY)
        wait_until(lambda: "\ncurl " in running.output, 20, "the welcome text")
        yield running
    finally:
        running.discard()


@pytest.fixture
def appliance(shared_appliance: Appliance) -> Appliance:
    """Return the shared appliance with an unused restart budget: five failures an hour would stop it."""
    (shared_appliance.run_dir / "restarts.json").unlink(missing_ok=True)
    return shared_appliance


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Appliance]]:
    """Start appliances that belong to one test and are stopped with it."""
    started: list[Appliance] = []

    def start_one(**settings: str) -> Appliance:
        started.append(Appliance(tmp_path, **settings))
        return started[-1]

    yield start_one
    for each in started:
        each.discard()
    for each in started:
        assert TEST_KEY not in each.output


@pytest.fixture
def client(appliance: Appliance) -> Iterator[httpx.Client]:
    """Open an HTTP client that sends the key."""
    with httpx.Client(base_url=appliance.url, headers=appliance.headers(), timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Launch a browser for one module: while it runs, nothing else in this thread can run an event loop."""
    with launched() as browser:
        yield browser


@pytest.fixture
def visit(chromium: Browser, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Visits]:
    """Open the page. When the test ends, save screenshots and fail if the page did something forbidden."""
    visits: list[Visit] = []

    def open_page(url: str, **options: object) -> Visit:
        visits.append(Visit(chromium, url, **options))
        return visits[-1]

    yield open_page
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(visits):
        each.page.screenshot(path=folder / f"{request.node.name}-{number}.png".replace("/", "-"), full_page=True)
    for each in visits:
        each.close()
