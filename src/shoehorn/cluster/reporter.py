"""A worker's reports to the head, sent by a thread, so that they continue during a pull of hours."""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import replace

import httpx

from shoehorn.cluster import credentials, node_files, ports
from shoehorn.cluster.report import INTERVAL_SECONDS, PATH, HeadOrders, NodeReport
from shoehorn.runtime.run_dir import RunDir

log = logging.getLogger("nodes")

_TIMEOUT_SECONDS = 5.0
_LONGEST_PAUSE_SECONDS = 5.0


class Reporter:
    """Sends this node's report every second, and publishes the orders that the head answers with.

    Args:
        head: address or name of the head.
        report: the first report.

    Attributes:
        orders: the latest; None before the first.
        answered_at: monotonic time of the latest answer.
    """

    def __init__(self, head: str, report: NodeReport, paths: RunDir) -> None:
        self._url, self._paths, self._report = f"https://{head}:{ports.REPORTS}{PATH}", paths, report
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._is_logged = False
        self.orders: HeadOrders | None = None
        self.answered_at: float | None = None

    def start(self) -> None:
        """Begin to report."""
        threading.Thread(target=self._run, name="node-reports", daemon=True).start()

    def update(self, **changes: object) -> None:
        """Change the report."""
        with self._lock:
            self._report = replace(self._report, **changes)  # type: ignore[arg-type]  # replace checks the names

    def stop(self) -> None:
        """End after a last report."""
        self._stopped.set()
        with self._client() as client:
            self._send(client)

    def _client(self) -> httpx.Client:
        return httpx.Client(verify=credentials.client_context(self._paths), timeout=_TIMEOUT_SECONDS, trust_env=False)

    def _run(self) -> None:
        pause = INTERVAL_SECONDS
        with self._client() as client:
            while not self._stopped.wait(pause):
                pause = INTERVAL_SECONDS if self._send(client) else min(_LONGEST_PAUSE_SECONDS, 1.5 * pause)

    def _send(self, client: httpx.Client) -> bool:
        with self._lock:
            report = replace(self._report, ray=node_files.read_ray(self._paths))
        try:
            answer = client.post(self._url, content=report.to_json()).raise_for_status()
            orders = HeadOrders.from_json(json.loads(answer.text))
        except (httpx.HTTPError, OSError, ValueError) as error:
            if not self._is_logged:
                log.warning("Cannot report to the head, trying on url=%s error=%s", self._url, error)
            self._is_logged = True
            return False
        if self._is_logged or self.orders is None:
            log.info("reporting to the head url=%s", self._url)
        self._is_logged, self.answered_at = False, time.monotonic()
        if orders != self.orders:
            node_files.write_orders(self._paths, orders)
            self.orders = orders
        return True
