"""The engine program of a worker (ROLE=worker): fetches and verifies the models that the head names, and reports.

Rules: the head decides everything; vLLM's worker processes run in this node's Ray (`shoehorn.cluster.ray_program`); an
error of the fetch is reported to the head before it ends the container.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import NoReturn

from shoehorn.cluster.report import SILENCE_SECONDS, HeadOrders, NodeReport, versions
from shoehorn.cluster.reporter import Reporter
from shoehorn.common.errors import ShoehornError
from shoehorn.config.settings import Settings
from shoehorn.deployment import inputs, served_model
from shoehorn.engine import memory_report
from shoehorn.engine.fetch import fetch
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase, StateFile

log = logging.getLogger("engine")

_TICK_SECONDS = 0.5


def follow_head(settings: Settings, environment: Mapping[str, str], states: StateFile) -> NoReturn:
    """Follow the head's orders; ends by an exception only.

    Raises:
        ShoehornError: a model cannot be fetched or verified.
    """
    memory_report.prepare(settings.run_dir)  # vLLM's workers, which Ray starts, read the logging configuration
    reporter = Reporter(settings.head_address, NodeReport(settings.node_address, versions(), detail="starting"),
                        RunDir(settings.run_dir))
    reporter.start()
    worker = _Worker(settings, environment, states, reporter)
    reporter.update(hardware=inputs.detect_machine(settings, environment, measure=True).to_json(),
                    detail="waiting for the head's plan")
    try:
        while True:
            worker.look()
            time.sleep(_TICK_SECONDS)
    except ShoehornError as error:
        reporter.update(cause=error.cause, digest="")
        reporter.stop()
        raise


class _Worker:
    """The worker's models."""

    def __init__(self, settings: Settings, environment: Mapping[str, str], states: StateFile,
                 reporter: Reporter) -> None:
        self._settings, self._environment, self._states = settings, environment, states
        self._reporter = reporter
        self._models: HeadOrders | None = None
        self._detail = ""

    def look(self) -> None:
        """Fetch models that the head names for the first time, and publish what this node waits for."""
        orders = self._reporter.orders
        if orders and orders.models and (self._models is None or self._models.models != orders.models):
            self._reporter.update(digest="", detail="fetching the model")
            self._fetch(orders)
            self._models = orders
        self._publish(self._status(orders))

    def _fetch(self, orders: HeadOrders) -> None:
        settings = self._settings
        folders = [served_model.served_folder(settings.models_dir, ref)
                   or fetch(settings, ref, self._environment, self._states, {}) for ref in orders.models]
        self._publish("reading the model")
        digest = served_model.models_digest(settings.models_dir, orders.models, lambda _progress: None)
        self._reporter.update(digest=digest, path=str(folders[0]), detail="has the model")
        log.info("model complete digest=%s path=%s", digest[:12], folders[0])

    def _status(self, orders: HeadOrders | None) -> str:
        head, answered_at = self._settings.head_address, self._reporter.answered_at
        if orders is None or answered_at is None:
            return f"the head at {head} does not answer"
        if time.monotonic() - answered_at > SILENCE_SECONDS:
            return f"the head at {head} no longer answers"
        return f"serving with the head at {head}" if self._models else f"the head at {head} has no plan yet"

    def _publish(self, detail: str) -> None:
        if detail != self._detail:
            log.info("%s", detail)
            self._states.update_progress(phase=Phase.WAITING, progress=None, detail=detail)
            self._detail = detail
