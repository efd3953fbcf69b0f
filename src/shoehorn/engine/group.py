"""The group of machines that serve one model, as the head's engine program sees it (ROLE=head).

Rules:
- a plan needs the hardware of all nodes, and a start their agreement; until then the phase is `waiting`, and the detail
  names who is missing or differs and in what;
- a lost node ends the engine and the session of Ray: every node ends the processes of the old engine before it joins
  the next session;
- a loss is not a failure of the engine: it does not count in the restart budget.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from shoehorn.cluster import agreement, node_files
from shoehorn.cluster.agreement import Gpus
from shoehorn.cluster.report import HeadOrders, NodeReport, RaySession, versions
from shoehorn.config.settings import Settings
from shoehorn.engine.diagnosis import NODE_LOST, Diagnosis, node_lost
from shoehorn.hardware.types import Hardware
from shoehorn.model.reference import ModelRef
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase, StateFile

log = logging.getLogger("engine")

_TICK_SECONDS = 0.5
_NUMBER = re.compile(r"\d+ s\b")
_SETTLE_SECONDS = 3.0
"""After the engine's exit, in which the end of Ray on a node reaches its report."""


class Group:
    """The nodes of the cluster.

    Args:
        machine: of the head.
    """

    def __init__(self, settings: Settings, machine: Hardware, states: StateFile) -> None:
        self._paths, self._states = RunDir(settings.run_dir), states
        self._nodes = settings.cluster_nodes or 1
        self._own = NodeReport(settings.node_address, versions(), machine.to_json())
        self._orders = HeadOrders()
        self._planned: tuple[Gpus, ...] = ()
        self._at_start: Mapping[str, RaySession] = {}
        self._give(self._orders)  # which ends the session of an earlier run of this program

    def wait_for_machines(self) -> list[Hardware]:
        """Wait until all nodes report, with equal versions; return their hardware, the head's first."""
        def obstacles() -> list[str]:
            here = agreement.present(node_files.read_reports(self._paths), time.monotonic())
            return self._missing() or [f"{address}: looking at its hardware" for address, report in here.items()
                                       if not report.hardware]

        self._wait(obstacles)
        reports = [self._own, *self._present().values()]
        self._planned = tuple(agreement.gpus_of(report) for report in reports)
        return [Hardware.from_json(dict(report.hardware)) for report in reports]

    def order(self, models: Sequence[ModelRef], processes: int) -> None:
        """Let all nodes fetch the models and join Ray; what has been ordered already is not repeated.

        Args:
            processes: of the engine, together on all nodes.
        """
        every = processes == sum(map(len, self._planned))
        places = 0 if every else max(1, processes // self._nodes)
        session = self._orders.session if places == self._orders.places else ""
        session = session or uuid.uuid4().hex
        orders = HeadOrders(session, places, tuple(models))
        if orders != self._orders:
            self._give(orders)

    def set_model(self, digest: str, path: str) -> None:
        """Take the head's model, complete and verified, as what all nodes must have."""
        self._own = replace(self._own, digest=digest, path=path)

    def wait_until_agreed(self) -> None:
        """Wait until all nodes have the same model and have joined Ray."""
        self._wait(lambda: self._missing() or agreement.differences(self._current(), self._present(), self._planned))
        self._at_start = {address: report.ray for address, report in self._present().items()} | {
            self._own.address: self._current().ray}
        log.info("all nodes agree nodes=%s", ",".join(self._at_start))

    def loss(self) -> str:
        """Return which node was lost since the start and why; "" if none. Cheap."""
        return agreement.loss(self._at_start, node_files.read_reports(self._paths), self._current().ray,
                              self._own.address, time.monotonic())

    def explain(self, diagnosis: Diagnosis) -> Diagnosis | None:
        """Return the loss that made the engine exit; None if all nodes are still there."""
        if diagnosis.name == NODE_LOST:
            return diagnosis
        self._states.update(phase=Phase.WAITING, progress=None, detail="the engine ended; looking for a lost node")
        settle_time = time.monotonic() + _SETTLE_SECONDS
        while not (loss := self.loss()):
            reports = node_files.read_reports(self._paths)
            if min((each.at for node, each in reports.items() if node in self._at_start), default=0.0) >= settle_time:
                return None
            time.sleep(_TICK_SECONDS)
        return node_lost(loss)

    def regroup(self, loss: Diagnosis) -> None:
        """Begin a new session of Ray, which ends the processes of the old engine on all nodes."""
        self._states.update(phase=Phase.WAITING, progress=None, detail=loss.cause,
                            restarts=self._states.read().restarts + 1)
        self._give(replace(self._orders, session=uuid.uuid4().hex))

    def _missing(self) -> list[str]:
        return agreement.missing(self._own, node_files.read_reports(self._paths), self._nodes, time.monotonic())

    def _present(self) -> dict[str, NodeReport]:
        return agreement.present(node_files.read_reports(self._paths), time.monotonic())

    def _current(self) -> NodeReport:
        ray = node_files.read_ray(self._paths)
        return replace(self._own, ray=ray if ray.session == self._orders.session else RaySession())

    def _wait(self, obstacles: Callable[[], list[str]]) -> None:
        """Publish the obstacles while there is one; log them where more than a number changes."""
        logged = published = ""
        while texts := obstacles():
            detail = "; ".join(texts)
            if detail != published:
                self._states.update_progress(phase=Phase.WAITING, progress=None, detail=detail)
            if (plain := _NUMBER.sub("", detail)) != logged:
                log.info("waiting: %s", detail)
            published, logged = detail, plain
            time.sleep(_TICK_SECONDS)

    def _give(self, orders: HeadOrders) -> None:
        self._orders = orders
        node_files.write_orders(self._paths, orders)
