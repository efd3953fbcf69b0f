"""Where the memory of a card went, at one moment: parts that add up to the card.

Rules: weights, quantization state (bitsandbytes'; that of other kinds is part of the weights), KV cache and CUDA graphs
are what the engine said after its load, and hold only while it is ready; `framework` is what the appliance held besides
when it became ready (CUDA's context, workspaces), `activations` what it has taken of their reserve since; before that
all of it is `unattributed`. The appliance's processes are those that NVML shows by name; where it shows none, as in
most containers, the appliance holds what it held when it became ready, and the rest is other processes'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shoehorn.observability.gpu_metrics import Gpu

PARTS = ("weights", "quant_state", "kv_cache", "cuda_graphs", "framework", "activations", "unattributed",
         "other_processes", "driver", "free")
_ENGINES = ("weights", "quant_state", "kv_cache", "cuda_graphs")
_ALWAYS = frozenset(_ENGINES) - {"quant_state"}


def breakdown(rows: Sequence[Mapping[str, Any]], gpu: Gpu, *, ready: bool) -> Mapping[str, int]:
    """Bytes by part, adding up to the card; empty where NVML does not say how much is in use.

    Args:
        rows: of this card, as in the state: part, expected_bytes, measured_bytes.
        ready: the engine serves, so that what it said after its load is still true.
    """
    if gpu.memory_used_bytes is None or gpu.memory_free_bytes is None:
        return {}
    measured = {str(row["part"]): int(row["measured_bytes"]) for row in rows if row["measured_bytes"] is not None}
    named = [process.memory_bytes for process in gpu.processes
             if process.name != "unknown" and process.memory_bytes is not None]
    used = gpu.memory_used_bytes
    own = min(used, sum(named) if named else measured.get("total", used) if ready else used)
    parts = {part: measured[part] for part in _ENGINES if part in measured} if ready else {}
    if parts.keys() >= _ALWAYS and sum(parts.values()) <= own:
        rest = own - sum(parts.values())
        parts["framework"] = min(rest, measured.get("framework", rest))
        parts["activations"] = rest - parts["framework"]
    else:
        parts = {"unattributed": own}
    return {**parts, "other_processes": used - own, "driver": gpu.memory_reserved_bytes or 0,
            "free": gpu.memory_free_bytes}


def in_use(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """The cards in the order in which a plan uses them."""
    return tuple(sorted(gpus, key=lambda gpu: (-(gpu.memory_total_bytes or 0), gpu.index)))
