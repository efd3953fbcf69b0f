"""Agreement of the nodes: every obstacle is named, and a loss is found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoehorn.cluster import agreement
from shoehorn.cluster.node_files import Received
from shoehorn.cluster.report import SILENCE_SECONDS, HeadOrders, NodeReport, RaySession
from shoehorn.model.reference import ModelRef

VERSIONS = {"Shoehorn": "1.0", "vLLM": "0.32.0", "torch": "2.13.0", "Ray": "2.60.0", "Python": "3.12.3"}
GPU = {"name": "RTX 4090", "total_bytes": 24 << 30}
HEAD = NodeReport("10.0.0.1", VERSIONS, {"gpus": [GPU]}, "a" * 64, "/models/m", RaySession("s", "head"))
WORKER = replace(HEAD, address="10.0.0.2", ray=RaySession("s", "worker"))
PLANNED = (agreement.gpus_of(HEAD), agreement.gpus_of(WORKER))


def missing(*reports: NodeReport, nodes: int = 2, seconds: float = 0.0) -> list[str]:
    """Return the obstacles to a plan; the reports are so many seconds old."""
    received = {each.address: Received(each, 100.0 - seconds) for each in reports}
    return agreement.missing(HEAD, received, nodes, 100.0)


def differences(**changes: object) -> list[str]:
    """Return the obstacles to a start with a changed worker."""
    return agreement.differences(HEAD, {"10.0.0.2": replace(WORKER, **changes)}, PLANNED)


def test_equal_nodes_agree() -> None:
    assert missing(WORKER) == []
    assert differences() == []


def test_missing_node_is_named() -> None:
    text, = missing()
    assert text == "1 of 2 nodes missing; start it with ROLE=worker HEAD_ADDRESS=10.0.0.1"
    text, = missing(WORKER, seconds=SILENCE_SECONDS + 1)
    assert text == "1 of 2 nodes missing (10.0.0.2: no report for 11 s)"
    assert missing(WORKER, seconds=SILENCE_SECONDS) == []


def test_node_that_came_back_under_another_address_replaces_the_lost_one() -> None:
    received = {"10.0.0.2": Received(WORKER, 0.0), "10.0.0.9": Received(replace(WORKER, address="10.0.0.9"), 100.0)}
    assert agreement.missing(HEAD, received, 2, 100.0) == []


def test_superfluous_node_is_named() -> None:
    text, = missing(WORKER, replace(WORKER, address="10.0.0.3"))
    assert "CLUSTER_NODES=2" in text
    assert "10.0.0.3" in text


@pytest.mark.parametrize("name", VERSIONS)
def test_other_version_is_named(name: str) -> None:
    text, = missing(replace(WORKER, versions={**VERSIONS, name: "0.1"}))
    assert text == f"10.0.0.2: {name} 0.1, but {VERSIONS[name]} on 10.0.0.1"
    text, = missing(replace(WORKER, versions={key: value for key, value in VERSIONS.items() if key != name}))
    assert f"{name} none" in text


def test_failed_node_is_named_with_its_cause() -> None:
    assert missing(replace(WORKER, cause="disk full")) == ["10.0.0.2: failed: disk full"]


@pytest.mark.parametrize(("changes", "words"), [
    ({"digest": "b" * 64}, "model differs"), ({"digest": "", "detail": "fetching the model"}, "fetching the model"),
    ({"path": "/mnt/m"}, "same path"), ({"ray": RaySession()}, "joining Ray"),
    ({"ray": RaySession("earlier", "worker")}, "joining Ray"), ({"hardware": {"gpus": []}}, "other GPUs")])
def test_difference_to_the_head_is_named(changes: dict[str, object], words: str) -> None:
    text, = differences(**changes)
    assert text.startswith("10.0.0.2: ")
    assert words in text


def test_head_waits_for_its_own_ray() -> None:
    own = replace(HEAD, ray=RaySession())
    assert agreement.differences(own, {}, PLANNED) == ["10.0.0.1: starting Ray"]
    assert agreement.differences(own, {"10.0.0.2": replace(WORKER, ray=RaySession())}, PLANNED) == [
        "10.0.0.2: joining Ray", "10.0.0.1: starting Ray"]


def loss(report: NodeReport | None, own: RaySession = HEAD.ray, seconds: float = 0.0) -> str:
    """Return the loss since a start with both nodes."""
    start = {HEAD.address: HEAD.ray, WORKER.address: WORKER.ray}
    received = {WORKER.address: Received(report, 100.0 - seconds)} if report else {}
    return agreement.loss(start, received, own, HEAD.address, 100.0)


def test_loss_is_found_and_named() -> None:
    assert loss(WORKER) == ""
    assert loss(WORKER, seconds=SILENCE_SECONDS + 2) == "10.0.0.2: no report for 12 s"
    assert loss(None) == "10.0.0.2: no report"
    assert loss(replace(WORKER, ray=RaySession("s", "another"))) == "10.0.0.2: Ray was restarted"
    assert loss(replace(WORKER, cause="disk full")) == "10.0.0.2: failed: disk full"
    assert loss(WORKER, own=RaySession("s", "another")) == "10.0.0.1: Ray was restarted"


def test_reports_and_orders_survive_transport() -> None:
    import json

    assert NodeReport.from_json(json.loads(WORKER.to_json())) == WORKER
    later = {**json.loads(WORKER.to_json()), "of_a_later_version": 1}
    assert NodeReport.from_json(later) == WORKER
    orders = HeadOrders("s", 2, (ModelRef("owner/model", "huggingface", "main"),), "loading")
    assert HeadOrders.from_json(json.loads(orders.to_json())) == orders


@pytest.mark.parametrize("document", [[], {}, {"address": 1, "versions": {}}, {"address": "a", "versions": {"x": 1}},
                                      {"address": "a", "versions": {}, "hardware": []},
                                      {"address": "a", "versions": {}, "ray": {"other": 1}}])
def test_damaged_report_is_refused(document: object) -> None:
    with pytest.raises(ValueError, match="not a report"):
        NodeReport.from_json(document)
