"""The key service: nginx asks it about each API request (`auth_request`), on a Unix socket of its own.

Rules:
- the answer is 200 with the key's name and limits, 401, or 503 when the keys cannot be trusted; anything else, and no
  answer at all, nginx takes for 503: nobody gets in because something is broken;
- a request carries one key, in `Authorization: Bearer KEY` (the scheme in any case), in `X-Api-Key: KEY`, or the same
  one in both; a header twice, or one that is there and malformed, is 401;
- a change of keys holds from the next request on; an answer that runs is never asked about again;
- it logs no key and no request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

import uvicorn

from shoehorn.common.errors import SettingsError
from shoehorn.common.logging_config import configure
from shoehorn.config import settings as settings_module
from shoehorn.config.settings import Settings
from shoehorn.gateway import tls
from shoehorn.gateway.keys.api_key import Keyring
from shoehorn.gateway.keys.sources import KeySources
from shoehorn.gateway.keys.store import KeyStore
from shoehorn.runtime import parent_watch
from shoehorn.runtime.run_dir import RunDir

log = logging.getLogger("keys")

KEEP_ALIVE_SECONDS = 75
"""For idle connections; nginx closes its own earlier."""
USED_SECONDS = 30.0
TLS_SECONDS = 2.0

Headers = Iterable[tuple[bytes, bytes]]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_BEARER = re.compile(rb"[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9._~+/=-]{8,512})")
_TOKEN = re.compile(rb"[A-Za-z0-9._~+/=-]{8,512}")


def token_of(headers: Headers) -> bytes | None:
    """The one key that a request carries; None when it carries none, or not in the right form."""
    bearers = [value for name, value in headers if name == b"authorization"]
    plain = [value for name, value in headers if name == b"x-api-key"]
    if len(bearers) > 1 or len(plain) > 1:
        return None
    matches = [_BEARER.fullmatch(value) for value in bearers] + [_TOKEN.fullmatch(value) for value in plain]
    tokens = {match[match.re.groups] if match else None for match in matches}
    return tokens.pop() if len(tokens) == 1 else None


class KeyService:
    """The ASGI application.

    Args:
        current: the keys in force; raises SettingsError when they cannot be had.
        now: Unix time in seconds.

    Attributes:
        used: when each key was last used, of this process.
    """

    def __init__(self, current: Callable[[], Keyring], now: Callable[[], float] = time.time) -> None:
        self._current = current
        self._now = now
        self._trouble = ""
        self.used: dict[str, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; what it asks for does not matter, its headers do."""
        status, headers = self.answer(scope["headers"])
        await send({"type": "http.response.start", "status": status,
                    "headers": [*headers, (b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    def answer(self, headers: Headers) -> tuple[int, list[tuple[bytes, bytes]]]:
        """Status and headers for a request with these headers (names in small letters)."""
        try:
            ring = self._current()
        except SettingsError as error:
            self._note(str(error))
            return 503, []
        self._note("")
        token = token_of(list(headers))
        key = ring.find(token) if token is not None else None
        now = self._now()
        if key is None or (key.expires is not None and key.expires <= now):
            return 401, []
        self.used[key.name] = now
        return 200, [(b"x-shoehorn-key", key.name.encode()), (b"x-shoehorn-limits", key.limits.header().encode())]

    def _note(self, trouble: str) -> None:
        """Log when the keys become unavailable, and when they are back."""
        if trouble != self._trouble:
            if trouble:
                log.error("requests are refused with 503: %s", trouble)
            else:
                log.info("the keys are in order again")
            self._trouble = trouble


async def keep_used(service: KeyService, store: KeyStore, names: Callable[[], Iterable[str]]) -> None:
    """Write down now and then, and at the end, when keys were used."""
    noted: dict[str, float] = {}
    complained = False

    def write() -> None:
        nonlocal noted, complained
        if service.used == noted:
            return
        noted = dict(service.used)
        try:
            store.note_used(noted, names())
        except (OSError, SettingsError) as error:
            if not complained:
                log.warning("when keys were used cannot be noted: %s", error)
            complained = True

    try:
        while True:
            await asyncio.sleep(USED_SECONDS)
            await asyncio.to_thread(write)
    finally:
        write()


async def keep_tls(settings: Settings) -> None:
    """Take over a new certificate when its files change; nginx reads what is in force for each new connection."""
    watch = tls.Watch(settings)
    while True:
        await asyncio.sleep(TLS_SECONDS)
        await asyncio.to_thread(watch.look)


async def end_with(supervisor: int, server: uvicorn.Server) -> None:
    """End when supervisord was killed, since nobody else would end this."""
    while os.getppid() == supervisor:
        await asyncio.sleep(1.0)
    server.should_exit = True


def listen(path: Path) -> socket.socket:
    """The service's socket, which only this user may connect to, in the place of one that a dead service left."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    return listener


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM."""
    sources = KeySources(settings)
    service = KeyService(sources.current)

    def names() -> Iterable[str]:
        try:
            return list(sources.current().keys)
        except SettingsError:
            return list(service.used)

    server = _Server(uvicorn.Config(
        service, lifespan="off", log_config=None, access_log=False, server_header=False, date_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=1))
    async with asyncio.TaskGroup() as group:  # a task that fails ends the service, and supervisord starts it again
        tasks = [group.create_task(keep_used(service, KeyStore(settings.models_dir), names))]
        tasks.append(group.create_task(end_with(parent_watch.owner(), server)))
        if settings.tls_cert_file:
            tasks.append(group.create_task(keep_tls(settings)))
        await server.serve(sockets=[listen(RunDir(settings.run_dir).keys_socket)])
        for task in tasks:
            task.cancel()


class _Server(uvicorn.Server):
    """Ends on SIGTERM by returning, where uvicorn would raise the signal again and leave no time to write."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        """Take the signals as uvicorn does, and forget them at the end."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()


def main() -> None:
    """The program that supervisord runs."""
    settings = settings_module.load(os.environ)
    configure(settings.log_format)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(settings))


if __name__ == "__main__":
    main()
