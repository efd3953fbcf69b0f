"""Token budgets of API keys: tokens of prompts and answers in a day and in a calendar month, both of UTC.

Rules: a request is refused once the budget is used up; running answers are completed, so that a key can exceed its
budget by the answers that run at that time.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime

from shoehorn.runtime.usage_file import Period, renewal
from shoehorn_vllm.api.errors import Failure
from shoehorn_vllm.api.ledger import UsageLedger
from shoehorn_vllm.protocol import KeyLimits

CODE = "insufficient_quota"
"""OpenAI's own code of an exhausted budget, which clients know."""


def check(ledger: UsageLedger, key: str, limits: KeyLimits, now: float) -> Failure | None:
    """Return why a request of a key is refused; None while its budgets last. `now`: Unix time in seconds."""
    budgets: dict[Period, int | None] = {"month": limits.tokens_per_month, "day": limits.tokens_per_day}
    for period, budget in budgets.items():
        if budget is not None and (used := ledger.used(key, period)) >= budget:
            return _exhausted(period, budget, used, now)
    return None


def _exhausted(period: Period, budget: int, used: int, now: float) -> Failure:
    begin = renewal(period, now)
    moment = f"{datetime.fromtimestamp(begin, UTC):%Y-%m-%d %H:%M} UTC"
    return Failure(429, CODE, f"This key has used its budget: {used} of {budget} tokens per {period}. The budget is "
                   f"renewed at {moment}.", math.ceil(begin - now), is_final=True)
