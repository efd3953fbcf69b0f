"""Calibration as seen by the conversion of shards: layers are quantized before the shards that contain them.

Rules: torch and transformers are imported only for a calibrated conversion; without one every weight is quantized from
its values alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from shoehorn.int4 import layout
from shoehorn.int4.journal import Journal, Limits
from shoehorn.int4.layout import ShardLayout
from shoehorn.model.files import LocalFiles
from shoehorn.model.safetensors import header
from shoehorn.model.tensor_names import IN_LAYER

if TYPE_CHECKING:
    import torch

    from shoehorn.int4.calibration.run import Calibration

COMPLETE = "output_errors"
"""Key of the journal's calibration that exists once every layer is calibrated."""


class Codes(Protocol):
    """Source of codes that are not derived from the values of a weight alone."""

    def has(self, name: str) -> bool:
        """Return whether a weight has such codes."""

    def rows(self, name: str, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return packed codes and scales of some rows of a weight."""


class DataFree:
    """No calibration."""

    def has(self, name: str) -> bool:
        """Return whether a weight has calibrated codes."""
        return False

    def rows(self, name: str, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Raise: a data-free conversion has no such codes."""
        raise KeyError(name)

    def advance(self, shard: ShardLayout) -> None:
        """Do nothing before a shard."""

    def release(self, recorded: Iterable[str]) -> None:
        """Do nothing after a shard."""

    def complete(self, journal: Journal) -> Journal:
        """Return the journal unchanged."""
        return journal


class Calibrated:
    """A calibration and the shards that wait for it.

    Args:
        remaining: shards that are not converted yet.
    """

    def __init__(self, calibration: Calibration, remaining: Sequence[ShardLayout]) -> None:
        self._calibration = calibration
        self._layers = {shard.name: _layers(shard) for shard in remaining}
        self._released: set[int] = set()

    def has(self, name: str) -> bool:
        """Return whether a weight has calibrated codes."""
        return self._calibration.has(name)

    def rows(self, name: str, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return packed codes and scales of some rows of a weight."""
        return self._calibration.rows(name, begin, end)

    def advance(self, shard: ShardLayout) -> None:
        """Calibrate the layers of a shard and all before them."""
        self._calibration.advance(self._layers[shard.name])

    def release(self, recorded: Iterable[str]) -> None:
        """Delete the state of layers whose shards are recorded."""
        waiting = set().union(*(layers for name, layers in self._layers.items() if name not in set(recorded)))
        done = set().union(*self._layers.values()) - waiting - self._released
        self._calibration.release(done)
        self._released |= done

    def complete(self, journal: Journal) -> Journal:
        """Return the journal with the errors and the loss."""
        return replace(journal, calibration={**(journal.calibration or {}), **self._calibration.results})


def describe(setting: str, source: Path, directory: Path, limits: Limits) -> dict[str, Any] | None:
    """Decide whether a conversion is calibrated; see `calibration.prepare`."""
    if setting == "off":
        return None
    from shoehorn.int4.calibration import prepare  # imports torch and transformers

    return prepare.describe(setting, source, directory, limits)


def start(journal: Journal, source: Path, directory: Path, remaining: Sequence[ShardLayout],
          count: Callable[[float], None]) -> Calibrated | DataFree:
    """Begin or resume the calibration that the journal describes.

    Args:
        count: called with finished shares of the calibration.

    Raises:
        ModelUnavailableError: the state of the calibration is damaged.
    """
    if journal.calibration is None or COMPLETE in journal.calibration or not remaining:
        return DataFree()
    from shoehorn.int4.calibration import prepare, run  # import torch and transformers

    task = prepare.task(journal.calibration, source, directory, journal.group, frozenset(_weights(source)))
    return Calibrated(run.Calibration(task, count), remaining)


def remove(directory: Path) -> None:
    """Delete the state of a completed calibration."""
    import shutil

    shutil.rmtree(directory / layout.CALIBRATION_FOLDER, ignore_errors=True)


def source_bytes(source: Path) -> int:
    """Return the bytes of the weights that a calibration quantizes."""
    return sum(_weights(source).values())


def _weights(source: Path) -> Mapping[str, int]:
    files = LocalFiles(source)
    return {tensor.name: tensor.bytes for name, size in files.names().items() if name.endswith(".safetensors")
            for tensor in header(files, name, size) if layout.kind(tensor) == "linear"}


def _layers(shard: ShardLayout) -> set[int]:
    matches = (IN_LAYER.fullmatch(item.source.name) for item in shard.tensors if item.bits == 4)
    return {int(match[1]) for match in matches if match}
