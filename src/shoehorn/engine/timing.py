"""Waits of the engine program, in seconds.

The defaults hold in production. Tests shorten them by the variable SHOEHORN_TIMING: a JSON object of seconds by the
names below, for example `{"quiet": 2, "patience": 2, "backoff": 0.1}`. Names that are absent keep their default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from shoehorn.common.errors import SettingsError

VARIABLE = "SHOEHORN_TIMING"


@dataclass(frozen=True)
class Timing:
    """Waits of the engine program.

    Attributes:
        tick: between two looks at the engine process.
        look: between two looks of the watchdog at the engine's counters.
        quiet: without a change of the counters until the watchdog sends a probe.
        patience: least time limit of that probe.
        backoff: pause before the first restart; each further one doubles it.
        backoff_limit: longest pause before a restart.
        worker_grace: in which an engine may exit after one of its workers failed.
    """

    tick: float = 0.5
    look: float = 5.0
    quiet: float = 20.0
    patience: float = 20.0
    backoff: float = 1.0
    backoff_limit: float = 30.0
    worker_grace: float = 20.0

    def restart_delay(self, failures: int) -> float:
        """Return the pause before the restart that follows so many failures."""
        return min(self.backoff_limit, self.backoff * 2.0 ** max(0, failures - 1))


def load(environment: Mapping[str, str]) -> Timing:
    """Return the waits, with those of SHOEHORN_TIMING.

    Raises:
        SettingsError: the variable is not a JSON object of positive numbers by known names.
    """
    text = environment.get(VARIABLE, "")
    if not text:
        return Timing()
    try:
        document = json.loads(text)
    except ValueError as error:
        raise SettingsError(f"{VARIABLE}: invalid JSON ({error}).", _REMEDY) from error
    if not isinstance(document, dict):
        raise SettingsError(f"{VARIABLE}: not a JSON object.", _REMEDY)
    for name, seconds in document.items():
        if name not in Timing.__dataclass_fields__ or type(seconds) not in (int, float) or not seconds > 0:
            raise SettingsError(f"{VARIABLE}: invalid entry {name!r}: {seconds!r}.", _REMEDY)
    return Timing(**{name: float(seconds) for name, seconds in document.items()})


_REMEDY = (f"Unset {VARIABLE}, or set a JSON object of positive seconds by name: "
           f"{', '.join(Timing.__dataclass_fields__)}.")
