"""`shoehorn drain`: make a running appliance ready to be stopped, and wait until it is.

Rules: new requests are refused at once, running ones have DRAIN_TIMEOUT to finish, the rest is aborted with an error;
the appliance then stays up, not ready, until it is stopped, which is quick. Use it as the pre-stop hook of a load
balancer or orchestrator; a stop without it drains as well. Only a restart makes the appliance ready again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

from shoehorn.commands.appliance import require_appliance
from shoehorn.common.errors import EXIT_DONE, ShoehornError
from shoehorn.config import settings as settings_module
from shoehorn.engine import drain
from shoehorn.runtime import shutdown
from shoehorn.runtime.state import Phase, StateFile

_NOTICE_SECONDS = 5
"""Time in which the engine program notices the request, in addition to the drain itself."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no argument."""


def run(_arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Drain; return the exit code.

    Raises:
        ShoehornError: no appliance runs here, or it does not answer.
    """
    settings = settings_module.load(environment)
    require_appliance(settings.run_dir, "drain")
    phase = StateFile(settings.run_dir).read().phase
    if phase is not Phase.READY:
        print(f"nothing to drain: the appliance is not ready ({phase})")
        return EXIT_DONE
    drain.request_drain(settings.run_dir)
    deadline = time.monotonic() + settings.drain_timeout + shutdown.MARGIN_SECONDS + _NOTICE_SECONDS
    while time.monotonic() < deadline:
        ended, result = drain.read_result(settings.run_dir)
        if ended and result:
            print(f"drained: {result.finished} requests finished, {result.aborted} aborted; "
                  "the appliance can be stopped")
            return EXIT_DONE
        if ended:
            break
        time.sleep(0.1)
    raise ShoehornError("Engine: drain timed out; running requests may be cut off.",
                        "Read the log, then stop the container.", code="drain_failed")
