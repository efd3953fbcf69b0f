"""Request metrics per API key, in the API server's Prometheus registry: vLLM's /metrics exports them.
"""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from shoehorn.runtime.usage_file import Usage
from shoehorn_vllm.protocol import KeyLimits

NO_KEY = "none"


class RequestMetrics:
    """The metrics of one API server."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._requests = Counter("shoehorn_requests", "Requests to the API.", ("key", "outcome"), registry=registry)
        self._tokens = Counter("shoehorn_tokens", "Tokens that the engine processed.", ("key", "kind"),
                               registry=registry)
        self._running = Gauge("shoehorn_requests_running", "Requests that are admitted and not yet answered.", ("key",),
                              registry=registry)
        self._budgets = Gauge("shoehorn_tokens_limit", "Token budget of a key.", ("key", "period"),
                              registry=registry)
        self._with_budget: set[tuple[str, str]] = set()

    def count_request(self, key: str, outcome: str) -> None:
        """Count a finished request: `ok`, `error`, `left` (by its client), `aborted`, or the code of its refusal."""
        self._requests.labels(key, outcome).inc()

    def set_running(self, key: str, number: int) -> None:
        """Set the number of running requests of a key."""
        self._running.labels(key).set(number)

    def count_tokens(self, key: str, usage: Usage) -> None:
        """Count tokens that the engine processed for a key."""
        self._tokens.labels(key, "prompt").inc(usage.prompt_tokens)
        self._tokens.labels(key, "completion").inc(usage.completion_tokens)

    def set_budgets(self, key: str, limits: KeyLimits) -> None:
        """Set the token budgets of a key; the ones it lacks are removed."""
        for period, tokens in (("day", limits.tokens_per_day), ("month", limits.tokens_per_month)):
            if tokens is not None:
                self._budgets.labels(key, period).set(tokens)
                self._with_budget.add((key, period))
            elif (key, period) in self._with_budget:
                self._budgets.remove(key, period)
                self._with_budget.remove((key, period))
