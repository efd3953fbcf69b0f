"""The image, built once a session, and containers that are removed after their tests.

SHOEHORN_BASE_IMAGE selects another base image for the build if the default one is not reachable.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shoehorn.common.paths import HOME
from support.tracked import BUILD_CANARY, COMPOSE, IMAGE, Container, clean_environment, docker


@pytest.fixture(scope="session")
def image() -> str:
    """Build the CPU flavour as compose does, with a secret wherever a build might read one."""
    planted = HOME / "secrets" / f"canary-{os.getpid()}"
    planted.write_text(BUILD_CANARY)
    try:
        docker(*COMPOSE, "build", timeout=900, environment=clean_environment(
            API_KEY=BUILD_CANARY, HF_TOKEN=BUILD_CANARY, MODELSCOPE_API_TOKEN=BUILD_CANARY))
    finally:
        planted.unlink()
    return IMAGE


@pytest.fixture
def run(image: str) -> Iterator[Callable[..., Container]]:
    """Start containers by `docker run`: `run(*options, command=(), **settings)`."""
    started: list[Container] = []

    def start(*options: str, command: tuple[str, ...] = (), **settings: str) -> Container:
        environment = [f"--env={name}={value}" for name, value in settings.items()]
        identity = docker("run", "--detach", "--publish=127.0.0.1::6333", "--stop-timeout=60",
                          "--shm-size=1g", *environment, *options, image, *command)
        started.append(Container(identity.strip()))
        return started[-1]

    yield start
    complaints = [line for container in started for line in container.unannounced()]
    for container in started:
        container.remove()
    _fail_on(complaints)


@pytest.fixture(scope="module")
def composed(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Return a function that runs `docker compose` for a project of this session with the demo model."""
    secrets: Path = tmp_path_factory.mktemp("secrets")
    environment = clean_environment(
        MODEL_ID="/opt/shoehorn/demo/model", MODEL_SOURCE="local", SERVED_MODEL_NAME="shoehorn-demo",
        DRAIN_TIMEOUT="5", PORT="0", METRICS_PORT="0", SECRETS_DIR=str(secrets))
    project = ("--project-name", f"shoehorn-test-{os.getpid()}")

    def compose(*arguments: str) -> str:
        return docker(*COMPOSE, *project, *arguments, timeout=180, environment=environment)

    yield compose
    compose("down", "--volumes", "--timeout", "60")


@pytest.fixture(scope="module")
def appliance(composed: Callable[..., str]) -> Iterator[Container]:
    """Start a ready appliance by `docker compose up`; the tests of a module share it, in their order."""
    composed("up", "--detach", "--no-build")
    container = Container(composed("ps", "--all", "--quiet", "shoehorn").strip())
    container.wait_for("ready", 180)
    yield container
    _fail_on(container.unannounced())


def _fail_on(complaints: list[str]) -> None:
    if complaints:
        pytest.fail("unexpected log lines:\n" + "\n".join(complaints))
