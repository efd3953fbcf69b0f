"""Numbers: weights -> codes of 4 or 8 bits and a scale for each group, and how much was lost.

For a group w the codes q and the scale s that minimise |w - s q|^2 are looked for: from several clipped ranges the
codes are rounded, and each gets the scale that fits it best, s = <w, q> / <q, q>. The range of codes has one more
number below zero than above, so the sign of s is chosen such that the largest weight gets that number.

Layout: that of compressed-tensors' `pack-quantized`; a code is stored as code + 2^(bits - 1), the first of a word in
its lowest bits.
Source: compressed_tensors/compressors/pack_quantized/helpers.py (pack_to_int32).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

CLIPPED = {4: (0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0), 8: (1.0,)}
"""What share of the largest weight the codes reach to, by bits. With 8 bits clipping gains nothing."""

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""By their names in safetensors."""

_BLOCK_ELEMENTS = 1 << 24
_NOT_FINITE = "holds a number that is not finite"
_Parts = tuple[torch.Tensor, torch.Tensor, float, float]


def device() -> str:
    """Where weights are quantized on this machine: `cuda` or `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def use_one_thread() -> None:
    """For a worker beside others."""
    torch.set_num_threads(1)


def from_bytes(data: bytearray | memoryview, dtype: str, columns: int) -> torch.Tensor:
    """Rows as they lie in a safetensors file of number format `dtype`: [rows, columns], sharing the memory."""
    return torch.frombuffer(data, dtype=DTYPES[dtype]).view(-1, columns)


def to_bytes(tensor: torch.Tensor) -> memoryview:
    """As they lie in a safetensors file; of a tensor in host memory without a copy."""
    return tensor.cpu().contiguous().view(torch.uint8).view(-1).numpy().data


@dataclass(frozen=True)
class Quantized:
    """Rows of a weight.

    Attributes:
        packed: int32, [rows, columns * bits / 32].
        scale: of the number format asked for, [rows, columns / group].
        lost: |w - s q|^2 over all; whole: |w|^2.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    lost: float
    whole: float


def quantize_here(weight: torch.Tensor, bits: int, group: int, scale_dtype: torch.dtype) -> Quantized:
    """`quantize` rows in host memory on the GPU where there is one with room for them, else on the processors."""
    try:
        return quantize(weight.to(device()), bits, group, scale_dtype)
    except torch.OutOfMemoryError:
        return quantize(weight, bits, group, scale_dtype)


def quantize(weight: torch.Tensor, bits: int, group: int, scale_dtype: torch.dtype) -> Quantized:
    """Quantize rows, where they are.

    Args:
        weight: floating point, [rows, columns]; `group` divides columns.
        bits: 4 or 8.

    Raises:
        ValueError: a weight is not a finite number.
    """
    rows, columns = weight.shape
    if weight.device.type == "cpu":
        packed, scale, lost, whole = _on_cpu(weight, bits, group, scale_dtype)
        return Quantized(packed.view(rows, -1), scale.view(rows, -1), lost, whole)
    step = max(1, _BLOCK_ELEMENTS // columns)
    blocks = [_by_tensors(weight[start:start + step], bits, group, scale_dtype) for start in range(0, rows, step)]
    return Quantized(torch.cat([block[0] for block in blocks]).view(rows, -1),
                     torch.cat([block[1] for block in blocks]).view(rows, -1),
                     sum(block[2] for block in blocks), sum(block[3] for block in blocks))


def dequantize(packed: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 [rows, columns] of what `quantize` made."""
    shifts = torch.arange(0, 32, bits, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts & (1 << bits) - 1) - (1 << bits - 1)
    codes = codes.view(*scale.shape, -1).float()
    return (codes * scale.float().unsqueeze(-1)).view(packed.shape[0], -1)


def _on_cpu(weight: torch.Tensor, bits: int, group: int, scale_dtype: torch.dtype) -> _Parts:
    from shoehorn.int4 import quantizer_cpu  # what compiles it is loaded only where it is needed

    if weight.dtype is torch.bfloat16:
        words, shift = weight.contiguous().view(torch.uint16).numpy().ravel(), np.uint32(16)
    else:
        words, shift = weight.float().contiguous().view(torch.uint32).numpy().ravel(), np.uint32(0)
    half = np.float32(1 << bits - 1)
    scales = np.empty(len(words) // group, np.float32)
    if not quantizer_cpu.search(words, shift, np.array(CLIPPED[bits], np.float32), half, scales):
        raise ValueError(_NOT_FINITE)
    scale = _stored(torch.from_numpy(scales), scale_dtype)
    packed = np.empty(len(words) * bits // 8, np.uint8)
    lost, whole = quantizer_cpu.encode(words, shift, half, scale.float().numpy(), packed)
    return torch.from_numpy(packed).view(torch.int32), scale, lost, whole


def _by_tensors(weight: torch.Tensor, bits: int, group: int, scale_dtype: torch.dtype) -> _Parts:
    """On a GPU."""
    values = weight.float().view(-1, group)
    square = float(values.square().sum(dtype=torch.float64))
    if not square < float("inf"):
        raise ValueError(_NOT_FINITE)
    scale = _stored(_scales(values, bits), scale_dtype)
    codes = _codes(values, scale.float(), bits)
    lost = float((values - codes * scale.float()).square_().sum(dtype=torch.float64))
    return _pack(codes, bits).view(-1), scale.view(-1), lost, square


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As it will be read; 1 where nothing can be divided by it, so that the codes are 0."""
    scale = scale.to(dtype)
    return torch.where(scale.float().abs() < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)


def _scales(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The best scale of each group found, [groups, 1]; 1 for a group of zeros."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    widest = torch.where(-low >= high, -low, -high) / float(1 << bits - 1)
    widest[widest == 0] = 1.0
    best, gained = widest, torch.full_like(widest, -1.0)
    for share in CLIPPED[bits]:
        codes = _codes(values, widest * share, bits)
        fit = torch.linalg.vecdot(values, codes).unsqueeze(1)
        size = torch.linalg.vecdot(codes, codes).unsqueeze(1).clamp_min_(1e-20)
        gain = fit * fit / size  # |w|^2 less the error
        better = gain > gained
        gained = torch.where(better, gain, gained)
        best = torch.where(better, fit / size, best)
    return best


def _codes(values: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    return (values * scale.reciprocal()).round_().clamp_(-(1 << bits - 1), (1 << bits - 1) - 1)


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words, [groups, group * bits / 32]."""
    each = 32 // bits
    numbers = (codes + float(1 << bits - 1)).to(torch.int32).view(codes.shape[0], -1, each)
    words = numbers[..., 0].clone()
    for place in range(1, each):
        words |= numbers[..., place] << bits * place
    return words
