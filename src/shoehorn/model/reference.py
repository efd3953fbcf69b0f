"""Reference to a model: which one, from where, at which revision, in which format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

Format = Literal["checkpoint", "int4"]


@dataclass(frozen=True)
class ModelRef:
    """Names one model. Holds no secret, so plans, states and logs may carry it.

    Attributes:
        id: OWNER/NAME on a hub, or the path of a folder when `source` is `local`.
        source: `modelscope`, `huggingface` or `local`, as in MODEL_SOURCE.
        revision: branch, tag or commit on the hub.
        format: `checkpoint` as published, or `int4` for its conversion in the volume.
    """

    id: str
    source: str
    revision: str
    format: Format = "checkpoint"

    @property
    def is_int4(self) -> bool:
        """True for the conversion, False for the published checkpoint."""
        return self.format == "int4"

    @property
    def is_local(self) -> bool:
        """True for a folder of the user that is served in place."""
        return self.source == "local" and not self.is_int4

    @property
    def original(self) -> ModelRef:
        """The published checkpoint."""
        return replace(self, format="checkpoint")

    @property
    def converted(self) -> ModelRef:
        """Its INT4 conversion."""
        return replace(self, format="int4")

    @property
    def stored_id(self) -> str:
        """Name of its folder below MODELS_DIR, and of its manifest and locks."""
        if not self.is_int4:
            return self.id
        return f"local/{Path(self.id).resolve().name}.int4" if self.source == "local" else f"{self.id}.int4"

    @property
    def stored_source(self) -> str:
        """The source that its manifest records."""
        return "int4" if self.is_int4 else self.source

    def directory(self, models_dir: Path) -> Path:
        """Return its folder in the volume; for a local checkpoint the user's own folder."""
        return models_dir / self.stored_id
