"""A quantized embedding on a CPU.

vLLM 0.32 unpacks the rows of the tokens at hand with a Triton kernel, which a CPU cannot run: the first request fails.
The same with torch's operators for tensors on the CPU; on a GPU nothing changes.

Source: layers/quantization/compressed_tensors/compressed_tensors_embedding.py, _dequant_gather_triton.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors_embedding as engine

from shoehorn_vllm.hybrid.fallback import unpack_codes

_on_gpu = engine._dequant_gather_triton


def apply() -> None:
    """Patch this process."""
    setattr(engine, _on_gpu.__name__, gather)


def gather(ids: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, hidden: int, bits: int) -> torch.Tensor:
    """Unpacked rows of the tokens `ids`: [ids, hidden], in the scales' dtype."""
    if packed.device.type != "cpu":
        rows: torch.Tensor = _on_gpu(ids, packed, scales, hidden, bits)
        return rows
    codes = unpack_codes(packed[ids]) if bits == 4 else packed[ids].view(torch.uint8)
    steps = scales[ids].float().repeat_interleave(hidden // scales.shape[1], -1)
    return ((codes.float() - (1 << (bits - 1))) * steps).to(scales.dtype)
