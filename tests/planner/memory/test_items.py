"""Memory for images, videos and sound: encoder cache and profiled items, against vLLM's own budget."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fakes import captured
from shoehorn.model import checkpoint
from shoehorn.model.shape import Encoder
from shoehorn.planner.memory.items import item_batch, items_bytes, largest_item, remark
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.serving_config import ItemOptions, Limits, Parallelism, ServingConfig
from shoehorn.planner.vllm_args import with_options

IMAGE = Encoder(("image", "video"), 256, 4, 1152, 4304, 4096, pixels=784)


def config(batch: int = 2048, sequences: int = 8, context: int = 8192) -> ServingConfig:
    return ServingConfig(1 << 40, Limits(context, sequences, batch))


@pytest.mark.contract
@pytest.mark.parametrize(("tokens", "batch", "sequences", "context", "limit"), [
    (256, 2048, 8, 8192, 999), (16_384, 2048, 8, 8192, 999), (576, 2048, 1, 600, 999), (256, 8192, 2, 8192, 1),
    (3025, 8192, 8, 2048, 999)])
def test_budget_is_that_of_vllm(tokens: int, batch: int, sequences: int, context: int, limit: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, in what vLLM imports
        from vllm.multimodal.encoder_budget import MultiModalBudget
        from vllm.v1.core.encoder_cache_manager import compute_mm_encoder_budget

    scheduler = SimpleNamespace(max_num_encoder_input_tokens=batch, encoder_cache_size=batch,
                                max_num_batched_tokens=batch, disable_chunked_mm_input=False,
                                enable_chunked_prefill=True)
    compute, cache = compute_mm_encoder_budget(scheduler, {"image": tokens})  # type: ignore[arg-type]
    budget = SimpleNamespace(encoder_compute_budget=compute, encoder_cache_size=cache, mm_limits={"image": limit},
                             scheduler_config=scheduler, max_num_reqs=sequences, max_model_len=context,
                             get_encoder_budget=lambda: min(compute, cache))
    items = MultiModalBudget._get_max_items(budget, "image", tokens)[1]  # type: ignore[arg-type]
    options = ItemOptions((("image", limit), ("video", 0)))
    planned = item_batch(replace(IMAGE, item_tokens=tokens), replace(config(batch, sequences, context), items=options))
    assert (planned.budget_tokens, planned.items) == (cache, items)


@pytest.mark.parametrize(("options", "tokens", "text"), [
    ({}, 256, "image and video is planned for items of up to 256 tokens;"), ({}, 0, "up to 2048 tokens, since config"),
    ({"limit-mm-per-prompt": {"video": 0}}, 256, "for image is planned"),
    ({"language-model-only": True}, 256, "for image and video is not loaded")])
def test_remark(options: dict[str, object], tokens: int, text: str) -> None:
    assert text in remark(replace(IMAGE, item_tokens=tokens), with_options(config(), options))


def test_unknown_item_counts_as_a_batch() -> None:
    assert largest_item(replace(IMAGE, item_tokens=0), config(batch=512)) == 512


def test_video_of_several_images_needs_a_context_for_them() -> None:
    video = replace(IMAGE, item_tokens=1000, longest_video=7)
    assert [largest_item(video, config(context=tokens)) for tokens in (1500, 3500, 99_999)] == [1000, 3000, 7000]
    without = with_options(config(context=99_999), {"limit-mm-per-prompt": {"video": 0}})
    assert largest_item(video, without) == 1000


@pytest.mark.parametrize("value", [{"max_pixels": 78_400}, {"size": {"longest_edge": 78_400}}])
def test_limit_of_pixels_makes_items_smaller(value: dict[str, object]) -> None:
    assert largest_item(IMAGE, with_options(config(), {"mm-processor-kwargs": value})) == 100


def test_encoder_and_cache_belong_to_the_activations_of_the_first_stage() -> None:
    shape = checkpoint.read(captured.files("gemma-3-12b-it"))
    staged = replace(config(), parallelism=Parallelism(pipeline=2))
    model, text = MemoryModel(shape, staged), MemoryModel(replace(shape, encoders=()), staged)
    encoding, cached = items_bytes(shape, staged)
    assert cached == 2048 * 3840 * 2
    assert model.activations.bytes(0) == encoding + cached > text.activations.bytes(0)
    assert model.activations.bytes(1) == text.activations.bytes(1)


@pytest.mark.parametrize("options", [{"limit-mm-per-prompt": {"image": 0}}, {"language-model-only": True},
                                     {"limit-mm-per-prompt": {"image": {"count": 0}}}])
def test_encoder_without_items_is_not_loaded(options: dict[str, object]) -> None:
    shape = checkpoint.read(captured.files("gemma-3-12b-it"))
    with_images, without = MemoryModel(shape, config()), MemoryModel(shape, with_options(config(), options))
    tower = shape.encoders[0].divided.bytes + shape.encoders[0].whole.bytes
    assert with_images.weights.other_bytes - without.weights.other_bytes == tower > 700 << 20
    assert items_bytes(shape, without.config) == (0, 0)


def test_encoders_that_divide_the_items_are_whole() -> None:
    shape = checkpoint.read(captured.files("gemma-3-12b-it"))
    divided = replace(config(), parallelism=Parallelism(tensor=2))
    whole = with_options(divided, {"mm-encoder-tp-mode": "data"})
    more = MemoryModel(shape, whole).weights.other_bytes - MemoryModel(shape, divided).weights.other_bytes
    assert more == pytest.approx(shape.encoders[0].divided.bytes / 2, abs=1)
    assert items_bytes(shape, whole)[0] > items_bytes(shape, divided)[0]
