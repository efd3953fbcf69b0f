"""Reports the GPU memory of bitsandbytes' quantization state in the engine's log, like its other figures.

Rules: counted is what the estimator calls state: dequantized absmax, which stays on the GPU; a quantized one is
offloaded with its weights and belongs to them. `memory_log` reads the record.
"""

from __future__ import annotations

import logging
from typing import Any

TEMPLATE = "bitsandbytes' quantization state takes %d bytes"

log = logging.getLogger("vllm.shoehorn_vllm")  # below vLLM's own logger, for its handlers


_bytes_by_address: dict[int, int] = {}  # of the model, and of a draft model that is loaded after it


def report(model: Any) -> None:
    """Log the state of all models loaded in this process; nothing without quantization state.

    Args:
        model: a torch module that was just loaded.
    """
    for parameter in model.parameters():
        states = getattr(parameter, "bnb_quant_state", None)
        for state in states.values() if isinstance(states, dict) else (states,) if states else ():
            if not state.nested:  # stacked matrices share one tensor
                _bytes_by_address[state.absmax.data_ptr()] = state.absmax.nbytes
    if total := sum(_bytes_by_address.values()):
        log.info(TEMPLATE, total)
