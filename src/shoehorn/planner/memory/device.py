"""Expected memory of one device by part: a GPU, or the CPU with its host memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PARTS = {"weights_bytes": "weights", "quant_state_bytes": "quantization state", "embeddings_bytes": "embeddings",
         "offload_buffer_bytes": "offload buffers", "kv_cache_bytes": "KV cache", "activations_bytes": "activations",
         "cuda_graphs_bytes": "CUDA graphs", "framework_bytes": "framework"}
"""Names for people of the parts that add up to a device's total, in the order of the JSON."""

CPU = "cpu"
"""Name of the CPU as a device; GPUs are `gpu0`, `gpu1`, ... in the order of the plan."""


def gpu_name(number: int) -> str:
    """Name of a GPU as a device."""
    return f"gpu{number}"


@dataclass(frozen=True)
class DeviceMemory:
    """Expected bytes of one device, by part. The parts of a GPU add up to what NVML shows.

    Attributes:
        device: `gpu0`, `gpu1`, ... or `cpu`.
        weights_bytes: layers stored there, norms, and the rotary table.
        quant_state_bytes: bitsandbytes' absmax, which stays on the GPU also when the weights do not.
        framework_bytes: of a GPU: context, libraries, sampler, collectives; of the CPU: the processes themselves.
        limit_bytes: upper bound of the plan there; 0 where unknown.
        pinned_bytes: page-locked share of the total (CPU only).
    """

    device: str
    limit_bytes: int
    weights_bytes: int = 0
    quant_state_bytes: int = 0
    embeddings_bytes: int = 0
    offload_buffer_bytes: int = 0
    kv_cache_bytes: int = 0
    activations_bytes: int = 0
    cuda_graphs_bytes: int = 0
    framework_bytes: int = 0
    pinned_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts().values())

    @property
    def is_gpu(self) -> bool:
        """True for a GPU, False for the CPU."""
        return self.device != CPU

    def parts(self) -> dict[str, int]:
        """Map each part to its bytes."""
        return {part: getattr(self, part) for part in PARTS}

    def to_json(self) -> dict[str, int]:
        """All parts, limit and total: an entry of `vram` in `plan --json`."""
        return {**self.parts(), "limit_bytes": self.limit_bytes, "total_bytes": self.total_bytes}

    def to_device_json(self) -> dict[str, Any]:
        """All fields: an entry of `devices` in `plan --json`."""
        return {"device": self.device, **self.to_json(), "pinned_bytes": self.pinned_bytes}
