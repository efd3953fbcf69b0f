"""Key check for nginx (`auth_request`): the ASGI application of the key service.

Rules:
- the answer is 200 with the key's name and limits, 401 with the reason, or 503 when the keys are unavailable; nginx
  treats any other answer, and none, as 503: no failure admits a request;
- a request carries one key, in `Authorization: Bearer KEY` (the scheme in any case), in `X-Api-Key: KEY`, or the same
  one in both; a repeated or malformed header is 401;
- a change of keys holds from the next request on; running requests are not checked again;
- no key and no request is logged.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from shoehorn.common.errors import SettingsError
from shoehorn.gateway.keys.api_key import Keyring
from shoehorn.gateway.keys.store import KeyStore
from shoehorn_vllm.protocol import KEY_HEADER, LIMITS_HEADER, REFUSAL_HEADER

log = logging.getLogger("keys")

SAVE_SECONDS = 30.0
METHOD_HEADER = b"x-shoehorn-method"
"""Header with the method of the client's request; nginx sets it."""

Headers = Iterable[tuple[bytes, bytes]]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_BEARER = re.compile(rb"[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9._~+/=-]{8,512})")
_TOKEN = re.compile(rb"[A-Za-z0-9._~+/=-]{8,512}")


def find_token(headers: Headers) -> bytes:
    """Find the one key of a request.

    Raises:
        RefusedKeyError: the request carries none, several, or one in an invalid form.
    """
    bearers = [value for name, value in headers if name == b"authorization"]
    plain = [value for name, value in headers if name == b"x-api-key"]
    if not bearers and not plain:
        raise RefusedKeyError("missing")
    if len(bearers) > 1 or len(plain) > 1:
        raise RefusedKeyError("repeated")
    matches = [_BEARER.fullmatch(value) for value in bearers] + [_TOKEN.fullmatch(value) for value in plain]
    tokens = {match[match.re.groups] for match in matches if match}
    if None in matches:
        raise RefusedKeyError("malformed")
    if len(tokens) > 1:
        raise RefusedKeyError("conflicting")
    return tokens.pop()


class RefusedKeyError(Exception):
    """The request has no valid key; the argument is the reason (`error_messages.REFUSED_KEYS`)."""


class KeyService:
    """The ASGI application.

    Args:
        load: returns the valid keys; raises SettingsError when they are unavailable.
        now: Unix time in seconds.
        on_request: called for each admitted request that needs the engine (POST).

    Attributes:
        last_used: when each key was last used, of this process.
    """

    def __init__(self, load: Callable[[], Keyring], now: Callable[[], float] = time.time,
                 on_request: Callable[[], None] | None = None) -> None:
        self._load = load
        self._on_request = on_request
        self._now = now
        self._problem = ""
        self.last_used: dict[str, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; only its headers matter."""
        status, headers = self.answer(scope["headers"])
        await send({"type": "http.response.start", "status": status,
                    "headers": [*headers, (b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    def answer(self, headers: Headers) -> tuple[int, list[tuple[bytes, bytes]]]:
        """Return status and headers for a request with these headers (names in lowercase)."""
        headers = list(headers)
        try:
            ring = self._load()
        except SettingsError as error:
            self._log_change(str(error))
            return 503, []
        self._log_change("")
        now = self._now()
        try:
            key = ring.find(find_token(headers))
            if key is None:
                raise RefusedKeyError("incorrect")
            if key.expires is not None and key.expires <= now:
                raise RefusedKeyError("expired")
        except RefusedKeyError as refusal:
            return 401, [(REFUSAL_HEADER.lower().encode(), str(refusal).encode())]
        self.last_used[key.name] = now
        if self._on_request and (METHOD_HEADER, b"POST") in headers:
            self._on_request()
        return 200, [(KEY_HEADER.lower().encode(), key.name.encode()),
                     (LIMITS_HEADER.lower().encode(), key.limits.to_header().encode())]

    def _log_change(self, problem: str) -> None:
        """Log once when the keys become unavailable, and once when they are available again."""
        if problem != self._problem:
            if problem:
                log.error("API keys unavailable, refusing all requests: status=503 error=%s", problem)
            else:
                log.info("API keys available again")
            self._problem = problem


async def save_last_used(service: KeyService, store: KeyStore, names: Callable[[], Iterable[str]]) -> None:
    """Save the times of last use every 30 s, and when cancelled."""
    saved: dict[str, float] = {}
    is_logged = False

    def write() -> None:
        nonlocal saved, is_logged
        if service.last_used == saved:
            return
        saved = dict(service.last_used)
        try:
            store.save_last_used(saved, names())
        except (OSError, SettingsError) as error:
            if not is_logged:
                log.warning("cannot save last-used times of API keys: error=%s", error)
            is_logged = True

    try:
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            await asyncio.to_thread(write)
    finally:
        write()
