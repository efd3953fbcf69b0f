"""Cache of a layer's experts on the GPU: all experts are in host memory, the recently used ones on the GPU too.

A small pass (its choices fit into the slots) copies the missing experts into the slots, evicting the least recently
used ones, and runs the kernel on the slots. A pass of some more tokens is divided into small ones. A large pass runs
the kernel on the slots and then on the other experts, which arrive in waves (`expert_waves`); it evicts nothing.

Rules:
- the host tensors are in the kernel's layout, repacked once while the model is loaded, in place;
- every slot always holds an expert, so that the number of the others is known without asking the GPU;
- small passes synchronize nothing and can be captured in CUDA graphs; large passes cannot.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

from shoehorn_vllm.hybrid.expert_slots import assign_kernel
from shoehorn_vllm.hybrid.expert_waves import Tensors, Waves, copy, slot_tensors

Run = Callable[[slice, torch.Tensor, torch.Tensor | None, int, int | None], torch.Tensor]
"""(tokens, choices [tokens, k], map from expert to slot [experts] int32 or None, number of experts, half of the scratch
or None for the slots) -> [tokens, K]."""

_BLOCK = 128


class ExpertCache:
    """The experts of one layer.

    Args:
        host: device views of the pinned host tensors.
        slots: number of experts that the GPU holds; at least the choices of one token.
        divided: tokens of the largest pass that is divided into small ones.
        waves: the process's buffers for large passes.
    """

    def __init__(self, host: Tensors, slots: int, divided: int, device: torch.device, waves: Waves) -> None:
        self.experts = host[0].shape[0]
        self.slots = min(slots, self.experts)
        self.host = host
        self.tensors = slot_tensors(host, self.slots, device)
        self._divided = divided
        self._waves = waves

        def integers(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        self._expert_of = torch.arange(self.slots, dtype=torch.int32, device=device)
        self.slot_of = torch.full((self.experts,), -1, dtype=torch.int32, device=device)
        self.slot_of[:self.slots] = self._expert_of
        self._used = torch.zeros(self.slots, dtype=torch.int64, device=device)
        self._needed, self._missing = integers(self.experts), integers(self.experts)
        self._source, self._target = integers(self.experts), integers(self.experts)
        self._counters = torch.zeros(4, dtype=torch.int64, device=device)
        self._source[:self.slots], self._target[:self.slots] = self._expert_of, self._expert_of
        self._counters[3] = self.slots
        copy(host, self.tensors, self._source, self._target, self._counters, self.slots)
        waves.add(self)

    def lookups(self) -> tuple[int, int]:
        """(experts that small passes needed, of them those that were copied); waits for the GPU."""
        counters = self._counters.tolist()
        return counters[1], counters[2]

    def run(self, choices: torch.Tensor, kernel: Run) -> torch.Tensor:
        """The layer's output [tokens, K].

        Args:
            choices: expert ids [tokens, k].
            kernel: multiplies some of the tokens with the slots' experts or with those of the scratch.
        """
        tokens, each = choices.shape
        if self.slots == self.experts:
            return kernel(slice(0, tokens), choices, None, self.slots, None)
        most = max(1, self.slots // each)
        if tokens <= most:
            return self._small(slice(0, tokens), choices, kernel)
        if tokens <= self._divided:
            return torch.cat([self._small(slice(begin, min(begin + most, tokens)), choices, kernel)
                              for begin in range(0, tokens, most)])
        return self._waves.run(self, choices, kernel)

    def _small(self, tokens: slice, choices: torch.Tensor, kernel: Run) -> torch.Tensor:
        chosen = choices[tokens].contiguous()
        mapped = torch.empty(chosen.shape, dtype=torch.int32, device=choices.device)
        slots_2 = triton.next_power_of_2(self.slots)
        assign_kernel[(1,)](
            chosen, chosen.numel(), self.slot_of, self._expert_of, self._used, self._needed, self._missing,
            self._source, self._target, self._counters, mapped,
            EXPERTS=self.experts, EXPERTS_2=triton.next_power_of_2(self.experts), SLOTS=self.slots, SLOTS_2=slots_2,
            BLOCK=_BLOCK, CHUNK=min(32, slots_2), num_warps=4)
        copy(self.host, self.tensors, self._source, self._target, self._counters,
             min(chosen.numel(), self.experts - self.slots))
        return kernel(tokens, mapped, None, self.slots, None)
