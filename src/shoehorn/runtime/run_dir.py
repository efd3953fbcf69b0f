"""Layout of RUN_DIR."""

from __future__ import annotations

from pathlib import Path

from shoehorn.config.settings import Settings


def engine_socket(settings: Settings) -> Path:
    """Where vLLM listens."""
    return settings.run_dir / "engine.sock"
