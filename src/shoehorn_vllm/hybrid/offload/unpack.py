"""Triton kernel that unpacks INT4 weights from the checkpoint's layout on the GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 2048


@triton.jit
def unpack_kernel(codes, scales, values, count, HALF_GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Each program unpacks BLOCK bytes of two codes; rows lie one behind the other, and so do their groups."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    pair = tl.load(codes + place, mask=there, other=0).to(tl.int32)
    scale = tl.load(scales + place // HALF_GROUP, mask=there, other=0).to(tl.float32)
    even = ((pair & 15) - 8).to(tl.float32) * scale
    odd = ((pair >> 4) - 8).to(tl.float32) * scale
    both = tl.program_id(0).to(tl.int64) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    tl.store(values + both, tl.interleave(even, odd).to(tl.bfloat16), mask=both < 2 * count)


def unpack(codes: torch.Tensor, scales: torch.Tensor, values: torch.Tensor, group: int) -> None:
    """Write (code - 8) * scale.

    Args:
        codes: uint8 [rows, k / 2], the even k in the low half of a byte.
        scales: bf16 [rows, k / group].
        values: bf16 [rows, k].
    """
    count = codes.numel()
    unpack_kernel[(triton.cdiv(count, _BLOCK),)](codes, scales, values, count, HALF_GROUP=group // 2, BLOCK=_BLOCK,
                                                 num_warps=4)
