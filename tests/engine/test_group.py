"""The group of machines as the head's engine program sees it: orders to the nodes, and losses."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from shoehorn.cluster import node_files
from shoehorn.cluster.node_files import Received
from shoehorn.cluster.report import NodeReport, RaySession, versions
from shoehorn.config.settings import load
from shoehorn.engine import group as group_module
from shoehorn.engine.diagnosis import NODE_LOST, Diagnosis
from shoehorn.engine.group import Group
from shoehorn.hardware.types import Hardware
from shoehorn.model.reference import ModelRef
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase, StateFile
from support.plans import MIDDLE, machine

REF = ModelRef("owner/model", "huggingface", "main")
ONE, TWO = machine(MIDDLE), machine(MIDDLE, MIDDLE)
CRASH = Diagnosis("unknown", "crashed", "", False)


class Nodes:
    """A head and one worker."""

    def __init__(self, folder: Path, head: Hardware, worker: Hardware) -> None:
        self.paths, self.states = RunDir(folder), StateFile(folder)
        settings = load({"ROLE": "head", "CLUSTER_NODES": "2", "NODE_ADDRESS": "10.0.0.1", "CLUSTER_SECRET_FILE": "/s",
                         "RUN_DIR": str(folder)})
        self.report = NodeReport("10.0.0.2", versions(), worker.to_json())
        self.receive()
        self.group = Group(settings, head, self.states)
        self.machines = self.group.wait_for_machines()

    def receive(self, seconds_ago: float = 0.0, **changes: object) -> None:
        """Receive a report of the worker."""
        self.report = replace(self.report, **changes)  # type: ignore[arg-type]
        node_files.write_reports(self.paths, {"10.0.0.2": Received(self.report, time.monotonic() - seconds_ago)})

    def agree(self) -> str:
        """Let both nodes join the session and have the model; return the session."""
        session = node_files.read_orders(self.paths).session
        node_files.write_ray(self.paths, RaySession(session, "head"))
        self.group.set_model("d", "/models/m")
        self.receive(digest="d", path="/models/m", ray=RaySession(session, "worker"))
        self.group.wait_until_agreed()
        return session


@pytest.mark.parametrize(("head", "worker", "processes", "places"), [
    (ONE, ONE, 2, 0), (TWO, TWO, 4, 0), (TWO, TWO, 2, 1), (ONE, TWO, 3, 0), (ONE, TWO, 2, 1)])
def test_every_machine_gets_the_planned_places(tmp_path: Path, head: Hardware, worker: Hardware, processes: int,
                                               places: int) -> None:
    nodes = Nodes(tmp_path, head, worker)
    assert [len(each.gpus) for each in nodes.machines] == [len(head.gpus), len(worker.gpus)]
    assert node_files.read_orders(nodes.paths).session == "", "Ray joins after the plan"
    nodes.group.order([REF], processes)
    orders = node_files.read_orders(nodes.paths)
    assert (orders.places, orders.models) == (places, (REF,))
    assert orders.session
    nodes.group.order([REF], processes)
    assert node_files.read_orders(nodes.paths) == orders, "an order that is repeated begins no new session"


def test_lost_node_begins_a_new_session_and_a_crash_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "_SETTLE_SECONDS", -1.0)
    nodes = Nodes(tmp_path, ONE, ONE)
    nodes.group.order([REF], 2)
    session = nodes.agree()
    assert nodes.group.loss() == ""
    nodes.receive()
    assert nodes.group.explain(CRASH) is None
    assert node_files.read_orders(nodes.paths).session == session
    nodes.receive(ray=RaySession(session, "restarted"))
    loss = nodes.group.explain(CRASH)
    assert loss
    assert (loss.name, "10.0.0.2" in loss.cause) == (NODE_LOST, True)
    nodes.group.regroup(loss)
    assert node_files.read_orders(nodes.paths).session not in ("", session)
    state = nodes.states.read()
    assert state.phase is Phase.WAITING
    assert "10.0.0.2" in state.detail


def test_loss_shows_in_reports_after_the_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report from before the crash does not show yet that Ray has ended on its node."""
    nodes = Nodes(tmp_path, ONE, ONE)
    nodes.group.order([REF], 2)
    nodes.agree()
    looks = iter([lambda: nodes.receive(), lambda: nodes.receive(ray=RaySession("", ""))])
    monkeypatch.setattr(group_module.time, "sleep", lambda _seconds: next(looks)())
    loss = nodes.group.explain(CRASH)
    assert loss
    assert loss.name == NODE_LOST
