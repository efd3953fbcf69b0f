"""The KV cache's arithmetic against vLLM's own functions, for layers of every kind."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from shoehorn.model.layer_caches import KvLayers, StateLayers
from shoehorn.planner.memory.kv_cache import KvLayout, layouts
from shoehorn.planner.memory.kv_groups import group_size
from shoehorn.planner.memory.kv_pages import PageKind, Pages, pages
from shoehorn.planner.serving_config import CacheOptions

GIB = 1 << 30
MODEL = Path(__file__).resolve().parents[3] / "demo" / "model"
ONE_STAGE = (range(1000),)

Kinds = tuple[KvLayers | StateLayers, ...]


def layers(count: int, first: int = 0) -> tuple[int, ...]:
    return tuple(range(first, first + count))


FULL_80 = (KvLayers(layers(80), 8, 256),)
GEMMA = (KvLayers(layers(8), 8, 512), KvLayers(layers(40, 8), 8, 512, 1024))
ALTERNATING = (KvLayers(layers(12), 8, 128), KvLayers(layers(12, 12), 8, 128, 128))
NEARLY = (KvLayers(layers(13), 8, 128), KvLayers(layers(12, 13), 8, 128, 128))
WINDOW = (KvLayers(layers(32), 8, 256, 4096),)
LATENT = (KvLayers(layers(27), 1, 576, latent=True),)
CHUNKS = (KvLayers(layers(12), 8, 256), KvLayers(layers(36, 12), 8, 256, 8192, chunked=True))
WIDER = (KvLayers(layers(10), 4, 1024), KvLayers(layers(50, 10), 16, 512, 1024))
PADDED = (KvLayers(layers(10), 3, 256), KvLayers(layers(20, 10), 8, 256, 512))
TWO_FULL = (KvLayers(layers(10), 3, 256), KvLayers(layers(20, 10), 8, 256))
INDEXED = (KvLayers(layers(61), 1, 576, latent=True), KvLayers(layers(61), 1, 132, latent=True, entry_bytes=1))
DELTA_NET = StateLayers(layers(48), 10240, 3, recurrent=48 * 128 * 128, recurrent_bytes=4)
QWEN = (KvLayers(layers(16, 48), 4, 512), DELTA_NET)
KIMI = (KvLayers(layers(7, 48), 1, 576, latent=True), DELTA_NET)
MAMBA2 = (KvLayers(layers(4, 27), 8, 256),
          StateLayers(layers(27), 10240, 3, 8, 256, 128 * 80 * 128, 4, checkpoints=1))
SHORT = (KvLayers(layers(6), 8, 128), StateLayers(layers(10, 6), 2048, 2, keeps_drafts=False))
WHISPER = (KvLayers(layers(32), 20, 128), KvLayers(layers(32), 20, 128, encoder=True))
ALL = {"full": FULL_80, "gemma": GEMMA, "alternating": ALTERNATING, "nearly": NEARLY, "window": WINDOW,
       "latent": LATENT, "chunks": CHUNKS, "wider": WIDER, "padded": PADDED, "two full": TWO_FULL, "indexed": INDEXED,
       "encoder": WHISPER, "qwen": QWEN, "kimi": KIMI, "mamba2": MAMBA2, "short": SHORT, "only states": (DELTA_NET,)}


def kinds_of(kinds: Kinds, block: int = 16, tensor_parallel: int = 1, drafts: int = 0, batch: int = 512
             ) -> tuple[Pages, ...]:
    return pages(tuple(kind for kind in kinds if isinstance(kind, KvLayers)),
                 tuple(kind for kind in kinds if isinstance(kind, StateLayers)), CacheOptions(block), tensor_parallel,
                 drafts, 2, batch)


def layout(kinds: Kinds, length: int, batch: int, block: int = 16, tensor_parallel: int = 1, drafts: int = 0
           ) -> KvLayout:
    return layouts(kinds_of(kinds, block, tensor_parallel, drafts, batch), length, 2 * batch, ONE_STAGE)[0]


@pytest.fixture(scope="module")
def engine() -> Any:
    """vLLM's configuration of a small model, two batches in flight as on a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, in what vLLM imports
        from vllm.engine.arg_utils import EngineArgs

        config = EngineArgs(model=str(MODEL), max_model_len=2048, max_num_seqs=4).create_engine_config()
    config.cache_config.kv_cache_layout = "LBNHC"
    return config


