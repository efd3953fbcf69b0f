"""Journal of a conversion: the state on disk from which it resumes."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shoehorn import __version__
from shoehorn.common.atomic_file import write_atomic
from shoehorn.int4.layout import BitWidths

log = logging.getLogger("convert")

JOURNAL = "conversion.json"
VERSION = 1


@dataclass(frozen=True)
class Limits:
    """Limits of a calibration.

    Attributes:
        host_bytes: available host memory; 0 if unknown.
        cpus: that may be used; 0 for all.
        tokens: of the calibration; None to decide by the device.
    """

    host_bytes: int = 0
    cpus: float = 0.0
    tokens: int | None = None


UNLIMITED = Limits()
"""All CPUs, unknown memory, and the device's number of tokens."""


@dataclass(frozen=True)
class Journal:
    """State of a conversion.

    Attributes:
        source: model, revision and commit, and for each shard its SHA-256, or for a local folder its size and time.
        bits: of embedding and head.
        group: weights that share a scale.
        shards: converted shards by name: size, sha256, and relative error |w - w'| / |w| by tensor.
        calibration: text, sequences and memory plan of the calibration, and when it is complete the errors of outputs
            and the measured loss; None for a data-free conversion.
    """

    source: Mapping[str, Any]
    bits: BitWidths
    group: int
    tool: str = f"shoehorn {__version__}"
    shards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None

    def write(self, directory: Path) -> None:
        """Replace the journal durably."""
        document = {"version": VERSION, "source": self.source, **asdict(self.bits), "group": self.group,
                    "tool": self.tool, "shards": self.shards, "calibration": self.calibration}
        write_atomic(directory / JOURNAL, json.dumps(document, indent=1) + "\n")


def read_journal(directory: Path) -> Journal | None:
    """Return the journal of a conversion; None if missing or invalid."""
    try:
        document = json.loads((directory / JOURNAL).read_text(encoding="utf-8"))
        if document.pop("version") != VERSION:
            return None
        bits = BitWidths(document.pop("embedding"), document.pop("head"))
        journal = Journal(**document, bits=bits)
        originals, sizes = dict(journal.source["shards"]), [entry["size"] for entry in journal.shards.values()]
        if not set(journal.shards) <= set(originals) or not all(type(size) is int for size in sizes):
            raise ValueError("unknown shards")
        return journal
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("Invalid journal, restarting the conversion path=%s error=%s", directory / JOURNAL, error)
        return None
