"""Model reference from settings."""

from __future__ import annotations

from shoehorn.config.settings import Settings
from shoehorn.model.reference import ModelRef


def model_reference(settings: Settings) -> ModelRef:
    """Return the published checkpoint that MODEL_ID, MODEL_SOURCE and MODEL_REVISION name."""
    return ModelRef(settings.model_id, settings.model_source, settings.model_revision)
