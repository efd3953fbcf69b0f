"""What everybody may see of the plan: figures of its own, for the console page and `/status`.

Rules: nothing that a user typed freely (engine options, names of files) is in it, since no key is asked for; every size
has its unit in its name; a plan for the CPU has no `vram`.
"""

from __future__ import annotations

from typing import Any

from shoehorn.plan import Plan


def of(plan: Plan) -> dict[str, Any]:
    """JSON-ready; all sizes in bytes, `expected_tokens_per_second` by batch size or None where nothing is known.

    `quantization` is `bitsandbytes`, `int4`, or empty: as the checkpoint is. `vram` has one entry a GPU, whose parts
    add up to its `total_bytes`.
    """
    choices = plan.choices
    return {"quantization": choices.quantization or "", "max_model_len": choices.max_model_len,
            "max_num_seqs": choices.max_num_seqs, "kv_cache_tokens": plan.kv_cache_tokens,
            "offloaded_bytes": plan.offloaded_bytes, "host_bytes": plan.host_bytes, "disk_bytes": plan.disk_bytes,
            "expected_tokens_per_second": dict(plan.expected_tokens_per_second),
            "vram": [parts.to_json() for parts in plan.vram]}
