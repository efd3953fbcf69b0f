"""Time limits of a shutdown."""

from __future__ import annotations

MARGIN_SECONDS = 8
"""What the API server may take beyond the drain itself: for its clients to take the last events, and a moment."""

ENGINE_STOP_SECONDS = 15
"""The longest that ending the engine takes, SIGKILL included."""
