"""Compares the unpacking kernel with plain arithmetic.

usage: TRITON_INTERPRET=1 python unpack_check.py      with triton, torch and src/ reachable
"""

from __future__ import annotations

import torch

from shoehorn_vllm.hybrid.offload.unpack import unpack

for rows, k, group in ((3, 64, 32), (5, 576, 64), (7, 1280, 128), (33, 128, 128)):
    codes = torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8)
    scales = (torch.rand(rows, k // group) + 0.5).to(torch.bfloat16)
    values = torch.full((rows, k), float("nan"), dtype=torch.bfloat16)
    unpack(codes, scales, values, group)
    whole = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).float() - 8
    right = (whole * scales.float().repeat_interleave(group, 1)).to(torch.bfloat16)
    # within one step of bf16: the interpreter cuts where a GPU rounds
    assert torch.allclose(values.float(), right.float(), rtol=2**-7, atol=0), (rows, k, group)
print("ok")
