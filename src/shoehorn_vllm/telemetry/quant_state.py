"""What bitsandbytes' quantization state takes of the card, said in the engine's log like its other figures.

Rules: it counts what the estimator calls state: absmax in 32 bits, which stays on the card; one that is nested travels
with its weights and belongs to them. `memory_log` reads the record.
"""

from __future__ import annotations

import logging
from typing import Any

TEMPLATE = "bitsandbytes' quantization state takes %d bytes"

log = logging.getLogger("vllm.shoehorn_vllm")  # below vLLM's own, whose handlers it needs


_found: dict[int, int] = {}  # bytes by address: of the model, and of a draft that is loaded after it


def say(model: Any) -> None:
    """Log what the state of all models loaded in this process takes; nothing where there is none.

    Args:
        model: a torch module that was just loaded.
    """
    for parameter in model.parameters():
        states = getattr(parameter, "bnb_quant_state", None)
        for state in states.values() if isinstance(states, dict) else (states,) if states else ():
            if not state.nested:  # stacked matrices share one tensor
                _found[state.absmax.data_ptr()] = state.absmax.nbytes
    if total := sum(_found.values()):
        log.info(TEMPLATE, total)
