"""Hidden states of the calibration sequences, in two files of the volume: inputs and outputs of the current layer.

Rules: the files are mapped, so the page cache holds what fits; after a layer its outputs become the next layer's
inputs. They are not synced, which would write gigabytes for each layer: a killed process leaves them complete, and
after a power failure their CRC-32 differs, so that the calibration starts over.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import torch

_STEP_BYTES = 1 << 20


class HiddenStates:
    """Two files of hidden states.

    Args:
        shape: sequences, length, hidden size.
    """

    def __init__(self, directory: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self._directory, self._shape, self._dtype = directory, shape, dtype

    @property
    def bytes(self) -> int:
        """Size of one file."""
        sequences, length, width = self._shape
        return sequences * length * width * self._dtype.itemsize

    def of(self, layer: int) -> torch.Tensor:
        """Return the inputs of a layer, [sequences, length, hidden], shared with the file."""
        path = self._path(layer)
        if not path.exists() or path.stat().st_size != self.bytes:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self.bytes)
        elements = self.bytes // self._dtype.itemsize
        return torch.from_file(str(path), shared=True, size=elements, dtype=self._dtype).view(self._shape)

    def crc(self, layer: int) -> int | None:
        """Return the CRC-32 of the inputs of a layer; None if missing."""
        try:
            total = 0
            with self._path(layer).open("rb") as file:
                while data := file.read(_STEP_BYTES):
                    total = zlib.crc32(data, total)
            return total
        except FileNotFoundError:
            return None

    def _path(self, layer: int) -> Path:
        return self._directory / f"hidden.{layer % 2}"
