"""Counts for each key, by its name, in the API server's own Prometheus registry: vLLM's /metrics carries them.

Rules: tokens are counted where an answer shows its usage (a plain answer always does, a stream when the client asks
with `stream_options.include_usage`, Anthropic's and Responses' streams always); only the end of an answer is looked at.
"""

from __future__ import annotations

import re

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

NO_KEY = "none"
_USAGE = re.compile(rb'"(prompt|input|completion|output)_tokens"\s*:\s*(\d+)')
_KINDS = {b"prompt": "prompt", b"input": "prompt", b"completion": "completion", b"output": "completion"}


class Counts:
    """The counters of one API server."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._requests = Counter("shoehorn_requests", "Requests to the API.", ("key", "outcome"), registry=registry)
        self._tokens = Counter("shoehorn_tokens", "Tokens of answers that show their usage.", ("key", "kind"),
                               registry=registry)
        self._running = Gauge("shoehorn_requests_running", "Requests that are admitted and not yet answered.", ("key",),
                              registry=registry)

    def request(self, key: str, outcome: str) -> None:
        """One request has ended: `ok`, `error`, `left` (by its client), `aborted`, or the code it was refused with."""
        self._requests.labels(key, outcome).inc()

    def running(self, key: str, number: int) -> None:
        """So many requests of a key run."""
        self._running.labels(key).set(number)

    def usage(self, key: str, end: bytes) -> None:
        """Count what the end of an answer says of its tokens; nothing where it says nothing."""
        for kind, tokens in usage(end).items():
            self._tokens.labels(key, kind).inc(tokens)


def usage(end: bytes) -> dict[str, int]:
    """`prompt` and `completion` tokens in the end of an answer; the last figure of each counts."""
    return {_KINDS[name]: int(number) for name, number in _USAGE.findall(end)}
