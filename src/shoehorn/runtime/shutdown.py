"""Time limits of a shutdown."""

from __future__ import annotations

MARGIN_SECONDS = 8
"""Time of the API server beyond the drain itself, to deliver the last events and to answer."""

LEAVING_SECONDS = 3.0
"""Time in which a replica still takes requests while its front, which checks every second, learns of the stop."""

ENGINE_STOP_SECONDS = 15
"""Time limit for stopping the engine, SIGKILL included."""
