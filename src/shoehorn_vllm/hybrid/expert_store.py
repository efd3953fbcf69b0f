"""All experts of a layer in pinned host memory, in the checkpoint's layout, one copy for CPU and GPU.

Rules:
- an expert is one contiguous piece, so that one copy takes it to the GPU; its tensors follow one another, aligned;
- the engine's loader writes through views that have the shapes of the engine's own parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

from shoehorn_vllm.patches import pinned_memory

_ALIGNMENT = 128  # bytes: a line of PCIe reads


@dataclass(frozen=True)
class Part:
    """One tensor of an expert.

    Attributes:
        offset: bytes from the expert's first one.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ExpertStore:
    """Pinned memory of a layer's experts.

    Attributes:
        data: uint8 [experts, bytes of an expert].

    Args:
        tensors: of all experts, by name: [experts, ...]; only shapes and dtypes are read.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.parts: dict[str, Part] = {}
        size = 0
        for name, tensor in tensors.items():
            self.parts[name] = Part(tuple(tensor.shape[1:]), tensor.dtype, size)
            size += -(-self.parts[name].nbytes // _ALIGNMENT) * _ALIGNMENT
        self.experts = next(iter(tensors.values())).shape[0]
        self.expert_bytes = size
        self.data = pinned_memory.allocate_like(torch.empty(self.experts, size, dtype=torch.uint8, device="meta"))

    def view(self, name: str) -> torch.Tensor:
        """One tensor of all experts, [experts, ...], in the store's memory."""
        part = self.parts[name]
        flat = self.data[:, part.offset:part.offset + part.nbytes].view(part.dtype)
        return flat.view(self.experts, *part.shape)

    @cached_property
    def on_gpu(self) -> torch.Tensor:
        """The same memory as `data` by its address on the GPU."""
        view: torch.Tensor = get_accelerator_view_from_cpu_tensor(self.data)
        return view
