"""The program `keys`: serves the key check to nginx on a Unix socket, and installs renewed TLS certificates."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

import uvicorn

from shoehorn.common.errors import SettingsError
from shoehorn.config.settings import Settings
from shoehorn.gateway.keys.service import KeyService, save_last_used
from shoehorn.gateway.keys.sources import KeySources
from shoehorn.gateway.keys.store import KeyStore
from shoehorn.gateway.tls import CertificateWatch
from shoehorn.runtime import parent_watch
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.server_program import GracefulServer, listen, run, stop_with_parent

log = logging.getLogger("keys")

KEEP_ALIVE_SECONDS = 75
"""For idle connections; nginx closes its own earlier."""


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM."""
    sources = KeySources(settings)
    service = KeyService(sources.current, on_request=WakeRequests(RunDir(settings.run_dir)))

    def names() -> Iterable[str]:
        try:
            return list(sources.current().keys)
        except SettingsError:
            return list(service.last_used)

    server = GracefulServer(uvicorn.Config(
        service, lifespan="off", log_config=None, access_log=False, server_header=False, date_header=False,
        h11_max_incomplete_event_size=5 * settings.max_header_size + (64 << 10),
        timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=1))
    async with asyncio.TaskGroup() as group:  # a failed task stops the service, and supervisord restarts it
        tasks = [group.create_task(save_last_used(service, KeyStore(settings.models_dir), names)),
                 group.create_task(stop_with_parent(parent_watch.supervisor(), server))]
        if settings.tls_cert_file:
            tasks.append(group.create_task(CertificateWatch(settings).run()))
        await server.serve(sockets=[listen(RunDir(settings.run_dir).keys_socket)])
        for task in tasks:
            task.cancel()


class WakeRequests:
    """Asks the engine program to start an engine that was stopped while idle (IDLE_STOP)."""

    def __init__(self, paths: RunDir) -> None:
        self._paths = paths
        self._is_logged = False

    def __call__(self) -> None:
        """Leave the mark unless the engine serves."""
        if self._paths.ready_mark.exists():
            return
        try:
            self._paths.wake_request.touch()
        except OSError as error:
            if not self._is_logged:
                log.error("cannot ask for the engine: path=%s error=%s", self._paths.wake_request, error.strerror)
            self._is_logged = True


if __name__ == "__main__":
    run(serve)
