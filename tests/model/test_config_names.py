"""config.json under one set of names: other names, sections, lists, null, and the defaults of the model's class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fakes.checkpoint_files import checkpoint
from shoehorn.model.cache_reader import read_caches
from shoehorn.model.checkpoint import read
from shoehorn.model.config_names import read_text

SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
CASES = Path(__file__).parents[1] / "captures" / "oracle"


def sizes(config: dict[str, Any]) -> list[int | None]:
    text = read_text(config)
    return [text.get(key) for key in SIZES]


@pytest.mark.parametrize(("config", "expected"), [
    ({"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 100}, [2, 64, 4, None, 100]),
    ({"num_layers": 3, "d_model": 32, "num_heads": 2, "multi_query_group_num": 1, "padded_vocab_size": 9},
     [3, 32, 2, 1, 9]),
    ({"model_type": "gpt2", "n_embd": 64}, [12, 64, 12, None, 50257]),
    ({"model_type": "gemma3", "text_config": {"hidden_size": 2560, "num_hidden_layers": 34}},
     [34, 2560, 8, 4, 262208]),
    ({"model_type": "x", "llm_config": {"num_layers": 5, "hidden_size": 8, "num_attention_heads": 2}},
     [5, 8, 2, None, None]),
    ({"thinker_config": {"text_config": {"num_hidden_layers": 7, "hidden_size": 8, "num_attention_heads": 4}}},
     [7, 8, 4, None, None]),
    ({"language_config": {"num_hidden_layers": 6, "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2},
      "vision_config": {"num_hidden_layers": 99}}, [6, 8, 4, 2, None]),
    ({"model_type": "llama", "num_hidden_layers": None, "num_key_value_heads": None}, [32, 4096, 32, None, 32000]),
    ({"model_type": "falcon", "num_attention_heads": 71, "num_kv_heads": 71}, [32, 4544, 71, 1, 65024]),
    ({"model_type": "falcon", "num_kv_heads": 8, "new_decoder_architecture": True, "num_attention_heads": 128},
     [32, 4544, 128, 8, 65024]),
    ({"model_type": "dbrx", "d_model": 6144, "n_layers": 40, "n_heads": 48, "attn_config": {"kv_n_heads": 8}},
     [40, 6144, 48, 8, 32000]),
])
def test_sizes_are_read_under_every_name(config: dict[str, Any], expected: list[int | None]) -> None:
    assert sizes(config) == expected


@pytest.mark.parametrize(("config", "layers", "windows", "states"), [
    ({"model_type": "olmo3", "num_hidden_layers": 12}, 12, 9, 0),
    ({"model_type": "gemma3n_text", "num_hidden_layers": 30, "num_kv_shared_layers": 0}, 30, 24, 0),
    ({"model_type": "cwm"}, 64, 48, 0),
    ({"model_type": "olmo3", "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}, 4, 0, 0),
    ({"model_type": "olmo3", "num_hidden_layers": 6, "sliding_window_pattern": 2}, 6, 3, 0),
    ({"model_type": "jamba", "num_hidden_layers": 16}, 16, 0, 14),
    ({"model_type": "qwen3_next"}, 48, 0, 36),
    ({"model_type": "llava_next"}, 32, 0, 0),
    ({"model_type": "got_ocr2", "text_config": {"num_hidden_layers": 24}}, 24, 0, 0),
])
def test_layers_and_states_are_those_that_the_configuration_class_computes(
        config: dict[str, Any], layers: int, windows: int, states: int) -> None:
    notes: list[str] = []
    text = read_text(config)
    caches = read_caches(text, text["num_hidden_layers"], 4, 128, notes)
    assert text["num_hidden_layers"] == layers
    assert sum(len(each.numbers) for each in caches.kv if each.window) == windows
    assert sum(len(each.numbers) for each in caches.states) == states
    assert not notes


def test_list_of_sizes_counts_with_its_largest() -> None:
    text = read_text({"intermediate_size": [512, 1024, 768], "moe_topk": [8, 8]})
    assert (text["intermediate_size"], text["num_experts_per_tok"]) == (1024, 8)


def test_section_without_sizes_leaves_the_text_model_at_the_top() -> None:
    assert sizes({"num_hidden_layers": 2, "hidden_size": 8, "text_config": {"model_type": "x"}})[:2] == [2, 8]


def test_model_without_layer_keys_is_planned_from_its_tensors() -> None:
    shape = read(checkpoint({"architectures": ["Unheard"], "num_attention_heads": 4}, {
        "trunk.words.embed_tokens.weight": ("BF16", [100, 64]),
        **{f"trunk.cells.{number}.attn.k_proj.weight": ("BF16", [32, 64]) for number in range(3)}}))
    assert (shape.layers, shape.hidden, shape.vocab) == (3, 64, 100)
    assert shape.tensor_bytes.linears.bytes == 3 * 32 * 64 * 2
    assert any("by the tensors" in note for note in shape.notes)


def test_contradiction_of_config_and_key_projection_is_noted_and_the_projection_counts() -> None:
    shape = read(checkpoint({"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16,
                             "num_key_value_heads": 4, "vocab_size": 100},
                            {"model.layers.0.self_attn.k_proj.weight": ("BF16", [32, 64])}))
    assert shape.kv_heads == 2
    assert any("config.json gives 4 KV heads" in note for note in shape.notes)


def test_recording_has_the_classes_of_every_oracle_model_that_transformers_knows() -> None:
    recorded = json.loads((Path(read_text.__code__.co_filename).with_name("model_defaults.json")).read_text())
    types = {json.loads(path.read_text())["config"]["model_type"] for path in CASES.glob("*.json")}
    assert len(types - recorded.keys()) < 10, sorted(types - recorded.keys())
