"""Memory of LoRA adapters, as vLLM 0.32.0 allocates their matrices."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes import captured
from shoehorn.model import checkpoint
from shoehorn.planner.memory.adapters import head_bytes, layer_bytes
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.serving_config import Adapters, Limits, Parallelism, ServingConfig

LLAMA = checkpoint.read(captured.files("llama-3.1-8b-instruct"))
MIXTURE = checkpoint.read(captured.files("qwen3-30b-a3b"))
ATTENTION = 3 * 4096 + (4096 + 2 * 1024) + 4096 + 4096
MLP = 2 * 4096 + 2 * 14336 + 14336 + 4096


@pytest.mark.parametrize(("adapters", "tensor", "entries"), [
    (Adapters(), 1, ATTENTION + MLP),
    (Adapters(targets=("q_proj", "model.layers.0.self_attn.v_proj")), 1, 3 * 4096 + 6144),
    (Adapters(), 2, 3 * 4096 + 6144 // 2 + 4096 // 2 + 4096 + 2 * 4096 + 14336 + 14336 // 2 + 4096),
    (Adapters(fully_sharded=True), 2, (ATTENTION + MLP) // 2),
    (Adapters(targets=("experts",)), 1, 0),
])
def test_bytes_of_a_layer(adapters: Adapters, tensor: int, entries: int) -> None:
    for count, rank in ((1, 16), (4, 64)):
        assert layer_bytes(LLAMA, replace(adapters, count=count, rank=rank), tensor, 2) == entries * count * rank * 2


def test_every_expert_has_adapters() -> None:
    experts = layer_bytes(MIXTURE, Adapters(targets=("experts",)), 1, 2)
    assert experts == 128 * (2 * 2048 + 2 * 768 + 768 + 2048) * 16 * 2
    assert layer_bytes(MIXTURE, Adapters(), 1, 2) > experts


def test_adapters_take_memory_of_the_gpus_and_the_head_that_of_the_last_stage() -> None:
    config = ServingConfig(24 << 30, Limits(4096, 8, 2048), parallelism=Parallelism(pipeline=2))
    models = MemoryModel(LLAMA, config), MemoryModel(LLAMA, replace(config, adapters=Adapters(8, 64)))
    taken = [after.weights_bytes - before.weights_bytes
             for before, after in zip(*(model.gpus for model in models), strict=True)]
    layers = 16 * layer_bytes(LLAMA, Adapters(8, 64), 1, 2)
    assert taken == [layers, layers + head_bytes(LLAMA, Adapters(8, 64), 2)]
