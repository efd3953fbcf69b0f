"""The KV cache's arithmetic against vLLM's own functions, for layers of every kind."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fakes.checkpoint_files import dense
from shoehorn.model import checkpoint as checkpoints
from shoehorn.model.shape import KvLayers
from shoehorn.planner.memory.kv_cache import group_size, layout

GIB = 1 << 30
SHAPE = checkpoints.read(dense(256, 768, 4, 4, 2, 2048))
MODEL = Path(__file__).resolve().parents[3] / "demo" / "model"

FULL_80 = (KvLayers(80, 8, 256),)
GEMMA = (KvLayers(8, 8, 512), KvLayers(40, 8, 512, 1024))
ALTERNATING = (KvLayers(12, 8, 128), KvLayers(12, 8, 128, 128))
NEARLY = (KvLayers(13, 8, 128), KvLayers(12, 8, 128, 128))
WINDOW = (KvLayers(32, 8, 256, 4096),)
LATENT = (KvLayers(27, 1, 576, latent=True),)


@pytest.fixture(scope="module")
def engine() -> Any:
    """vLLM's configuration of a small model, two batches in flight as on a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, in what vLLM imports
        from vllm.engine.arg_utils import EngineArgs

        config = EngineArgs(model=str(MODEL), max_model_len=2048, max_num_seqs=4).create_engine_config()
    config.cache_config.kv_cache_layout = "LBNHC"
    return config


def by_vllm(engine: Any, kinds: tuple[KvLayers, ...], length: int, block: int, batch: int, size: int) -> int:
    """Tokens, as vLLM computes them."""
    import torch
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

    engine.model_config.max_model_len = length
    engine.scheduler_config.max_num_batched_tokens = 2 * batch  # one batch of twice the size is two in flight
    specs: dict[str, Any] = {}
    for kind in kinds:
        for number in range(kind.layers):
            common = {"block_size": block, "num_kv_heads": kind.heads, "dtype": torch.bfloat16}
            name = f"{kind.window}.{number}"
            if kind.latent:
                specs[name] = MLAAttentionSpec(head_size=kind.width, **common)
            elif kind.window:
                specs[name] = SlidingWindowSpec(head_size=kind.width // 2, sliding_window=kind.window, **common)
            else:
                specs[name] = FullAttentionSpec(head_size=kind.width // 2, **common)
    groups = kv_cache_utils.get_kv_cache_groups(engine, specs)
    config = kv_cache_utils.get_kv_cache_config_from_groups(engine, groups, size)
    return kv_cache_utils.get_kv_cache_capacity(engine, config)[0]


@pytest.mark.contract
@pytest.mark.parametrize("kinds", [FULL_80, GEMMA, ALTERNATING, NEARLY, WINDOW, LATENT])
@pytest.mark.parametrize(("length", "block", "batch"), [(512, 16, 512), (8192, 16, 2048), (32768, 32, 8192),
                                                        (5000, 16, 300)])
def test_tokens_are_those_of_vllm(engine: Any, kinds: tuple[KvLayers, ...], length: int, block: int,
                                  batch: int) -> None:
    expected = by_vllm(engine, kinds, length, block, batch, 4 * GIB)
    computed = layout(replace(SHAPE, kv_layers=kinds), length, block, 2, batch)
    assert computed.tokens(4 * GIB) == pytest.approx(expected, abs=1)


def test_window_makes_long_requests_cheap() -> None:
    plain = layout(replace(SHAPE, kv_layers=(KvLayers(48, 8, 512),)), 32768, 16, 2, 512)
    hybrid = layout(replace(SHAPE, kv_layers=GEMMA), 32768, 16, 2, 512)
    assert hybrid.tokens(GIB) > 4 * plain.tokens(GIB)
    assert hybrid.bytes_for(2) == 2 * hybrid.bytes_for(1) < plain.bytes_for(1)


def test_heads_are_divided_and_copied_but_a_compressed_cache_is_whole_on_every_gpu() -> None:
    def block(kinds: tuple[KvLayers, ...], tensor_parallel: int) -> int:
        return layout(replace(SHAPE, kv_layers=kinds), 512, 16, 2, 512, tensor_parallel).block_bytes

    assert block(FULL_80, 1) == 8 * block(FULL_80, 8) == 8 * block(FULL_80, 16) == 16 * 327_680
    assert block(LATENT, 1) == block(LATENT, 8) == 16 * 27 * 576 * 2


def test_groups_are_as_large_as_the_rarer_kind_unless_both_are_nearly_as_many() -> None:
    assert (group_size([8, 40]), group_size([12, 13]), group_size([80])) == (8, 13, 80)
