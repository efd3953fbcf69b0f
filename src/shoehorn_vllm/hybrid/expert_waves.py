"""Large passes over experts in host memory: they arrive on the GPU in waves, while the wave before is computed.

Two stages are filled in turn by a stream of their own with experts in the checkpoint's layout; a wave is repacked from
its stage into the scratch and multiplied there. All layers share them; the first waves of the next layer are copied
while the last one of this layer is computed. The GPU's copy engines copy, since a kernel that reads over PCIe slows
down those that compute; so the host has to know which experts have slots: it asks once, at the first layer of a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from shoehorn_vllm.hybrid.expert_repack import Repacker
from shoehorn_vllm.hybrid.expert_slots import copy_kernel
from shoehorn_vllm.hybrid.expert_store import ExpertStore

if TYPE_CHECKING:
    from shoehorn_vllm.hybrid.expert_cache import ExpertCache, Run

_PROGRAMS = 16  # of one expert's copy: eight experts at a time reach 50 of 52 GB/s (H100, PCIe 5)
_WORDS = 2048
_STAGES = 2


def copy(store: ExpertStore, stage: torch.Tensor, source: torch.Tensor, counters: torch.Tensor, first: int,
         most: int) -> None:
    """Copy experts `source[first:n]` of the host to the stage, on the current stream.

    Args:
        stage: uint8 [places, bytes of an expert].
        counters: its fourth entry is n.
        most: experts to copy, at most.
    """
    copy_kernel[(most, _PROGRAMS)](
        source, counters, store.on_gpu.view(torch.int64).view(-1), stage.view(torch.int64).view(-1), first,
        store.expert_bytes // 8, PROGRAMS=_PROGRAMS, WORDS=_WORDS, num_warps=8)


@dataclass
class _Layer:
    """The copies of a large pass for one layer: the experts without a slot, a stage full at a time."""

    cache: ExpertCache
    absent: list[int]
    maps: list[torch.Tensor]
    filled: list[int] = field(default_factory=list)  # the stages in which the first waves are


class Waves:
    """The stages and the scratch, the stream that fills the stages, and the order of the layers.

    Attributes:
        scratch: a wave in the kernel's layout, by the tensors' names.

    Args:
        store: of any layer; all have the same shapes.
        size: experts in a wave.
    """

    def __init__(self, store: ExpertStore, size: int, device: torch.device) -> None:
        self.repacker = Repacker(store, device)
        self.scratch = self.repacker.allocate(size, device)
        self._stages = [torch.zeros(size, store.expert_bytes, dtype=torch.uint8, device=device)
                        for _ in range(_STAGES)]
        self._size = size
        self._stream = torch.Stream(device)
        self._ready = [torch.Event("cuda") for _ in range(_STAGES)]
        self._free = [torch.Event("cuda") for _ in range(_STAGES)]
        for event in self._free:
            event.record(torch.cuda.current_stream(device))
        self._turn = 0
        self._caches: list[ExpertCache] = []
        self._absent: list[list[int]] = []  # experts of each layer in this pass
        self._next: _Layer | None = None
        self._places = torch.arange(size, dtype=torch.int32, device=device)
        self._counts: dict[int, torch.Tensor] = {}  # counters by number of experts in a wave
        self._count(size)

    def _count(self, number: int) -> None:
        self._counts.setdefault(number, torch.tensor([0, 0, 0, number], device=self._places.device))

    def add(self, cache: ExpertCache) -> None:
        """Append a layer."""
        self._caches.append(cache)
        self._count((cache.experts - cache.slots) % self._size)

    def fetch(self, cache: ExpertCache, most: int) -> None:
        """Copy a layer's listed experts into their slots, by way of the first stage, on the current stream."""
        for first in range(0, most, self._size):
            count = min(self._size, most - first)
            copy(cache.store, self._stages[0], cache.source, cache.counters, first, count)
            self.repacker.run(self._stages[0], cache.tensors, cache.target, cache.counters, first, count)

    def run(self, cache: ExpertCache, choices: torch.Tensor, kernel: Run) -> torch.Tensor:
        """The output of one layer for many tokens."""
        layer = self._next if self._next and self._next.cache is cache else self._prepared(cache)
        self._next = None
        current, tokens = torch.cuda.current_stream(), slice(0, choices.shape[0])
        for wave in range(len(layer.filled), min(_STAGES, len(layer.maps))):
            self._fill(layer, wave)
        output = kernel(tokens, choices, cache.slot_of, cache.experts, False)
        for wave, mapping in enumerate(layer.maps):
            stage, count = layer.filled[wave], self._wave_size(cache, wave)
            current.wait_event(self._ready[stage])
            self.repacker.run(self._stages[stage], self.scratch, self._places, self._counts[count], 0, count)
            self._free[stage].record(current)
            if len(layer.filled) < len(layer.maps):
                self._fill(layer, len(layer.filled))
            else:
                self._prefetch(cache)
            output = output + kernel(tokens, choices, mapping, cache.experts, True)
        return output

    def _wave_size(self, cache: ExpertCache, wave: int) -> int:
        return min(self._size, cache.experts - cache.slots - wave * self._size)

    def _prefetch(self, cache: ExpertCache) -> None:
        """Begin the copies of the next layer; of the last layer none, since the next pass may be a small one."""
        if self._next is None:
            number = self._caches.index(cache) + 1
            if number == len(self._caches):
                return
            self._next = self._prepared(self._caches[number])
        if len(self._next.filled) < min(_STAGES, len(self._next.maps)):
            self._fill(self._next, len(self._next.filled))

    def _prepared(self, cache: ExpertCache) -> _Layer:
        number = self._caches.index(cache)
        if number == 0 or not self._absent:
            slots = torch.stack([each.slot_of for each in self._caches]).tolist()  # waits for the GPU
            self._absent = [[expert for expert, slot in enumerate(row) if slot < 0] for row in slots]
        absent = cache.slot_of < 0
        order = torch.cumsum(absent, 0, dtype=torch.int32) - 1
        maps = [torch.where(absent & (order // self._size == wave), order % self._size, -1).to(torch.int32)
                for wave in range(-(-(cache.experts - cache.slots) // self._size))]
        return _Layer(cache, self._absent[number], maps)

    def _fill(self, layer: _Layer, wave: int) -> None:
        """Start the copy of a wave into the stage whose turn it is."""
        stage, self._turn = self._turn, (self._turn + 1) % _STAGES
        there, here = self._stages[stage], layer.cache.store.data
        with self._stream:
            self._stream.wait_event(self._free[stage])
            for place, first, last in runs(layer.absent[wave * self._size:(wave + 1) * self._size]):
                there[place:place + last - first].copy_(here[first:last], non_blocking=True)
            self._ready[stage].record(self._stream)
        layer.filled.append(stage)


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (place of the first one, first, last + 1) of each run of consecutive numbers."""
    begin = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield begin, numbers[begin], numbers[place - 1] + 1
            begin = place
