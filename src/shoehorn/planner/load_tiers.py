"""Load tiers: the combinations of context, sequences and batch that the search tries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoadTier:
    """A load to offer: longest request, requests at a time, and tokens in a batch."""

    context: int
    sequences: int
    tokens: int


CONTEXT_8K, CONTEXT_4K = LoadTier(8192, 32, 2048), LoadTier(4096, 16, 1024)

LOAD_TIERS = (LoadTier(131_072, 256, 8192), LoadTier(65_536, 256, 8192), LoadTier(32_768, 256, 8192),
              LoadTier(32_768, 64, 4096), LoadTier(16_384, 64, 2048), CONTEXT_8K, CONTEXT_4K,
              LoadTier(2048, 8, 512), LoadTier(1024, 4, 256), LoadTier(512, 2, 128))
"""The largest first."""

LARGEST, SMALLEST = LOAD_TIERS[0], LOAD_TIERS[-1]

RESIDENT_TIERS = LOAD_TIERS[:LOAD_TIERS.index(CONTEXT_4K) + 1]
"""Loads for which weights stay on the GPUs."""

COMFORTABLE_TIERS = LOAD_TIERS[:LOAD_TIERS.index(CONTEXT_8K) + 1]
"""Loads for which the checkpoint stays unquantized."""

SMALL_TIERS = LOAD_TIERS[LOAD_TIERS.index(CONTEXT_4K):]
"""Loads for which layers are offloaded where nothing else fits."""

TIGHT_TIER = LoadTier(4096, 8, 512)
"""A useful context for one request, with fewer CUDA graphs or none: preferred to offload."""
