"""The bytes that a plan expects of one GPU, by part."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class VramParts:
    """Expected bytes of one GPU, by part; they add up to what NVML shows.

    Attributes:
        weights_bytes: layers held on the card, norms, and the rotary table.
        quant_state_bytes: bitsandbytes' absmax, which stays on the card also when the weights do not.
        limit_bytes: what the plan may use of the card.
    """

    weights_bytes: int
    quant_state_bytes: int
    embeddings_bytes: int
    offload_buffer_bytes: int
    kv_cache_bytes: int
    activations_bytes: int
    cuda_graphs_bytes: int
    framework_bytes: int
    limit_bytes: int

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return (self.weights_bytes + self.quant_state_bytes + self.embeddings_bytes + self.offload_buffer_bytes
                + self.kv_cache_bytes + self.activations_bytes + self.cuda_graphs_bytes + self.framework_bytes)

    def to_json(self) -> dict[str, int]:
        """All parts, total and limit."""
        return {**asdict(self), "total_bytes": self.total_bytes}
