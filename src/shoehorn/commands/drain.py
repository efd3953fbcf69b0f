"""`shoehorn drain`: make a running appliance ready to be stopped, and wait until it is.

Rules: new requests are refused at once, running ones get DRAIN_TIMEOUT to finish, the rest is ended with an error; the
appliance then stays up, not ready, until it is stopped, which is quick. It is what a load balancer's or an
orchestrator's hook before the stop should call; a stop without it drains as well. Nothing brings the appliance back but
a new start.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

from shoehorn.common.errors import EXIT_DONE, ShoehornError
from shoehorn.config import settings as settings_module
from shoehorn.engine import drain
from shoehorn.runtime import shutdown
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase, StateFile

_NOTICE_SECONDS = 5
"""How long the engine program may take to see the request, beyond the drain itself."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(_arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Drain; returns the exit code.

    Raises:
        ShoehornError: no appliance runs here, or it does not answer.
    """
    settings = settings_module.load(environment)
    if not RunDir(settings.run_dir).state.exists():
        raise ShoehornError(f"No appliance runs with RUN_DIR={settings.run_dir}.",
                            "In compose, type: docker compose exec shoehorn shoehorn drain")
    states = StateFile(settings.run_dir)
    phase = states.read().phase
    if phase is not Phase.READY:
        print(f"nothing to drain: the appliance is not ready ({phase})")
        return EXIT_DONE
    drain.request(settings.run_dir)
    deadline = time.monotonic() + settings.drain_timeout + shutdown.MARGIN_SECONDS + _NOTICE_SECONDS
    while time.monotonic() < deadline:
        over, outcome = drain.published(settings.run_dir)
        if over and outcome:
            print(f"drained: {outcome.finished} requests finished, {outcome.aborted} aborted; "
                  "the appliance can be stopped")
            return EXIT_DONE
        if over:
            break
        time.sleep(0.1)
    raise ShoehornError("The engine does not answer; requests that run may be cut off.",
                        "Look at the log, and stop the container.")
