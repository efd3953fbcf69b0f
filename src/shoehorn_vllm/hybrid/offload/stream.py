"""Weights copied from host memory for large batches, into buffers that a stream of its own fills in turn.

Rules:
- a buffer holds one matrix in the checkpoint's layout; the next ones are copied while this one is multiplied;
- the weights do not change, so a copy that was made for a pass that never came stays valid;
- a matrix is unpacked in slices, so that the unpacked weights take `SLICE_BYTES` at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoehorn_vllm.hybrid.kernel.products import PackedWeights
from shoehorn_vllm.hybrid.offload.unpack import unpack

SLICE_BYTES = 64 << 20


@dataclass
class _Buffer:
    """One matrix on the GPU.

    Attributes:
        number: of the matrix that is in it or on its way; -1 for none.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    ready: torch.Event
    free: torch.Event
    number: int = -1


class WeightStream:
    """The buffers, and the stream that fills them.

    Args:
        weights: of all matrices, in pinned host memory.
        buffers: number of matrices that are on the GPU at a time.
    """

    def __init__(self, weights: Sequence[PackedWeights], buffers: int, device: torch.device) -> None:
        self._weights = weights
        codes = max(each.codes.nbytes for each in weights)
        scales = max(each.scales.numel() for each in weights)
        self._stream = torch.Stream(device)
        self._buffers = [_Buffer(torch.empty(codes, dtype=torch.uint8, device=device),
                                 torch.empty(scales, dtype=torch.bfloat16, device=device),
                                 torch.Event("cuda"), torch.Event("cuda")) for _ in range(buffers)]
        for buffer in self._buffers:
            buffer.free.record(torch.cuda.current_stream(device))
        widest = max(each.k for each in weights)
        self._values = torch.empty(max(SLICE_BYTES // 2, widest), dtype=torch.bfloat16, device=device)

    @property
    def depth(self) -> int:
        """Number of matrices that are copied ahead."""
        return len(self._buffers)

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Start the copies of the next matrices, as far as buffers are free.

        Args:
            numbers: at most `depth`, the next one first.
        """
        present = {buffer.number for buffer in self._buffers}
        spare = [buffer for buffer in self._buffers if buffer.number not in numbers]
        for number in numbers:
            if number not in present and spare:
                self._copy(spare.pop(0), number)

    def multiply(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weights.T, bf16 [tokens, rows]; x is bf16 [tokens, k]."""
        self.prefetch([number])
        buffer = next(each for each in self._buffers if each.number == number)
        weights, current = self._weights[number], torch.cuda.current_stream()
        current.wait_event(buffer.ready)
        codes = buffer.codes[:weights.codes.nbytes].view(weights.rows, -1)
        scales = buffer.scales[:weights.scales.numel()].view(weights.rows, -1)
        y = torch.empty(x.shape[0], weights.rows, dtype=x.dtype, device=x.device)
        step = max(1, self._values.numel() // weights.k)
        for first in range(0, weights.rows, step):
            last = min(first + step, weights.rows)
            values = self._values[:(last - first) * weights.k].view(last - first, weights.k)
            unpack(codes[first:last], scales[first:last], values, weights.group)
            torch.mm(x, values.t(), out=y[:, first:last])
        buffer.free.record(current)
        return y

    def _copy(self, buffer: _Buffer, number: int) -> None:
        weights = self._weights[number]
        with self._stream:
            self._stream.wait_event(buffer.free)
            buffer.codes[:weights.codes.nbytes].copy_(weights.codes.view(torch.uint8).view(-1), non_blocking=True)
            buffer.scales[:weights.scales.numel()].copy_(weights.scales.view(-1), non_blocking=True)
            buffer.ready.record(self._stream)
        buffer.number = number
