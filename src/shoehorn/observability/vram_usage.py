"""Attribution of a GPU's used memory: parts that add up to its size.

Rules: weights, quantization state (of bitsandbytes; else part of the weights), KV cache and CUDA graphs are the
engine's figures after its load, valid only while it is ready; `framework` is the rest that the appliance used when
it became ready (CUDA's context, workspaces), `activations` what it allocated since; before that all of it is
`unattributed`. The appliance's processes are those that NVML names; where it names none, as in most containers, the
appliance is taken to use what it used when it became ready, and the rest belongs to other processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shoehorn.observability.gpu_metrics import GpuSample

PARTS = ("weights", "quant_state", "kv_cache", "cuda_graphs", "framework", "activations", "unattributed",
         "other_processes", "driver", "free")
_ENGINE_PARTS = ("weights", "quant_state", "kv_cache", "cuda_graphs")
_REQUIRED_PARTS = frozenset(_ENGINE_PARTS) - {"quant_state"}


def breakdown(rows: Sequence[Mapping[str, Any]], gpu: GpuSample, *, ready: bool) -> Mapping[str, int]:
    """Compute bytes by part, adding up to the GPU's size; empty where NVML does not report the used memory.

    Args:
        rows: of this GPU, as in the state: part, expected_bytes, measured_bytes; none if the plan leaves it out.
        ready: the engine serves, so that its figures are valid.
    """
    if gpu.memory_used_bytes is None or gpu.memory_free_bytes is None:
        return {}
    measured = {str(row["part"]): int(row["measured_bytes"]) for row in rows if row["measured_bytes"] is not None}
    named_sizes = [process.memory_bytes for process in gpu.processes
             if process.name != "unknown" and process.memory_bytes is not None]
    used = gpu.memory_used_bytes
    own = min(used, sum(named_sizes) if named_sizes else measured.get("total", used if rows else 0) if ready
              else used)
    parts = {part: measured[part] for part in _ENGINE_PARTS if part in measured} if ready else {}
    if parts.keys() >= _REQUIRED_PARTS and sum(parts.values()) <= own:
        rest = own - sum(parts.values())
        parts["framework"] = min(rest, measured.get("framework", rest))
        parts["activations"] = rest - parts["framework"]
    else:
        parts = {"unattributed": own}
    return {**parts, "other_processes": used - own, "driver": gpu.memory_reserved_bytes or 0,
            "free": gpu.memory_free_bytes}


