"""Execution of the layers in host memory: per forward pass and matrix, by the CPU in place or streamed to the GPU.

A pass of few tokens is limited by the bytes that are read, so the CPU multiplies where the weights are; a pass of many
is limited by arithmetic, so the weights are copied to the GPU. Between them both work at once, each on its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from shoehorn_vllm.hybrid.kernel.products import PackedWeights
from shoehorn_vllm.hybrid.offload.mailbox import Mailbox
from shoehorn_vllm.hybrid.offload.schedule import Level, following, select, streamed_share
from shoehorn_vllm.hybrid.offload.stream import WeightStream


class Executor:
    """The matrices in host memory, in the order in which a forward pass needs them.

    Args:
        levels: by ascending tokens; a larger pass streams everything.
        buffers: matrices on the GPU at a time.
    """

    def __init__(self, levels: Sequence[Level], buffers: int) -> None:
        self._levels = tuple(levels)
        self._buffers = buffers
        self.weights: list[PackedWeights] = []
        self._upcoming: dict[float, list[list[int]]] = {}

    def add(self, weights: PackedWeights) -> int:
        """Append a matrix; its number."""
        self.weights.append(weights)
        return len(self.weights) - 1

    def start(self, device: torch.device) -> None:
        """Allocate the buffers and start the threads, once all matrices are known."""
        self._device = device
        _ = self._stream
        if self._levels:
            _ = self._mailbox

    @cached_property
    def _stream(self) -> WeightStream:
        return WeightStream(self.weights, self._buffers, self._device)

    @cached_property
    def _mailbox(self) -> Mailbox:
        return Mailbox(self.weights, self._levels[-1].tokens, self._device)

    def multiply(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weights.T, bf16 [tokens, rows]; x is bf16 [tokens, k]."""
        share = streamed_share(self._levels, x.shape[0])
        if share <= 0:
            return self._mailbox.multiply(number, x)
        upcoming = self._followers(share)[number]
        if upcoming[0] != number:
            self._stream.prefetch(upcoming)
            return self._mailbox.multiply(number, x)
        y = self._stream.multiply(number, x)
        self._stream.prefetch(upcoming[1:])
        return y

    def _followers(self, share: float) -> list[list[int]]:
        if share not in self._upcoming:
            streamed = select([each.nbytes for each in self.weights], share)
            self._upcoming[share] = following(len(self.weights), streamed, self._stream.depth)
        return self._upcoming[share]
