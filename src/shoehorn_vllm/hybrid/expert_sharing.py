"""Small passes over experts that GPU and CPU share: each multiplies the chosen experts that it has, at the same time.

In the order of the stream: a kernel writes the activations and the CPU's choices into host memory, the CPU is asked,
the GPU multiplies the experts in its slots, waits for the CPU, and adds its sums. An expert that is used often takes a
slot for the next pass: a stream of its own copies it meanwhile. All of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import triton
from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

from shoehorn_vllm.hybrid.expert_slots import share_kernel
from shoehorn_vllm.hybrid.kernel.products import ExpertWeights
from shoehorn_vllm.hybrid.offload.mailbox import Mailbox

if TYPE_CHECKING:
    from shoehorn_vllm.hybrid.expert_cache import ExpertCache, Run

_BLOCK = 128
_WORDS = 1024


class Sharing:
    """The CPU's side of all layers of a model.

    Args:
        tokens: of the largest pass that is shared.
        top_k: experts that a token chooses.
        fills: experts that a pass may take into slots.
    """

    def __init__(self, tokens: int, top_k: int, fills: int, device: torch.device) -> None:
        self._tokens, self._top_k, self._fills, self._device = tokens, top_k, fills, device
        self._caches: list[ExpertCache] = []
        self._weights: list[ExpertWeights] = []
        self._left = torch.zeros(1, dtype=torch.int32, device=device)
        self._stream = torch.Stream(device)
        self._present: dict[int, torch.Tensor] = {}
        self._pending: torch.Event | None = None

    def add(self, cache: ExpertCache) -> None:
        """Append a layer's slots, in the order of the forward pass."""
        self._caches.append(cache)
        self._present.setdefault(cache.experts, torch.zeros(cache.experts, dtype=torch.int32, device=self._device))

    def add_weights(self, weights: ExpertWeights) -> None:
        """Append a layer's experts in host memory, in the same order."""
        self._weights.append(weights)

    def start(self) -> None:
        """Allocate the buffers and start the threads, once all layers are known."""
        _ = self._mailbox

    @cached_property
    def _mailbox(self) -> Mailbox:
        return Mailbox(self._weights, self._tokens, self._device, self._top_k)

    @cached_property
    def _views(self) -> Sequence[torch.Tensor]:
        box = self._mailbox
        return [get_accelerator_view_from_cpu_tensor(part) for part in (box.ids, box.router, box.x, box.y)]

    def run(self, cache: ExpertCache, x: torch.Tensor, choices: torch.Tensor, router: torch.Tensor,
            kernel: Run) -> torch.Tensor:
        """The output of one layer for few tokens, [tokens, K]."""
        tokens, width = x.shape
        number, present = self._number(cache), self._present[cache.experts]
        host_ids, host_router, host_x, host_y = self._views
        share_kernel[(1 + tokens,)](
            choices.contiguous(), router.contiguous(), x.contiguous(), choices.numel(), cache.slot_of, cache.expert_of,
            cache.uses, cache.needed, present, cache.source, cache.target, cache.counters, cache.report,
            self._left,
            host_ids, host_router, host_x, width, EXPERTS=cache.experts,
            EXPERTS_2=triton.next_power_of_2(cache.experts), SLOTS=cache.slots,
            SLOTS_2=triton.next_power_of_2(cache.slots), BLOCK=_BLOCK, WORDS=_WORDS, FILLS=self._fills,
            FIRST=number == 0, num_warps=4)
        self._mailbox.request(number, tokens)
        main, last = torch.cuda.current_stream(), number + 1 == len(self._caches)
        before, self._pending = self._pending, self._fill(cache, main)
        output = kernel(slice(0, tokens), choices, present, cache.experts, False)
        self._mailbox.wait()
        output = torch.add(output, host_y[:output.numel()].view(output.shape))
        for event in (before, self._pending if last else None):
            if event:
                main.wait_event(event)
        if last:
            self._pending = None
        return output

    def _fill(self, cache: ExpertCache, main: torch.Stream) -> torch.Event | None:
        """Start the copy of the expert that takes a slot, if there is one."""
        if not self._fills:
            return None
        self._stream.wait_stream(main)
        with self._stream:
            cache.fetch(1)
            event = torch.Event("cuda")
            event.record(self._stream)
        return event

    def _number(self, cache: ExpertCache) -> int:
        return self._caches.index(cache)


