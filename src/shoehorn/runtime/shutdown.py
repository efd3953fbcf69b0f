"""Time limits of a shutdown."""

from __future__ import annotations

MARGIN_SECONDS = 8
"""Time of the API server beyond the drain itself, to deliver the last events and to answer."""

ENGINE_STOP_SECONDS = 15
"""Time limit for stopping the engine, SIGKILL included."""