def by_vllm(engine: Any, kinds: Kinds, length: int, block: int, batch: int, size: int) -> int:
    """Tokens, as vLLM computes them. Blocks and pages of states are aligned as its platform does with a model."""
    import torch
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        CrossAttentionSpec,
        FullAttentionSpec,
        MambaSpec,
        MLAAttentionSpec,
        SlidingWindowSpec,
    )

    engine.model_config.max_model_len = length
    engine.scheduler_config.max_num_batched_tokens = 2 * batch  # one batch of twice the size is two in flight
    engine.scheduler_config.max_num_encoder_input_tokens = batch
    engine.cache_config.mamba_cache_mode = "align" if len(kinds) > 1 else "none"
    aligned = {page.kind: page for page in kinds_of(kinds, block)}
    if PageKind.STATE in aligned and PageKind.FULL in aligned:
        block = aligned[PageKind.FULL].block_tokens
    specs: dict[str, Any] = {}
    for position, kind in enumerate(kinds):
        for number in kind.numbers:
            name = f"{position}.{number}"
            if isinstance(kind, StateLayers):
                shapes = ((kind.rows, kind.channels + kind.groups * kind.group_channels), (kind.recurrent,))
                dtypes = (torch.bfloat16, torch.float32 if kind.recurrent_bytes else torch.bfloat16)
                specs[name] = MambaSpec(shapes=shapes, dtypes=dtypes, block_size=block,
                                        page_size_padded=aligned[PageKind.STATE].bytes,
                                        num_prefill_checkpoint_blocks=kind.checkpoints, mamba_cache_mode="align")
                continue
            dtype = torch.uint8 if kind.entry_bytes == 1 else torch.bfloat16
            common = {"block_size": block, "num_kv_heads": kind.heads, "dtype": dtype}
            if kind.encoder:
                specs[name] = CrossAttentionSpec(head_size=kind.width // 2, **common)
            elif kind.latent:
                specs[name] = MLAAttentionSpec(head_size=kind.width, **common)
            elif kind.chunked:
                specs[name] = ChunkedLocalAttentionSpec(head_size=kind.width // 2, attention_chunk_size=kind.window,
                                                        **common)
            elif kind.window:
                specs[name] = SlidingWindowSpec(head_size=kind.width // 2, sliding_window=kind.window, **common)
            else:
                specs[name] = FullAttentionSpec(head_size=kind.width // 2, **common)
    groups = kv_cache_utils.get_kv_cache_groups(engine, specs)
    config = kv_cache_utils.get_kv_cache_config_from_groups(engine, groups, size)
    return kv_cache_utils.get_kv_cache_capacity(engine, config)[0]


@pytest.mark.contract
@pytest.mark.parametrize("kinds", ALL.values(), ids=ALL)
@pytest.mark.parametrize(("length", "block", "batch"), [(512, 16, 512), (8192, 16, 2048), (32768, 32, 8192),
                                                        (5000, 16, 300)])
def test_tokens_are_those_of_vllm(engine: Any, kinds: Kinds, length: int, block: int, batch: int) -> None:
    expected = by_vllm(engine, kinds, length, block, batch, 4 * GIB)
    assert layout(kinds, length, batch, block).tokens(4 * GIB) == pytest.approx(expected, abs=1)


def test_window_makes_long_requests_cheap() -> None:
    plain, hybrid = layout((KvLayers(layers(48), 8, 512),), 32768, 512), layout(GEMMA, 32768, 512)
    assert hybrid.tokens(GIB) > 4 * plain.tokens(GIB)
    assert hybrid.bytes_for(2) == 2 * hybrid.bytes_for(1) - hybrid.block_bytes < plain.bytes_for(1)


def test_heads_are_divided_and_copied_but_a_compressed_cache_is_whole_on_every_gpu() -> None:
    def block(kinds: Kinds, tensor_parallel: int) -> int:
        return layout(kinds, 512, 512, tensor_parallel=tensor_parallel).block_bytes

    assert block(FULL_80, 1) == 8 * block(FULL_80, 8) == 8 * block(FULL_80, 16) == 16 * 327_680
    assert block(LATENT, 1) == block(LATENT, 8) == 16 * 27 * 576 * 2


def test_groups_are_as_large_as_the_rarer_kind_unless_both_are_nearly_as_many() -> None:
    assert (group_size([8, 40]), group_size([12, 13]), group_size([80])) == (8, 13, 80)


def test_blocks_of_a_model_with_states_hold_a_state() -> None:
    """Qwen3.5-27B, as the engine logs it: blocks of 784 tokens; three groups of states, one of attention."""
    computed = layout(QWEN, 262_144, 2048)
    assert (computed.block_bytes, computed.blocks_per_request) == (51_380_224, 335 + 3 * 2)
    assert (computed.states, computed.state_bytes) == (2, 2 * 48 * 3_211_264)


def test_blocks_of_compressed_attention_with_states_are_multiples_of_128_tokens() -> None:
    assert [page.block_tokens for page in kinds_of(KIMI)] == [2816, 2816]
    assert [page.block_tokens for page in kinds_of(QWEN)] == [784, 784]


def test_sequences_are_limited_by_their_states() -> None:
    computed = layout(QWEN, 4096, 2048)
    assert computed.blocks(4 * GIB) == 83
    assert computed.sequences(4 * GIB) == (83 - 1) // (1 + 3 * 2)
    assert computed.bytes_for(1, sequences=80) == 80 * computed.block_bytes


def test_every_draft_token_keeps_a_state_and_lengthens_the_convolution() -> None:
    drafting, plain = kinds_of(QWEN, drafts=3)[-1], kinds_of(QWEN)[-1]
    assert drafting.window == plain.window + 3
    assert DELTA_NET.bytes(1, 3, 2) - DELTA_NET.bytes(1, 0, 2) == 3 * 10240 * 2


def test_without_prefix_caching_a_sequence_keeps_one_state() -> None:
    kinds = pages(QWEN[:1], QWEN[1:], CacheOptions(caches_prefixes=False), 1, 0, 2, 512)  # type: ignore[arg-type]
    assert kinds[-1].window == 1


def test_groups_of_mamba2_are_completed_for_every_gpu() -> None:
    one_group = StateLayers((0,), 3072, 3, 1, 512)
    assert one_group.bytes(1, 0, 2) == (3072 + 512) * 3 * 2
    assert one_group.bytes(2, 0, 2) == (3072 + 2 * 512) // 2 * 3 * 2


def test_every_stage_holds_its_layers_of_every_group() -> None:
    numbers = range(8)
    kinds = (KvLayers(tuple(numbers[3::4]), 8, 256), KvLayers(tuple(n for n in numbers if n % 4 != 3), 8, 256, 64))
    stages = layouts(kinds_of(kinds), 1024, 1024, (range(4), range(4, 8)))
    whole = layouts(kinds_of(kinds), 1024, 1024, ONE_STAGE)[0]
    assert [stage.block_bytes for stage in stages] == [whole.block_bytes // 2] * 2
    assert {stage.blocks_per_request for stage in stages} == {whole.blocks_per_request}


def test_a_model_without_a_cache_needs_none() -> None:
    empty = layouts((), 512, 512, ONE_STAGE)[0]
    assert (empty.tokens(GIB), empty.bytes_for(2), empty.blocks(GIB)) == (0, 0, 0)
