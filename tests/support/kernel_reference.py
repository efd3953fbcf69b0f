"""Expected results of the kernel in float64, from the definition of the formats."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MXFP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


@dataclass(frozen=True)
class Matrix:
    """Weights as a checkpoint has them, and their values."""

    codes: torch.Tensor
    scales: torch.Tensor
    values: torch.Tensor
    group: int


def matrix(shape: tuple[int, ...], group: int, seed: int, mxfp4: bool = False) -> Matrix:
    """Random weights of [..., rows, k]."""
    random = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 16, shape, generator=random)
    pairs = (numbers[..., 0::2] | numbers[..., 1::2] << 4).to(torch.uint8)
    groups = (*shape[:-1], shape[-1] // group)
    if mxfp4:
        scales = torch.randint(115, 124, groups, generator=random).to(torch.uint8)
        sizes, values = torch.exp2(scales.double() - 127), MXFP4[numbers]
        codes = pairs
    else:
        scales = (torch.rand(groups, generator=random) * 0.02 + 0.001).to(torch.bfloat16)
        sizes, values = scales.double(), numbers.double() - 8
        codes = pairs.view(torch.int32)
    return Matrix(codes.contiguous(), scales, values * sizes.repeat_interleave(group, -1), group)


def activations(tokens: int, k: int, seed: int) -> torch.Tensor:
    """Random activations with outliers and a group of zeros."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=random)
    x[:, torch.randint(0, k, (3,), generator=random)] *= 30
    if tokens > 1:
        x[1, :32] = 0
    return x.to(torch.bfloat16)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Activations after int8 with a scale for each 32, as the kernel rounds them."""
    parts = x.float().unflatten(-1, (-1, 32))
    largest = parts.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0)  # `127 / x` is 127 * (1 / x)
    codes = torch.round(parts * inverse).clamp(-128, 127)
    return (codes.double() * (largest / 127).double()).flatten(-2)


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """The difference's size over the result's."""
    return float((y.double() - expected).norm() / expected.norm())
