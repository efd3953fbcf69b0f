"""The program `ray`: one Ray for each session of the head, with as many places as planned."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from shoehorn.cluster import network, node_files, ray_command
from shoehorn.cluster.ray_program import RayProgram
from shoehorn.cluster.report import HeadOrders, RaySession
from shoehorn.config.settings import load
from shoehorn.runtime.run_dir import RunDir
from support.waiting import wait_until

STAND_IN = f"import sys, time; print({ray_command.JOINED!r}, flush=True); time.sleep(float(sys.argv[1]))"
"""Reports that it has joined, and ends after some seconds."""


@pytest.fixture
def paths(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace Ray's command; return the places of each start. Ray ends soon where it has seven."""
    places: list[int] = []

    def arguments(_address: str, _head: str, number: int, _paths: RunDir) -> list[str]:
        places.append(number)
        return [sys.executable, "-c", STAND_IN, "0" if number == 7 else "60"]

    monkeypatch.setattr(ray_command, "ray_arguments", arguments)
    monkeypatch.setattr(network, "interfaces", lambda: {"eth1": ["10.0.0.2"]})
    return places


@pytest.fixture
def program(paths: RunDir) -> RayProgram:
    return RayProgram(load({"ROLE": "worker", "HEAD_ADDRESS": "10.0.0.1", "NODE_ADDRESS": "10.0.0.2",
                            "CLUSTER_SECRET_FILE": "/s", "RUN_DIR": str(paths.path)}), {"PATH": "/usr/bin"})


def joined(program: RayProgram, paths: RunDir, session: str) -> RaySession:
    """Follow the orders until this node has joined a session."""
    def has_joined() -> bool:
        program.look()
        return node_files.read_ray(paths).session == session

    wait_until(has_joined, 10, f"session {session}")
    return node_files.read_ray(paths)


def test_ray_follows_the_sessions_of_the_head(program: RayProgram, paths: RunDir, started: list[int]) -> None:
    program.look()
    assert started == [], "the head has no session yet"
    node_files.write_orders(paths, HeadOrders("one", 2))
    first = joined(program, paths, "one")
    program.look()
    assert started == [2]
    node_files.write_orders(paths, HeadOrders("two", 1))
    second = joined(program, paths, "two")
    assert started == [2, 1]
    assert first.instance != second.instance
    program.stop()
    assert node_files.read_ray(paths) == RaySession()


def test_ray_that_ends_is_restarted(program: RayProgram, paths: RunDir, started: list[int]) -> None:
    node_files.write_orders(paths, HeadOrders("one", 7))

    def has_restarted() -> bool:
        program.look()
        return len(started) > 1

    wait_until(has_restarted, 10, "the restart")
    program.stop()


def test_state_of_a_killed_program_is_forgotten(paths: RunDir, program: RayProgram) -> None:
    node_files.write_ray(paths, RaySession("one", "killed"))
    assert node_files.read_ray(paths).session == "one"
    RayProgram(load({"RUN_DIR": str(paths.path)}), {})
    assert node_files.read_ray(paths) == RaySession()
