"""Fetches the engine's own metrics from its Unix socket during a scrape.

Rules: a missing engine is normal while the model is pulled or loaded; the text is passed on only if Prometheus would
accept it together with the appliance's, because one invalid family fails the whole scrape.
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
"""Metrics of the appliance's middleware (`shoehorn_vllm`) inside the engine's API server."""

MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class EngineScrape:
    """Result of one fetch.

    Attributes:
        text: Prometheus text format 0.0.4, ending in a newline; empty unless `success`.
        duration_seconds: of the engine's answer; None when no engine listens.
        problem: error of an engine that listens; else empty.
    """

    success: bool = False
    text: str = ""
    duration_seconds: float | None = None
    problem: str = ""


class EngineSource:
    """The engine behind `socket`; thread-safe.

    Args:
        limit_seconds: time limit of a whole fetch.
    """

    def __init__(self, socket: Path, limit_seconds: float) -> None:
        self._limit_seconds = limit_seconds
        # No connection is reused: the next scrape may reach another engine.
        transport = httpx.HTTPTransport(uds=str(socket), limits=httpx.Limits(max_keepalive_connections=0))
        self._client = httpx.Client(transport=transport, timeout=limit_seconds, headers={
            "Accept": CONTENT_TYPE_PLAIN_0_0_4, "Accept-Encoding": "identity"})

    def scrape(self) -> EngineScrape:
        """Fetch once; a failure is returned, never raised."""
        started = time.monotonic()
        try:
            text = self._fetch(started + self._limit_seconds)
            problem = find_problem(text)
        except httpx.ConnectError:
            return EngineScrape()
        except (httpx.RequestError, ValueError) as error:
            text, problem = "", str(error) or type(error).__name__
        duration = time.monotonic() - started
        if problem:
            return EngineScrape(duration_seconds=duration, problem=problem)
        return EngineScrape(True, text, duration)

    def close(self) -> None:
        """Release the connections."""
        self._client.close()

    def _fetch(self, deadline: float) -> str:
        """Fetch the body. Raises ValueError when it is too slow, too long, or has another type."""
        body = bytearray()
        with self._client.stream("GET", "http://engine/metrics") as response:
            kind = response.headers.get("Content-Type", "")
            if response.status_code != httpx.codes.OK or not kind.startswith("text/plain"):
                raise ValueError(f"unexpected answer: status={response.status_code} content_type={kind or 'missing'}")
            for chunk in response.iter_bytes():
                body += chunk
                if time.monotonic() > deadline:
                    raise ValueError(f"timed out after {self._limit_seconds:g} s")
                if len(body) > MAX_BYTES:
                    raise ValueError(f"answer exceeds {MAX_BYTES} bytes")
        text = body.decode("utf-8")
        return text if text.endswith("\n") else text + "\n"


def find_problem(text: str) -> str:
    """Find a reason why `text` cannot follow the appliance's metrics; empty when it can."""
    names: set[str] = set()
    try:
        for family in text_string_to_metric_families(text):
            if family.name in names:
                return f"duplicate family {family.name}"
            if family.name.startswith(OWN_PREFIX) and not family.name.startswith(MIDDLEWARE_PREFIXES):
                return f"reserved prefix of family {family.name}"
            names.add(family.name)
    except ValueError as error:
        return f"invalid Prometheus text: {error}"
    return ""
