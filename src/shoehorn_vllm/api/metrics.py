"""Request metrics per API key, in the API server's Prometheus registry: vLLM's /metrics exports them.

Rules: tokens are counted where an answer reports its usage: plain answers always do, OpenAI's streams with
`stream_options.include_usage`, Anthropic's and Responses' streams always. Only the end of an answer is searched.
"""

from __future__ import annotations

import re

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

NO_KEY = "none"
_USAGE = re.compile(rb'"(prompt|input|completion|output)_tokens"\s*:\s*(\d+)')
_KINDS = {b"prompt": "prompt", b"input": "prompt", b"completion": "completion", b"output": "completion"}


class RequestMetrics:
    """The metrics of one API server."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._requests = Counter("shoehorn_requests", "Requests to the API.", ("key", "outcome"), registry=registry)
        self._tokens = Counter("shoehorn_tokens", "Tokens of answers that report their usage.", ("key", "kind"),
                               registry=registry)
        self._running = Gauge("shoehorn_requests_running", "Requests that are admitted and not yet answered.", ("key",),
                              registry=registry)

    def count_request(self, key: str, outcome: str) -> None:
        """Count a finished request: `ok`, `error`, `left` (by its client), `aborted`, or the code of its refusal."""
        self._requests.labels(key, outcome).inc()

    def set_running(self, key: str, number: int) -> None:
        """Set the number of running requests of a key."""
        self._running.labels(key).set(number)

    def count_usage(self, key: str, end: bytes) -> None:
        """Count the tokens that the end of an answer reports, if it does."""
        for kind, tokens in usage(end).items():
            self._tokens.labels(key, kind).inc(tokens)


def usage(end: bytes) -> dict[str, int]:
    """Return `prompt` and `completion` tokens in the end of an answer; the last figure of each counts."""
    return {_KINDS[name]: int(number) for name, number in _USAGE.findall(end)}
