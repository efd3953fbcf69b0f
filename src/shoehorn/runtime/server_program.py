"""Programs that are an ASGI server: the key service, the front, and the reports of a cluster's nodes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path

import uvicorn

from shoehorn.common import logging_config
from shoehorn.common.errors import SettingsError
from shoehorn.config import settings as settings_module
from shoehorn.config.settings import Settings


class GracefulServer(uvicorn.Server):
    """Returns on SIGTERM; uvicorn would raise the signal again and leave no time to save.

    Args:
        before_exit: called after the signal, while requests are still served.
    """

    def __init__(self, config: uvicorn.Config, before_exit: Callable[[], Awaitable[None]] | None = None) -> None:
        super().__init__(config)
        self._before_exit = before_exit

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close all connections, after the work that precedes the exit."""
        if self._before_exit:
            await self._before_exit()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals as uvicorn does, and drop them at the end."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()


def listen(path: Path) -> socket.socket:
    """Bind a socket that only this user may connect to; a stale socket is replaced."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    return listener


async def stop_with_parent(parent: int, server: uvicorn.Server) -> None:
    """Stop the server when supervisord was killed."""
    while os.getppid() == parent:
        await asyncio.sleep(1.0)
    server.should_exit = True


def run(serve: Callable[[Settings], Coroutine[None, None, None]]) -> None:
    """Run a program's server with the environment's settings until it returns."""
    try:
        settings = settings_module.load(os.environ)
    except SettingsError as error:
        sys.exit(f"shoehorn: {error}")
    logging_config.configure(settings.log_format)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(settings))
