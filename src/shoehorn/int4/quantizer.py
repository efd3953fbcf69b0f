"""Quantizer: weights -> codes of 4 or 8 bits and a scale for each group, with the squared error.

For each group w it searches codes q and a scale s that minimise |w - s q|^2: several clipped ranges are rounded to
codes, each with its least-squares scale s = <w, q> / <q, q>. The codes have one more negative value than positive
values, so the sign of s is chosen such that the largest weight gets the largest negative code.

Layout: `pack-quantized` of compressed-tensors; a code is stored as code + 2^(bits - 1), the first code of a word in its
lowest bits.
Source: compressed_tensors/compressors/pack_quantized/helpers.py (pack_to_int32).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

CLIPPED = {4: (0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0), 8: (1.0,)}
"""Clipped ranges as shares of the largest weight, by bits. With 8 bits clipping has no benefit."""

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""dtypes by their names in safetensors."""

_BLOCK_ELEMENTS = 1 << 24
_NOT_FINITE = "contains a value that is not finite"
_Parts = tuple[torch.Tensor, torch.Tensor, float, float]


def device() -> str:
    """Return the device of the quantizer on this machine: `cuda` or `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def use_one_thread() -> None:
    """Limit torch to one thread, in each worker."""
    torch.set_num_threads(1)


def from_bytes(data: bytearray | memoryview, dtype: str, columns: int) -> torch.Tensor:
    """Interpret bytes of a safetensors file as [rows, columns] of `dtype`, without a copy."""
    return torch.frombuffer(data, dtype=DTYPES[dtype]).view(-1, columns)


def to_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes for a safetensors file; without a copy if the tensor is in host memory."""
    return tensor.cpu().contiguous().view(torch.uint8).view(-1).numpy().data


@dataclass(frozen=True)
class QuantizedRows:
    """Quantized rows of a weight.

    Attributes:
        packed: int32, [rows, columns * bits / 32].
        scale: of the requested dtype, [rows, columns / group].
        squared_error: |w - s q|^2 of all rows.
        squared_norm: |w|^2 of all rows.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    squared_error: float
    squared_norm: float


def quantize_on_device(weight: torch.Tensor, bits: int, group: int, scale_dtype: torch.dtype) -> QuantizedRows:
    """Quantize rows of host memory on the GPU if it has enough free memory, else on the CPU."""
    try:
        return quantize(weight.to(device()), bits, group, scale_dtype)
    except torch.OutOfMemoryError:
        return quantize(weight, bits, group, scale_dtype)


def quantize(weight: torch.Tensor, bits: int, group: int, scale_dtype: torch.dtype) -> QuantizedRows:
    """Quantize rows on their device.

    Args:
        weight: floating point, [rows, columns]; `group` divides columns.
        bits: 4 or 8.

    Raises:
        ValueError: a weight is not finite.
    """
    rows, columns = weight.shape
    if weight.device.type == "cpu":
        packed, scale, squared_error, squared_norm = _on_cpu(weight, bits, group, scale_dtype)
        return QuantizedRows(packed.view(rows, -1), scale.view(rows, -1), squared_error, squared_norm)
    step = max(1, _BLOCK_ELEMENTS // columns)
    blocks = [_by_tensors(weight[start:start + step], bits, group, scale_dtype) for start in range(0, rows, step)]
    return QuantizedRows(torch.cat([block[0] for block in blocks]).view(rows, -1),
                     torch.cat([block[1] for block in blocks]).view(rows, -1),
                     sum(block[2] for block in blocks), sum(block[3] for block in blocks))


def compared(weight: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bits: int) -> QuantizedRows:
    """Return rows that are quantized already, with their squared error."""
    exact = weight.float()
    missing = exact - dequantize(packed, scale, bits)
    return QuantizedRows(packed, scale, float(missing.square().sum(dtype=torch.float64)),
                         float(exact.square().sum(dtype=torch.float64)))


def dequantize(packed: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the float32 [rows, columns] of quantized rows."""
    shifts = torch.arange(0, 32, bits, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts & (1 << bits) - 1) - (1 << bits - 1)
    codes = codes.view(*scale.shape, -1).float()
    return (codes * scale.float().unsqueeze(-1)).view(packed.shape[0], -1)


def _on_cpu(weight: torch.Tensor, bits: int, group: int, scale_dtype: torch.dtype) -> _Parts:
    from shoehorn.int4 import quantizer_cpu  # imports numba, which only a CPU needs

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
    squared_error, squared_norm = quantizer_cpu.encode(words, shift, half, scale.float().numpy(), packed)
    return torch.from_numpy(packed).view(torch.int32), scale, squared_error, squared_norm


def _by_tensors(weight: torch.Tensor, bits: int, group: int, scale_dtype: torch.dtype) -> _Parts:
    """Quantize with tensor operations, for GPUs."""
    values = weight.float().view(-1, group)
    square = float(values.square().sum(dtype=torch.float64))
    if not square < float("inf"):
        raise ValueError(_NOT_FINITE)
    scale = _stored(_scales(values, bits), scale_dtype)
    codes = _codes(values, scale.float(), bits)
    squared_error = float((values - codes * scale.float()).square_().sum(dtype=torch.float64))
    return pack(codes, bits).view(-1), scale.view(-1), squared_error, square


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round scales to their stored dtype; 1 for scales too small to divide by, so that the codes are 0."""
    scale = scale.to(dtype)
    return torch.where(scale.float().abs() < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)


def _scales(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Search the best scale of each group, [groups, 1]; 1 for a group of zeros."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    widest = torch.where(-low >= high, -low, -high) / float(1 << bits - 1)
    widest[widest == 0] = 1.0
    best, best_gain = widest, torch.full_like(widest, -1.0)
    for share in CLIPPED[bits]:
        codes = _codes(values, widest * share, bits)
        fit = torch.linalg.vecdot(values, codes).unsqueeze(1)
        size = torch.linalg.vecdot(codes, codes).unsqueeze(1).clamp_min_(1e-20)
        gain = fit * fit / size  # |w|^2 minus the error
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best = torch.where(better, fit / size, best)
    return best


def _codes(values: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    return (values * scale.reciprocal()).round_().clamp_(-(1 << bits - 1), (1 << bits - 1) - 1)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes to int32 words, [rows, columns * bits / 32]."""
    codes_per_word = 32 // bits
    numbers = (codes + float(1 << bits - 1)).to(torch.int32).view(codes.shape[0], -1, codes_per_word)
    words = numbers[..., 0].clone()
    for position in range(1, codes_per_word):
        words |= numbers[..., position] << bits * position
    return words
