"""The journal of a conversion: what is written to disk to resume it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shoehorn import __version__
from shoehorn.common.atomic_file import write_atomic
from shoehorn.int4.layout import Bits

log = logging.getLogger("convert")

JOURNAL = "conversion.json"
VERSION = 1


@dataclass(frozen=True)
class Journal:
    """How far a conversion is.

    Attributes:
        source: model, revision and commit, and by the name of each shard its SHA-256, or for one's own folder its size
            and time of change.
        embedding, head: bits, 16 for as they are; group: weights that share a scale.
        shards: by name, what is done: size, sha256, and the relative error |w - w'| / |w| by tensor.
    """

    source: Mapping[str, Any]
    embedding: int
    head: int
    group: int
    tool: str = f"shoehorn {__version__}"
    shards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def bits(self) -> Bits:
        """As `int4_layout` takes it."""
        return Bits(self.embedding, self.head)

    def write(self, directory: Path) -> None:
        """Replace the journal; durable when it returns."""
        write_atomic(directory / JOURNAL, json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n")


def read_journal(directory: Path) -> Journal | None:
    """The journal of a conversion; None where there is none that can be understood."""
    try:
        document = json.loads((directory / JOURNAL).read_text(encoding="utf-8"))
        if document.pop("version") != VERSION:
            return None
        found = Journal(**document)
        known, sizes = dict(found.source["shards"]), [entry["size"] for entry in found.shards.values()]
        if not set(found.shards) <= set(known) or not all(type(size) is int for size in sizes):
            raise ValueError("its shards are none of the source's")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be used (%s); the conversion begins anew", directory / JOURNAL, error)
        return None
