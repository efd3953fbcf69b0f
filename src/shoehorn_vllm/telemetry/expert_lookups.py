"""Counts of the experts that small passes needed, and where they were: for the exporter, as JSON.

The kernels write each layer's totals into pinned host memory, so that no thread asks the GPU; one adds them up.

Rules:
- one file in the folder that `SHOEHORN_MEMORY_DIR` names, replaced atomically: {"gpu": N, "cpu": N} or
  {"gpu": N, "pcie": N}, since the engine's start;
- written when the counts changed, every `PERIOD_S` seconds at most.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import torch
from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

from shoehorn_vllm.patches import pinned_memory
from shoehorn_vllm.protocol import EXPERTS_FILE, MEMORY_DIR_VARIABLE

PERIOD_S = 5.0
_LAYERS = 4096  # 64 KiB: memory of its own


class Lookups:
    """The counts of all layers: needed experts, and those without a slot.

    Args:
        absent: where experts without a slot are computed (`cpu`) or come from (`pcie`).
    """

    def __init__(self, absent: str) -> None:
        self.counts = pinned_memory.allocate_like(torch.empty(_LAYERS, 2, dtype=torch.int64)).zero_()
        self._absent, self._rows, self._written = absent, 0, (0, 0)

    def row(self) -> torch.Tensor:
        """The next layer's two counts by their address on the GPU."""
        self._rows += 1
        view: torch.Tensor = get_accelerator_view_from_cpu_tensor(self.counts)
        return view[self._rows - 1]

    def start(self) -> None:
        """Start the thread, where the folder is known."""
        if directory := os.environ.get(MEMORY_DIR_VARIABLE):
            threading.Thread(target=self._report, args=(Path(directory) / EXPERTS_FILE,), name="expert lookups",
                             daemon=True).start()

    def write(self, file: Path) -> bool:
        """Write the counts if they changed; return whether they did."""
        needed, absent = (sum(column) for column in zip(*self.counts[:self._rows].tolist(), strict=True))
        if (needed, absent) == self._written:
            return False
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"gpu": needed - absent, self._absent: absent}), encoding="utf-8")
        partial.replace(file)
        self._written = needed, absent
        return True

    def _report(self, file: Path) -> None:
        ended = threading.Event()
        while not ended.wait(PERIOD_S):
            try:
                self.write(file)
            except OSError:  # a full disk, or a folder that a new start replaces: the next time, or never
                continue
