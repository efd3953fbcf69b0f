"""The experts of one layer: all of them in host memory, some of them on the GPU too.

A small pass (its choices fit into the slots) either copies the absent experts into the slots, evicting the least
recently used ones, or leaves them to the CPU, which multiplies in host memory while the GPU multiplies the others. A
pass of some more tokens is divided into small ones where experts are copied. A large pass runs the kernel on the slots
and then on the other experts, which arrive in waves (`expert_waves`); it evicts nothing.

Rules:
- the host memory keeps the checkpoint's layout (`expert_store`); what is on the GPU is repacked there;
- every slot always holds an expert, so that the number of the others is known without asking the GPU;
- small passes synchronize nothing and can be captured in CUDA graphs; large passes cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from shoehorn_vllm.hybrid.expert_sharing import Sharing
from shoehorn_vllm.hybrid.expert_slots import assign_kernel
from shoehorn_vllm.hybrid.expert_store import ExpertStore
from shoehorn_vllm.hybrid.expert_waves import Waves

Run = Callable[[slice, torch.Tensor, torch.Tensor | None, int, bool], torch.Tensor]
"""(tokens, choices [tokens, k], map from expert to slot [experts] int32 or None, number of experts, whether the weights
are those of the scratch instead of the slots) -> [tokens, K]."""

_BLOCK = 128


@dataclass(frozen=True)
class CacheOptions:
    """The cache's part of `--additional-config`.

    Attributes:
        slots: number of experts of a layer that the GPU holds; at least the choices of one token where they are copied.
        scratch: experts in a wave.
        divided: tokens of the largest pass that is divided into small ones.
        computed: tokens of the largest pass whose absent experts the CPU computes; 0 where they are copied.
        fills: experts that a pass may take into slots for the next one, where the CPU computes.
    """

    slots: int
    scratch: int = 16
    divided: int = 0
    computed: int = 0
    fills: int = 4


class ExpertCache:
    """The experts of one layer.

    Args:
        report: two counts in host memory (`telemetry.expert_lookups`), by their address on the GPU.
        waves: the process's buffers for large passes, and for copies.
        sharing: the CPU's side; None where absent experts are copied.
    """

    def __init__(self, store: ExpertStore, options: CacheOptions, report: torch.Tensor, waves: Waves,
                 sharing: Sharing | None, device: torch.device) -> None:
        self.store, self.experts = store, store.experts
        self.slots = min(options.slots, self.experts)
        self.tensors = waves.repacker.allocate(self.slots, device)
        self.report = report
        self._options, self._waves, self._sharing = options, waves, sharing

        def integers(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        self.expert_of = torch.arange(self.slots, dtype=torch.int32, device=device)
        self.slot_of = torch.full((self.experts,), -1, dtype=torch.int32, device=device)
        self.slot_of[:self.slots] = self.expert_of
        self._used = torch.zeros(self.slots, dtype=torch.int64, device=device)
        self._missing = integers(self.experts)
        self.uses, self.needed = integers(self.experts), integers(self.experts)
        self.source, self.target = integers(self.experts), integers(self.experts)
        self.counters = torch.zeros(4, dtype=torch.int64, device=device)
        self.source[:self.slots], self.target[:self.slots] = self.expert_of, self.expert_of
        self.counters[3] = self.slots
        self.fetch(self.slots)
        waves.add(self)
        if sharing:
            sharing.add(self)

    def lookups(self) -> tuple[int, int]:
        """(experts that small passes needed, of them those that were absent); waits for the GPU."""
        counters = self.counters.tolist()
        return counters[1], counters[2]

    def fetch(self, most: int) -> None:
        """Copy the listed experts into their slots, on the current stream.

        Args:
            most: number of listed experts, at most; the fourth counter has it.
        """
        self._waves.fetch(self, most)

    def run(self, x: torch.Tensor, choices: torch.Tensor, router: torch.Tensor, kernel: Run) -> torch.Tensor:
        """The layer's output [tokens, K].

        Args:
            x: bf16 activations [tokens, K].
            choices: expert ids [tokens, k].
            router: fp32 weights [tokens, k].
            kernel: multiplies some of the tokens with the slots' experts or with those of the scratch.
        """
        tokens, each = choices.shape
        if self.slots == self.experts:
            return kernel(slice(0, tokens), choices, None, self.slots, False)
        if self._sharing and tokens <= self._options.computed:
            return self._sharing.run(self, x, choices, router, kernel)
        most = self.slots // each
        if self._sharing or tokens > max(most, self._options.divided) or not most:
            return self._waves.run(self, choices, kernel)
        parts = [self._small(slice(begin, min(begin + most, tokens)), choices, kernel)
                 for begin in range(0, tokens, most)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _small(self, tokens: slice, choices: torch.Tensor, kernel: Run) -> torch.Tensor:
        chosen = choices[tokens].contiguous()
        mapped = torch.empty(chosen.shape, dtype=torch.int32, device=choices.device)
        slots_2 = triton.next_power_of_2(self.slots)
        assign_kernel[(1,)](
            chosen, chosen.numel(), self.slot_of, self.expert_of, self._used, self.needed, self._missing,
            self.source, self.target, self.counters, self.report, mapped,
            EXPERTS=self.experts, EXPERTS_2=triton.next_power_of_2(self.experts), SLOTS=self.slots, SLOTS_2=slots_2,
            BLOCK=_BLOCK, CHUNK=min(32, slots_2), num_warps=4)
        self.fetch(min(chosen.numel(), self.experts - self.slots))
        return kernel(tokens, mapped, None, self.slots, False)
