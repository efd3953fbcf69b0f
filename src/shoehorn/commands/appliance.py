"""The running appliance that a command talks to."""

from __future__ import annotations

from pathlib import Path

from shoehorn.common.errors import ShoehornError
from shoehorn.runtime.run_dir import RunDir


def require_appliance(run_dir: Path, command: str) -> None:
    """Check that an appliance runs with this RUN_DIR.

    Raises:
        ShoehornError: none does.
    """
    if not RunDir(run_dir).state.exists():
        raise ShoehornError(f"RUN_DIR={run_dir}: no appliance is running.",
                            f"In compose, type: docker compose exec shoehorn shoehorn {command}", code="not_running")
