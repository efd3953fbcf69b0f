"""`shoehorn keys usage`: used tokens by key and model, and budgets; reads the volume only.

Rules: figures are those that the server has saved, up to 15 s old; a day is a day of UTC.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from shoehorn.commands.output import print_table
from shoehorn.common.errors import EXIT_DONE, SettingsError
from shoehorn.config.models_dir import ModelsDir
from shoehorn.config.settings import Settings
from shoehorn.gateway.keys import sources
from shoehorn.gateway.keys.api_key import parse_day
from shoehorn.runtime.usage_file import Account, Period, Usage, UsageFiles, by_key_and_model, day_of, renewal, total
from shoehorn_vllm.protocol import KeyLimits

_DAYS = re.compile(r"([0-9]{1,4})([dw])")
_DAY_SECONDS = 86400


def show(settings: Settings, since: str, as_json: bool) -> int:
    """Print the usage; return the exit code.

    Args:
        since: the first day, or a number of days or weeks; empty for this month.

    Raises:
        SettingsError: `since` is invalid, a usage file is damaged, or the keys are unreadable.
    """
    now = time.time()
    first = _first_day(since, now)
    files = UsageFiles(ModelsDir(settings.models_dir).usage)
    content = {account: usage for month in files.months() if month >= first[:7] or month == day_of(now)[:7]
               for account, usage in files.read(month).items()}
    sums = sorted(by_key_and_model(item for item in content.items() if item[0].day >= first).items())
    limits = {name: key.limits for name, (key, _) in sources.list_keys(settings).items()}
    budgets = _budgets(limits, content, now)
    if as_json:
        print(json.dumps({"since": first, "usage": [_row(place, usage) for place, usage in sums], "budgets": budgets},
                         indent=1))
        return EXIT_DONE
    if not sums:
        print(f"no usage since {first} (UTC)", file=sys.stderr)
    else:
        print(f"since {first} (UTC)")
        print_table([["KEY", "MODEL", "REQUESTS", "TOKENS IN", "TOKENS OUT"], *(
            [*place, str(usage.requests), str(usage.prompt_tokens), str(usage.completion_tokens)]
            for place, usage in sums)])
    if budgets:
        print()
        print_table([["KEY", "BUDGET", "USED", "RENEWED"], *(
            [row["key"], f"{row['limit']} a {row['period']}", f"{row['used']} ({row['used'] / row['limit']:.0%})",
             f"{datetime.fromtimestamp(row['renewed'], UTC):%Y-%m-%d %H:%M}Z"] for row in budgets)])
    return EXIT_DONE


def _first_day(text: str, now: float) -> str:
    """Parse the option; `7d` is today and the six days before."""
    if not text:
        return day_of(now)[:8] + "01"
    if match := _DAYS.fullmatch(text):
        days = max(1, int(match[1]) * (7 if match[2] == "w" else 1))
        return day_of(now - (days - 1) * _DAY_SECONDS)
    try:
        return day_of(parse_day(text))
    except ValueError:
        raise SettingsError(f"--since: invalid time {text!r}.", "Type a day such as 2026-11-01 (UTC), or 7d or 4w.",
                            code="invalid_time") from None


def _row(place: tuple[str, str], usage: Usage) -> dict[str, object]:
    return {"key": place[0], "model": place[1], "requests": usage.requests, "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens}


def _budgets(limits: Mapping[str, KeyLimits], content: Mapping[Account, Usage], now: float) -> list[dict[str, Any]]:
    rows = []
    periods: Sequence[Period] = ("day", "month")
    for period in periods:
        used: dict[str, int] = {}
        for (key, _), usage in total(content, period, now).items():
            used[key] = used.get(key, 0) + usage.tokens
        for key, limit in limits.items():
            tokens = limit.tokens_per_day if period == "day" else limit.tokens_per_month
            if tokens is not None:
                rows.append({"key": key, "period": period, "limit": tokens, "used": used.get(key, 0),
                             "renewed": renewal(period, now)})
    return sorted(rows, key=lambda row: (row["key"], row["period"]))
