"""Experts from the checkpoint's layout into Marlin's, on the GPU, into slots that a list on the GPU names.

Marlin reads codes in tiles of 16 k and 64 rows; a word holds eight codes of a tile in the order of `code_order`. Scales
are [groups, rows] with the rows of 64 in another order, biases [rows] with those of 32.

Source: vLLM 0.32.0, layers/quantization/utils/marlin_utils.py `get_scale_perms`, marlin_utils_test.py
`get_weight_perm`, marlin_utils_fp4.py `mxfp4_marlin_process_scales`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from shoehorn_vllm.hybrid.expert_slots import codes_kernel, values_kernel
from shoehorn_vllm.hybrid.expert_store import ExpertStore

_PROGRAMS = 128
_BLOCK = 1024
COUNT = 3
"""Place of the number of copies in the counters."""


def code_order() -> list[int]:
    """Place of each code of a tile, eight for a word, in [4 blocks of 16 rows, 16 k, 16 rows]."""
    order: list[int] = []
    for lane in range(32):
        pairs = [16 * k + lane // 4 + 8 * half for half in (0, 1) for first in (2 * (lane % 4), 2 * (lane % 4) + 8)
                 for k in (first, first + 1)]
        for block in range(4):
            order += [256 * block + pairs[turn] for turn in (0, 2, 4, 6, 1, 3, 5, 7)]
    return order


def scale_order(whole: bool, mxfp4: bool) -> list[int]:
    """Source row of each row within a period.

    Args:
        whole: one scale for all k, or a bias: a period of 32, else of 64.
    """
    order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)] if whole else [
        i + 8 * j for i in range(8) for j in range(8)]
    return [order[at // 4 * 4 + (0, 2, 1, 3)[at % 4]] for at in range(len(order))] if mxfp4 else order


@dataclass(frozen=True)
class _Step:
    """Repacking of one tensor of an expert."""

    name: str
    codes: bool
    rows: int
    groups: int
    offset: int
    order: torch.Tensor


class Repacker:
    """The order of all tensors of an expert.

    Args:
        store: of any layer; names of its tensors end in `packed` or `weight` for codes, `scale`, or `bias`.
    """

    def __init__(self, store: ExpertStore, device: torch.device) -> None:
        self.shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._expert_bytes = store.expert_bytes
        self._steps: list[_Step] = []
        for name, part in store.parts.items():
            codes, mxfp4 = name.endswith(("packed", "weight")), part.dtype == torch.uint8
            rows, groups = part.shape[0], 1 if len(part.shape) == 1 else part.shape[1]
            if codes:
                k = groups * part.dtype.itemsize * 2
                if rows % 64 or k % 16:
                    raise ValueError(f"Experts of {rows} x {k}: not a multiple of Marlin's tiles of 64 x 16.")
                self.shapes[name] = (k // 16, rows * 2), torch.int32
                order = code_order()
            else:
                self.shapes[name] = ((rows,) if len(part.shape) == 1 else (groups, rows)), part.dtype
                order = scale_order(groups == 1, mxfp4)
            self._steps.append(_Step(name, codes, rows, groups, part.offset,
                                     torch.tensor(order, dtype=torch.int32, device=device)))

    def allocate(self, slots: int, device: torch.device) -> dict[str, torch.Tensor]:
        """GPU memory for that many experts in Marlin's layout, by the tensors' names: zeros."""
        return {name: torch.zeros(slots, *shape, dtype=dtype, device=device)
                for name, (shape, dtype) in self.shapes.items()}

    def run(self, stage: torch.Tensor, slots: Mapping[str, torch.Tensor], target: torch.Tensor,
            counters: torch.Tensor, first: int, most: int) -> None:
        """Repack the experts of the stage into the slots `target[first:]`, on the current stream.

        Args:
            stage: uint8 [places, bytes of an expert].
            counters: its entry `COUNT` is the number of all copies.
            most: experts in the stage, at most.
        """
        for step in self._steps:
            there = slots[step.name]
            if step.codes:
                codes_kernel[(most, _PROGRAMS)](
                    stage, there, target, counters, step.order, first, self._expert_bytes, step.offset, step.rows,
                    there[0].numel(), PROGRAMS=_PROGRAMS, BLOCK=_BLOCK, num_warps=8)
                continue
            size = there.element_size()
            typed = stage if size == 1 else stage.view(torch.int16)
            values_kernel[(most, 4)](
                typed, there.view(torch.uint8 if size == 1 else torch.int16), target, counters, step.order, first,
                self._expert_bytes // size, step.offset // size, step.rows, step.groups, PERIOD=len(step.order),
                PROGRAMS=4, BLOCK=_BLOCK, num_warps=4)
