"""Measured loss of a conversion: the next token's distribution after quantized and after unquantized layers.

Output head and final norm are those of the original in both, so the loss is that of the decoder layers.
"""

from __future__ import annotations

import torch

from shoehorn.common.errors import ModelUnavailableError
from shoehorn.int4.calibration.decoder import Decoder

WARNING_KL = 0.1
"""Mean KL divergence in nats above which a conversion warns."""

_POSITIONS = 512
_ROWS = 16_384


def measure(decoder: Decoder, reference: torch.Tensor, hidden: torch.Tensor) -> dict[str, float] | None:
    """Return mean and 99th percentile of the KL divergence in nats, and the share of equal top-1 tokens.

    Args:
        reference: hidden states after all unquantized layers, [sequences, length, hidden].
        hidden: the same after the quantized ones.

    Returns:
        None if norm and head of the original are deleted already.
    """
    step = max(1, reference.shape[0] * reference.shape[1] // _POSITIONS)
    try:
        head = decoder.head()
        exact, changed = (_log_probabilities(decoder, head, states.flatten(0, 1)[::step])
                          for states in (reference, hidden))
    except ModelUnavailableError:
        return None
    divergence = (exact.exp() * (exact - changed)).sum(-1)
    return {"kl_mean": round(float(divergence.mean()), 5), "kl_p99": round(float(divergence.quantile(0.99)), 4),
            "same_top1": round(float((exact.argmax(-1) == changed.argmax(-1)).float().mean()), 4),
            "positions": len(divergence)}


def _log_probabilities(decoder: Decoder, head: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    normed = decoder.final_norm(hidden).float()
    logits = torch.cat([normed @ rows.float().T for rows in torch.split(head, _ROWS)], 1)
    if decoder.logit_cap:
        logits = (logits / decoder.logit_cap).tanh() * decoder.logit_cap
    return logits.log_softmax(-1)
