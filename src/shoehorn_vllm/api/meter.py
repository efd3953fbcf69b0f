"""Count of the tokens that the engine processes for one request.

Rules: the middleware sets the meter of a request before the application sees it; the engine's output processor reports
to it (`patches.request_usage`), so that every token counts, whatever the route, the form of the answer, or its end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

from shoehorn.runtime.usage_file import Usage

REPORT_TOKENS = 16
"""Generated tokens that are reported together: reporting each of them would cost a busy server percents of a core."""


class Meter:
    """Counts the tokens of one request, which may have several sequences.

    Args:
        report: gets the name of a LoRA adapter or "", and the usage since the last report.
        priority: for the engine's scheduler; lower is earlier.
    """

    def __init__(self, report: Callable[[str, Usage], None], priority: int = 0) -> None:
        self.priority = priority
        self._report = report
        self._is_counted = self._is_finished = False
        self._adapter = ""
        self._tokens = 0

    def count_prompt(self, adapter: str, tokens: int) -> None:
        """Count a prompt that the engine accepted."""
        requests, self._is_counted = int(not self._is_counted), True
        self._adapter = adapter
        self._report(adapter, Usage(requests, tokens, 0))

    def count_completion(self, tokens: int) -> None:
        """Count generated tokens of any sequence."""
        self._tokens += tokens
        if self._tokens >= REPORT_TOKENS or self._is_finished:
            self._report_completion()

    def finish(self) -> None:
        """Report the rest; tokens that the engine generates until it stops are reported at once."""
        self._is_finished = True
        self._report_completion()

    def _report_completion(self) -> None:
        tokens, self._tokens = self._tokens, 0
        if tokens:
            self._report(self._adapter, Usage(0, 0, tokens))


CURRENT: ContextVar[Meter | None] = ContextVar("shoehorn_meter", default=None)
"""The meter of the request that the current task works for."""
