"""The engine's own metrics, fetched from its Unix socket while a scrape is answered.

Rules: an engine that is not there is normal while the model is pulled or loaded; text is handed on only when Prometheus
would take it together with ours, because one bad family would cost the whole scrape.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.parser import text_string_to_metric_families

OWN_PREFIX = "shoehorn_"
MIDDLEWARE_PREFIXES = ("shoehorn_requests", "shoehorn_tokens")
"""What the appliance's middleware (`shoehorn_vllm`) counts inside the engine's API server."""

MOST_BYTES = 16 << 20


@dataclass(frozen=True)
class EngineScrape:
    """What one fetch brought.

    Attributes:
        text: Prometheus text format 0.0.4, ending in a line end; empty unless `success`.
        duration_seconds: how long the engine took; None when nobody listens.
        problem: what is wrong with an engine that does listen; else empty.
    """

    success: bool = False
    text: str = ""
    duration_seconds: float | None = None
    problem: str = ""


class EngineSource:
    """The engine behind `socket`; thread-safe.

    Args:
        limit_seconds: the longest that a fetch may take, all in all.
    """

    def __init__(self, socket: Path, limit_seconds: float) -> None:
        self._limit_seconds = limit_seconds
        # No connection is kept: the engine may be another one the next time.
        transport = httpx.HTTPTransport(uds=str(socket), limits=httpx.Limits(max_keepalive_connections=0))
        self._client = httpx.Client(transport=transport, timeout=limit_seconds, headers={
            "Accept": CONTENT_TYPE_PLAIN_0_0_4, "Accept-Encoding": "identity"})

    def scrape(self) -> EngineScrape:
        """Fetch once; a failure is part of the result, never an exception."""
        begun = time.monotonic()
        try:
            text = self._fetch(begun + self._limit_seconds)
            problem = why_invalid(text)
        except httpx.ConnectError:
            return EngineScrape()
        except (httpx.RequestError, ValueError) as error:
            text, problem = "", str(error) or type(error).__name__
        duration = time.monotonic() - begun
        if problem:
            return EngineScrape(duration_seconds=duration, problem=problem)
        return EngineScrape(True, text, duration)

    def close(self) -> None:
        """Release the connections."""
        self._client.close()

    def _fetch(self, deadline: float) -> str:
        """The body. Raises ValueError when it is too slow, too long, or not what was asked for."""
        body = bytearray()
        with self._client.stream("GET", "http://engine/metrics") as response:
            kind = response.headers.get("Content-Type", "")
            if response.status_code != httpx.codes.OK or not kind.startswith("text/plain"):
                raise ValueError(f"it answered {response.status_code} with {kind or 'no content type'}")
            for chunk in response.iter_bytes():
                body += chunk
                if time.monotonic() > deadline:
                    raise ValueError(f"its answer took longer than {self._limit_seconds:g} s")
                if len(body) > MOST_BYTES:
                    raise ValueError(f"its answer is longer than {MOST_BYTES} bytes")
        text = body.decode("utf-8")
        return text if text.endswith("\n") else text + "\n"


def why_invalid(text: str) -> str:
    """Why `text` cannot stand behind our own metrics; empty when it can."""
    seen: set[str] = set()
    try:
        for family in text_string_to_metric_families(text):
            if family.name in seen:
                return f"the family {family.name} comes twice"
            if family.name.startswith(OWN_PREFIX) and not family.name.startswith(MIDDLEWARE_PREFIXES):
                return f"the family {family.name} has our own prefix"
            seen.add(family.name)
    except ValueError as error:
        return f"it is not Prometheus text: {error}"
    return ""
