"""Memory plan of a calibration: device, sequences in one forward pass, and columns quantized together.

Rules: one layer is in memory at a time; what it leaves of the budget is divided between the matrices H of a pass, and
the work on one of them (H, its factor, and rows of weights); a GPU that is too small is not used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

TOKENS_ON_GPU = 131_072
TOKENS_ON_CPU = 16_384
"""Calibration tokens; more of them cost time in proportion."""

LENGTH = 1024
_COPIES = 5
"""Matrices of one span's size that quantizing needs: H, ordered H, inverse, factor, and temporary storage."""

_ROW_COPIES = 6
_GPU_SHARE = 0.85
_HOST_SHARE = 0.6
_HOST_BASE_BYTES = 1 << 30
_MIN_COLUMNS = 512


@dataclass(frozen=True)
class LayerSize:
    """Largest sizes over the layers of a model.

    Attributes:
        parameters: of one layer.
        columns: of its widest matrix.
        activations: elements of one token within a layer, for the forward pass.
    """

    parameters: int
    columns: int
    activations: int


@dataclass(frozen=True)
class Budget:
    """Memory plan.

    Attributes:
        device: `cuda` or `cpu`.
        dtype: of weights and hidden states.
        batch: sequences in one forward pass.
        columns: most columns of a span.
        pass_bytes: of all matrices H of one pass.
        rows: rows of a weight quantized together.
        threads: of torch on the CPU; another number rounds sums differently.
        total_bytes: planned peak, without torch itself.
    """

    device: str
    dtype: torch.dtype
    batch: int
    columns: int
    pass_bytes: int
    rows: int
    threads: int
    total_bytes: int


def plan(layer: LayerSize, length: int, dtype: torch.dtype, gpu_bytes: int, host_bytes: int) -> Budget:
    """Plan for the GPU if it has enough free memory, else for the CPU.

    Args:
        gpu_bytes: free memory of the GPU; 0 without one.
        host_bytes: available host memory; 0 if unknown.
    """
    if gpu_bytes:
        budget = _plan("cuda", layer, length, dtype, int(gpu_bytes * _GPU_SHARE))
        if budget.columns >= min(_MIN_COLUMNS, layer.columns):
            return budget
    host = int((host_bytes or 8 << 30) * _HOST_SHARE) - _HOST_BASE_BYTES
    return _plan("cpu", layer, length, torch.float32, host)


def _plan(device: str, layer: LayerSize, length: int, dtype: torch.dtype, total: int) -> Budget:
    weights = 2 * layer.parameters * dtype.itemsize  # the layer, and at most as much stacked to be quantized together
    sequence = layer.activations * length * 4
    rest = max(total - weights, 0)
    batch = max(1, min(8, rest // 4 // sequence))
    rest = max(rest - batch * sequence, 0)
    columns = int(math.sqrt(rest * 0.5 / (4 * _COPIES)))
    columns = max(min(columns, layer.columns), min(128, layer.columns))
    rows = max(64, int(rest * 0.2) // (4 * _ROW_COPIES * columns))
    pass_bytes = max(int(rest * 0.3), 4 * columns * columns)
    used = weights + batch * sequence + _COPIES * 4 * columns ** 2 + pass_bytes + _ROW_COPIES * 4 * rows * columns
    return Budget(device, dtype, batch, columns, pass_bytes, rows, torch.get_num_threads(), used)


def sequence_count(device: str, length: int, tokens: int | None) -> int:
    """Return the number of calibration sequences of `length` tokens; `tokens` in all, or by the device."""
    return max(1, (tokens or (TOKENS_ON_GPU if device == "cuda" else TOKENS_ON_CPU)) // length)
