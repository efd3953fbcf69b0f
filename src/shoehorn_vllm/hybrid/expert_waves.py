"""Large passes over experts in host memory: they arrive on the GPU in waves, while the wave before is computed.

Two scratch buffers are filled in turn by a stream of their own. All layers share them; the first wave of the next layer
is copied while the last one of this layer is computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from shoehorn_vllm.hybrid.expert_slots import copy_kernel

if TYPE_CHECKING:
    from shoehorn_vllm.hybrid.expert_cache import ExpertCache, Run

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""w13 [experts, K / 16, 4 * I] int32, its scales [experts, K / group, 2 * I], w2 [experts, I / 16, 2 * K] int32, its
scales [experts, I / group, K]; or the same with slots in the place of experts."""

_PROGRAMS = 16  # of one expert's copy: eight experts at a time reach 50 of 52 GB/s (H100, PCIe 5)
_WORDS = 2048
_HALVES = 2


def slot_tensors(host: Tensors, slots: int, device: torch.device) -> Tensors:
    """Allocate GPU memory for that many experts."""
    first, second, third, fourth = (
        torch.zeros(slots, *tensor.shape[1:], dtype=tensor.dtype, device=device) for tensor in host)
    return first, second, third, fourth


def copy(host: Tensors, gpu: Tensors, source: torch.Tensor, target: torch.Tensor, counters: torch.Tensor,
         most: int) -> None:
    """Copy experts `source[:n]` of the host to places `target[:n]` on the GPU, on the current stream.

    Args:
        counters: its fourth entry is n, at most `most`.
    """
    words = [tensor.view(torch.int64).view(-1) for tensor in (*host, *gpu)]
    sizes = [tensor[0].numel() * tensor.element_size() // 8 for tensor in host]
    copy_kernel[(most, _PROGRAMS)](source, target, counters, *words, *sizes, PROGRAMS=_PROGRAMS, WORDS=_WORDS,
                                   num_warps=8)


@dataclass
class _Layer:
    """The copies of a large pass for one layer: the experts without a slot, a buffer full at a time."""

    cache: ExpertCache
    listed: torch.Tensor
    maps: list[torch.Tensor]
    ready: torch.Event
    filled: list[int] = field(default_factory=list)  # the halves in which the first waves are


class Waves:
    """The scratch buffers, the stream that fills them, and the order of the layers.

    Args:
        host: experts of any layer; all have the same shapes.
        size: experts in a buffer.
    """

    def __init__(self, host: Tensors, size: int, device: torch.device) -> None:
        self.buffers = [slot_tensors(host, size, device) for _ in range(_HALVES)]
        self._size = size
        self._stream = torch.Stream(device)
        self._ready = [torch.Event("cuda") for _ in range(_HALVES)]
        self._free = [torch.Event("cuda") for _ in range(_HALVES)]
        for event in self._free:
            event.record(torch.cuda.current_stream(device))
        self._turn = 0
        self._caches: list[ExpertCache] = []
        self._next: _Layer | None = None
        self._places = torch.arange(size, dtype=torch.int32, device=device)
        self._full = torch.tensor([0, 0, 0, size], device=device)
        self._rest: dict[int, torch.Tensor] = {}  # by number of experts in the last wave

    def add(self, cache: ExpertCache) -> None:
        """Append a layer."""
        self._caches.append(cache)
        rest = (cache.experts - cache.slots) % self._size
        self._rest.setdefault(rest, torch.tensor([0, 0, 0, rest], device=self._places.device))

    def run(self, cache: ExpertCache, choices: torch.Tensor, kernel: Run) -> torch.Tensor:
        """The output of one layer for many tokens."""
        layer = self._next if self._next and self._next.cache is cache else self._prepared(cache)
        self._next = None
        current, tokens = torch.cuda.current_stream(), slice(0, choices.shape[0])
        for wave in range(len(layer.filled), min(_HALVES, len(layer.maps))):
            self._fill(layer, wave)
        output = kernel(tokens, choices, cache.slot_of, cache.experts, None)
        for wave, mapping in enumerate(layer.maps):
            half = layer.filled[wave]
            current.wait_event(self._ready[half])
            output = output + kernel(tokens, choices, mapping, cache.experts, half)
            self._free[half].record(current)
            if len(layer.filled) < len(layer.maps):
                self._fill(layer, len(layer.filled))
            else:
                self._prefetch(cache)
        layer.listed.record_stream(self._stream)
        return output

    def _prefetch(self, cache: ExpertCache) -> None:
        """Begin the copies of the next layer; of the last layer none, since the next pass may be a small one."""
        if self._next is None:
            number = self._caches.index(cache) + 1
            if number == len(self._caches):
                return
            self._next = self._prepared(self._caches[number])
        if len(self._next.filled) < min(_HALVES, len(self._next.maps)):
            self._fill(self._next, len(self._next.filled))

    def _prepared(self, cache: ExpertCache) -> _Layer:
        absent = cache.slot_of < 0
        order = torch.cumsum(absent, 0, dtype=torch.int32) - 1
        listed = torch.argsort(absent.to(torch.int8), descending=True, stable=True).to(torch.int32)
        maps = [torch.where(absent & (order // self._size == wave), order % self._size, -1).to(torch.int32)
                for wave in range(-(-(cache.experts - cache.slots) // self._size))]
        ready = torch.Event("cuda")
        ready.record(torch.cuda.current_stream())
        return _Layer(cache, listed, maps, ready)

    def _fill(self, layer: _Layer, wave: int) -> None:
        """Start the copy of a wave into the buffer whose turn it is."""
        half, self._turn = self._turn, (self._turn + 1) % _HALVES
        count = min(self._size, layer.cache.experts - layer.cache.slots - wave * self._size)
        with self._stream:
            self._stream.wait_event(layer.ready)
            self._stream.wait_event(self._free[half])
            copy(layer.cache.host, self.buffers[half], layer.listed[wave * self._size:], self._places,
                 self._full if count == self._size else self._rest[count], count)
            self._ready[half].record(self._stream)
        layer.filled.append(half)
