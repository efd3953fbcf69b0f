"""Groups of tensors by structure: layers under any prefix, towers, tables, and layers that are not loaded."""

from __future__ import annotations

import math

import pytest

from shoehorn.model.division import Division
from shoehorn.model.safetensors import Tensor
from shoehorn.model.tensor_groups import TextSizes, group_tensors, layer_list

SIZES = TextSizes(layers=3, vocab=100)


def tensor(name: str, *shape: int) -> Tensor:
    return Tensor(name, "BF16", shape, 2 * math.prod(shape))


def model(prefix: str, layers: int = 3) -> list[Tensor]:
    return [tensor(f"{prefix}.{number}.mlp.up_proj.weight", 128, 64) for number in range(layers)]


@pytest.mark.parametrize("prefix", [
    "model.layers", "backbone.layers", "transformer.encoder.layers", "transformer.h", "h", "gpt_neox.layers",
    "model.language_model.layers", "language_model.model.layers", "model.decoder.layers", "transformer.blocks",
    "anything.at.all"])
def test_layers_are_found_under_any_prefix(prefix: str) -> None:
    grouped = group_tensors([*model(prefix), tensor("norm.weight", 64)], SIZES, Division())
    assert (grouped.prefix, grouped.layers) == (prefix, 3)
    assert grouped.groups.linears.bytes == 3 * 128 * 64 * 2
    assert grouped.groups.other.bytes == 128


def test_larger_tower_is_not_the_text_model() -> None:
    tower = [tensor(f"vision_model.encoder.layers.{number}.fc1.weight", 640, 640) for number in range(48)]
    assert layer_list([*tower, *model("language_model.model.layers")], 3) == ("language_model.model.layers", 3)
    assert group_tensors([*tower, *model("m")], SIZES, Division()).groups.divided.bytes == 48 * 640 * 640 * 2


@pytest.mark.parametrize("name", ["mtp.layers.0.mlp.up_proj.weight", "model.mtp_layers.0.up_proj.weight",
                                  "model.layers.3.mlp.up_proj.weight", "mtp.fc.weight"])
def test_layers_for_further_tokens_are_unused(name: str) -> None:
    grouped = group_tensors([*model("model.layers"), tensor(name, 128, 64)], SIZES, Division())
    assert grouped.groups.unused.bytes == 128 * 64 * 2


@pytest.mark.parametrize(("name", "shape", "group"), [
    ("transformer.wte.weight", (100, 64), "embedding"), ("backbone.embeddings.weight", (112, 64), "embedding"),
    ("transformer.embedding.word_embeddings.weight", (100, 64), "embedding"),
    ("embed_out.weight", (100, 64), "lm_head"),
    ("transformer.output_layer.weight", (100, 64), "lm_head"), ("model.embed_positions.weight", (512, 64), "other"),
    ("embeddings.token_type_embeddings.weight", (2, 64), "other"),
    ("model.layers.0.mlp.experts.gate_up_proj", (8, 64, 128), "experts"),
    ("model.layers.0.block_sparse_moe.input_linear.weight", (8, 128, 64), "experts"),
    ("model.layers.0.mixer.conv1d.weight", (128, 1, 4), "linears")])
def test_group_of_a_tensor(name: str, shape: tuple[int, ...], group: str) -> None:
    grouped = group_tensors([*model("model.layers"), tensor(name, *shape)], SIZES, Division())
    before = group_tensors(model("model.layers"), SIZES, Division())
    assert getattr(grouped.groups, group).bytes - getattr(before.groups, group).bytes == 2 * math.prod(shape)


def test_matrices_that_few_gpus_divide_are_counted() -> None:
    grouped = group_tensors([tensor("model.layers.0.mlp.gate.weight", 8, 64),
                             tensor("model.layers.0.self_attn.k_proj.weight", 32, 64),
                             tensor("model.layers.1.self_attn.qkv_proj.weight", 128, 64)], SIZES, Division(2, 0.5))
    assert dict(grouped.few_gpus) == {1: 8 * 64 * 2, 2: 32 * 64 * 2 + 128 * 64 * 2 // 2}


def test_embedding_of_a_model_with_an_encoder_is_whole() -> None:
    table = tensor("model.decoder.embed_tokens.weight", 100, 64)
    grouped = group_tensors([*model("model.decoder.layers"), table], TextSizes(3, 100, whole_table=True), Division())
    assert grouped.groups.other.bytes == table.bytes


@pytest.mark.parametrize(("name", "elements"), [("lm_head.weight", 0), ("pooler.dense.weight", 0),
                                                ("score.weight", 2 * 100 * 64), ("bert.pooler.dense.weight", 12_800)])
def test_pooling_models_have_no_output_head_and_scores_in_fp32(name: str, elements: int) -> None:
    grouped = group_tensors([*model("layers"), tensor(name, 100, 64)], TextSizes(3, 100, pooling=True), Division())
    assert grouped.groups.lm_head.bytes == 0
    assert grouped.groups.other.parameters == elements


def test_scales_of_packed_experts_are_counted() -> None:
    names = ("qweight", "scales", "qzeros", "g_idx")
    grouped = group_tensors([tensor(f"model.layers.0.mlp.experts.0.up_proj.{name}", 8, 16) for name in names], SIZES,
                            Division())
    assert (grouped.expert_scale_bytes, grouped.expert_zero_bytes) == (256, 256)
    assert (grouped.groups.experts.bytes, grouped.groups.unused.bytes) == (3 * 256, 256)
