"""The program `nodes` of the head: receives the reports of the workers, and answers each with the head's orders.

Rules: only nodes with a certificate of the cluster are heard; a report is kept until the node's next one; the service
decides nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn

from shoehorn.cluster import node_files, ports
from shoehorn.cluster.node_files import Received
from shoehorn.cluster.report import MOST_BYTES, PATH, NodeReport
from shoehorn.config.settings import Settings
from shoehorn.runtime import parent_watch
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.server_program import run, stop_with_parent

log = logging.getLogger("nodes")

_Message = MutableMapping[str, Any]


class ReportService:
    """ASGI application with one route.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, paths: RunDir, clock: Callable[[], float] = time.monotonic) -> None:
        self._paths, self._clock = paths, clock
        self._reports = node_files.read_reports(paths)

    async def __call__(self, scope: _Message, receive: Callable[[], Awaitable[_Message]],
                       send: Callable[[_Message], Awaitable[None]]) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        status, body = 404, "{}"
        if (scope["method"], scope["path"]) == ("POST", PATH):
            status, body = self._answer(await _body(receive))
        await send({"type": "http.response.start", "status": status,
                    "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": body.encode()})

    def _answer(self, body: bytes | None) -> tuple[int, str]:
        if body is None:
            return 413, "{}"
        try:
            report = NodeReport.from_json(json.loads(body))
        except ValueError as error:
            return 400, json.dumps({"error": str(error)})
        if report.address not in self._reports:
            log.info("First report of a node address=%s", report.address)
        self._reports[report.address] = Received(report, self._clock())
        node_files.write_reports(self._paths, self._reports)
        return 200, node_files.read_orders(self._paths).to_json()


async def _body(receive: Callable[[], Awaitable[_Message]]) -> bytes | None:
    """Read a body; None if it is too large."""
    parts, size = [], 0
    while True:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size > MOST_BYTES:
            return None
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM, or until supervisord is killed."""
    paths = RunDir(settings.run_dir)
    server = uvicorn.Server(uvicorn.Config(
        ReportService(paths), host=settings.node_address, port=ports.REPORTS, lifespan="off", log_config=None,
        access_log=False, server_header=False, date_header=False, timeout_keep_alive=15, timeout_graceful_shutdown=1,
        ssl_certfile=str(paths.node_certificate), ssl_keyfile=str(paths.node_key),
        ssl_ca_certs=str(paths.cluster_authority), ssl_cert_reqs=ssl.CERT_REQUIRED))
    watch = asyncio.create_task(stop_with_parent(parent_watch.supervisor(), server))
    await server.serve()
    watch.cancel()


if __name__ == "__main__":
    run(serve)
