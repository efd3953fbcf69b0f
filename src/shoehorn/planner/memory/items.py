"""Images, videos and sound in requests: largest items, the encoder's cache, and the batch of the profile run.

Rules: the engine caches the embeddings of as many tokens as one batch or one largest item has; it profiles with as many
of the largest items as that takes. An encoder all of whose modalities are limited to 0 is not loaded.

Source: vllm/multimodal/encoder_budget.py and vllm/v1/core/encoder_cache_manager.py (compute_mm_encoder_budget) of
vLLM 0.32.0.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoehorn.common.units import ceil_div
from shoehorn.model.shape import Encoder, ModelShape
from shoehorn.planner.serving_config import ServingConfig

_PIXEL_BYTES = 4  # the item itself, in fp32
_COLORS = 3
_RESIDUAL_WIDTHS = 9  # of a layer, as in the text model
_INNER_WIDTHS = 3


def active_modalities(encoder: Encoder, config: ServingConfig) -> list[str]:
    """Return the modalities that requests may contain."""
    return [modality for modality in encoder.modalities if config.items.limit(modality)]


@dataclass(frozen=True)
class ItemBatch:
    """Items that the engine plans memory for.

    Attributes:
        budget_tokens: of the encoder's cache.
        items: that the engine profiles with.
        item_tokens: of each.
    """

    budget_tokens: int
    items: int
    item_tokens: int


def largest_item(encoder: Encoder, config: ServingConfig) -> int:
    """Return the tokens of the largest item; one batch where it is unknown."""
    tokens = encoder.item_tokens or config.limits.max_num_batched_tokens
    if encoder.pixels and config.items.max_pixels:
        tokens = max(1, config.items.max_pixels // encoder.pixels)
    if "video" in active_modalities(encoder, config):
        tokens *= max(1, min(encoder.longest_video, config.limits.max_model_len // tokens))
    return tokens


def remark(encoder: Encoder, config: ServingConfig) -> str:
    """Return what the plan assumes of the encoder."""
    modalities = active_modalities(encoder, config)
    if not modalities:
        return f"the encoder for {' and '.join(encoder.modalities)} is not loaded, since the options allow no items"
    unknown = "" if encoder.item_tokens else ", since config.json does not give the largest"
    return f"the encoder for {' and '.join(modalities)} is planned for items of up to " \
        f"{largest_item(encoder, config)} tokens{unknown}; its activations were not measured"


def item_batch(encoder: Encoder, config: ServingConfig) -> ItemBatch:
    """Return the batch of an active encoder's largest items."""
    tokens, limits = largest_item(encoder, config), config.limits
    budget = max(limits.max_num_batched_tokens, tokens)
    limit = max(config.items.limit(modality) for modality in encoder.modalities)
    in_prompts = limits.max_num_seqs * max(1, min(limit, limits.max_model_len // tokens))
    return ItemBatch(budget, max(1, min(budget // tokens, in_prompts)), tokens)


def items_bytes(shape: ModelShape, config: ServingConfig) -> tuple[int, int]:
    """Return the peak of the encoders, one after the other, and the size of their full cache."""
    active = [encoder for encoder in shape.encoders if active_modalities(encoder, config)]
    widest = max((encoder.token_width for encoder in active), default=0)
    budget = max((item_batch(encoder, config).budget_tokens for encoder in active), default=0)
    return (max((_peak_bytes(encoder, config) for encoder in active), default=0),
            budget * widest * config.dtype_bytes)


def _peak_bytes(encoder: Encoder, config: ServingConfig) -> int:
    """Return the activations of one layer over the batch of items, and the items themselves."""
    batch = item_batch(encoder, config)
    positions = round(batch.items * batch.item_tokens * encoder.patches)
    inner = ceil_div(encoder.inner, 1 if config.items.whole_towers else config.parallelism.tensor)
    pixels = encoder.pixels / encoder.patches * _COLORS * _PIXEL_BYTES
    return round(positions * ((_RESIDUAL_WIDTHS * encoder.width + _INNER_WIDTHS * inner) * config.dtype_bytes + pixels))
