"""Reader of checkpoints: exact bytes from configs and safetensors headers; damaged files are rejected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from fakes import captured as captured_models
from fakes.checkpoint_files import CheckpointFiles, checkpoint, dense, header
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.model.checkpoint import read
from shoehorn.model.files import LocalFiles
from shoehorn.model.shape import Experts, TensorGroup

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
          "vocab_size": 100, "intermediate_size": 128, "max_position_embeddings": 512}
NF4 = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


def test_70b_has_its_exact_bytes_from_short_reads() -> None:
    files = captured_models.files("deepseek-r1-distill-llama-70b")
    shape = read(files)
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim) == (80, 8192, 64, 8, 128)
    assert shape.tensor_bytes.linears == TensorGroup(136_902_082_560, 68_451_041_280)
    assert shape.tensor_bytes.embedding == shape.tensor_bytes.lm_head == TensorGroup(2_101_346_304, 1_050_673_152)
    assert shape.weights_bytes == 141_107_412_992
    assert shape.disk_bytes == sum(files.names().values())
    assert (shape.max_position, shape.dtype, shape.quantization, shape.notes) == (131072, "bfloat16", None, ())
    assert sum(length for _, length in files.reads) < 50_000_000


@pytest.mark.parametrize("name", captured_models.names())
def test_every_captured_model_is_supported_with_less_than_50_mb_read(name: str) -> None:
    files = captured_models.files(name)
    shape = read(files)
    assert shape.compared
    assert shape.plain
    assert not shape.notes
    assert sum(kind.layers for kind in shape.kv_layers) == shape.layers
    groups = [getattr(shape.tensor_bytes, group) for group in shape.tensor_bytes.__dataclass_fields__]
    assert sum(group.bytes for group in groups) == shape.weights_bytes
    assert sum(length for _, length in files.reads) < 50_000_000


def test_every_tensor_is_in_one_group() -> None:
    shape = read(dense(256, 768, 4, 4, 2, 2048, max_position=2048, tied=True))
    groups = shape.tensor_bytes
    assert sum(group.bytes for group in (groups.embedding, groups.lm_head, groups.linears, groups.other)
               ) == shape.weights_bytes
    assert groups.other.parameters == 9 * 256
    assert shape.tied_embeddings


def test_stored_head_of_a_tied_model_is_not_counted_twice() -> None:
    files = dense(64, 128, 1, 4, 4, 100, tie_word_embeddings=True)
    assert read(files).tied_embeddings


def test_files_of_a_folder_are_read(tmp_path: Path) -> None:
    import numpy

    tensors = {"model.layers.0.self_attn.q_proj.weight": numpy.zeros((64, 64), dtype=numpy.float16),
               "model.embed_tokens.weight": numpy.zeros((100, 64), dtype=numpy.float16)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "notes.bin").write_bytes(b"x" * 1000)
    shape = read(LocalFiles(tmp_path))
    assert shape.tensor_bytes.linears == TensorGroup(8192, 4096)
    assert shape.dtype == "float16"  # not in config.json
    assert shape.disk_bytes == sum((tmp_path / name).stat().st_size for name in ("model.safetensors", "config.json"))


def test_state_of_bitsandbytes_is_counted_apart_from_weights() -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    shape = read(checkpoint({**CONFIG, **NF4}, {
        name: ("U8", [4096, 1]), f"{name}.absmax": ("U8", [128]), f"{name}.quant_map": ("F32", [16]),
        f"{name}.nested_absmax": ("F32", [1]), f"{name}.quant_state.bitsandbytes__nf4": ("U8", [90])}))
    assert shape.quantization == "bitsandbytes"
    assert shape.tensor_bytes.linears == TensorGroup(4096, 4096)
    assert shape.tensor_bytes.quant_state == TensorGroup(128 + 64 + 4 + 90, 128)


def test_packed_formats_keep_their_exact_bytes() -> None:
    name = "model.layers.0.mlp.gate_proj."
    shape = read(checkpoint({**CONFIG, "quantization_config": {"quant_method": "awq"}}, {
        f"{name}qweight": ("I32", [64, 16]), f"{name}scales": ("F16", [1, 128]), f"{name}qzeros": ("I32", [1, 16]),
        "model.layers.0.input_layernorm.weight": ("F16", [64])}))
    assert shape.quantization == "awq"
    assert shape.tensor_bytes.linears.bytes == 4096 + 256 + 64
    assert shape.tensor_bytes.other.bytes == 128


@pytest.mark.parametrize(("change", "note"), [
    ({"architectures": ["OddForCausalLM"]}, "OddForCausalLM: its memory was not compared"),
    ({"layer_types": ["odd_attention"]}, "odd_attention"),
    ({"layer_types": ["linear_attention"]}, "the states of this model's layers are unknown"),
    ({"sliding_window": 4096, "model_type": "odd"}, "does not say in which layers"),
    ({"text_config": CONFIG, "architectures": ["LlamaForCausalLM"]}, "multimodal"),
    ({"num_hidden_layers": 2}, "2 layers, the weights contain 1"),
    ({"intermediate_size": None}, "intermediate_size missing"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "8-bit"),
])
def test_unsupported_property_is_noted(change: dict[str, object], note: str) -> None:
    shape = read(checkpoint({**CONFIG, **change}, {"model.layers.0.mlp.up_proj.weight": ("BF16", [128, 64])}))
    assert any(note in each for each in shape.notes), shape.notes


ONE = {"model.layers.0.mlp.up_proj.weight": ("BF16", [128, 64])}


@pytest.mark.parametrize(("change", "expected"), [
    ({"sliding_window": 4096, "model_type": "mistral"}, [(1, 0, 4096)]),
    ({"sliding_window": 4096, "model_type": "odd"}, [(1, 0, 0)]),
    ({"sliding_window": 4096, "use_sliding_window": False}, [(1, 0, 0)]),
    ({"sliding_window": None}, [(1, 0, 0)]),
    ({"sliding_window": 128, "layer_types": ["full_attention"]}, [(1, 0, 0)]),
    ({"sliding_window": 128, "num_hidden_layers": 12, "model_type": "gemma3_text"}, [(2, 0, 0), (10, 0, 128)]),
    ({"sliding_window": 128, "num_hidden_layers": 4, "model_type": "gemma2"}, [(2, 0, 0), (2, 0, 128)]),
    ({"sliding_window": 128, "num_hidden_layers": 4,
      "layer_types": ["sliding_attention", "full_attention"] * 2}, [(2, 0, 0), (2, 0, 128)]),
    ({"kv_lora_rank": 512, "qk_rope_head_dim": 64, "model_type": "deepseek_v2"}, [(1, 576, 0)]),
])
def test_kv_cache_of_each_layer_kind(change: dict[str, object], expected: list[tuple[int, int, int]]) -> None:
    kinds = read(checkpoint({**CONFIG, **change}, ONE)).kv_layers
    assert [(kind.layers, kind.width * kind.latent, kind.window) for kind in kinds] == expected


def test_experts_are_counted_apart_and_vision_as_divided() -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    shape = read(checkpoint({**CONFIG, **experts, "vision_config": {"model_type": "siglip_vision_model"}}, {
        "model.layers.0.mlp.experts.3.up_proj.weight": ("BF16", [128, 64]),
        "vision_tower.encoder.layers.0.fc1.weight": ("BF16", [64, 64]),
        "model.layers.0.self_attn.q_proj.bias": ("BF16", [64])}))
    assert shape.experts == Experts(4, 2, 128)
    assert shape.tensor_bytes.experts.parameters == 128 * 64
    assert shape.tensor_bytes.linears.bytes == 0
    assert shape.tensor_bytes.divided.parameters == 64 * 64
    assert shape.tensor_bytes.other.parameters == 64


def test_layers_beyond_the_configured_number_are_unused() -> None:
    shape = read(checkpoint(CONFIG, {**ONE, "model.layers.1.mlp.up_proj.weight": ("BF16", [128, 64])}))
    assert shape.tensor_bytes.unused.bytes == shape.tensor_bytes.linears.bytes == 128 * 64 * 2


def test_missing_head_size_is_that_of_the_projection() -> None:
    projection = {"model.layers.0.self_attn.k_proj.weight": ("BF16", [128, 64])}
    shape = read(checkpoint({**CONFIG, "head_dim": None}, projection))
    assert shape.kv_layers[0].width == 2 * 128 // shape.kv_heads


@pytest.mark.parametrize(("rope", "longest"), [
    ({"rope_type": "linear", "factor": 4.0}, 2048), ({"type": "su", "factor": 4.0}, 512),
    ({"type": "dynamic", "factor": 2}, 1024),
    ({"rope_type": "llama3", "factor": 8.0}, 512), ({"rope_type": "yarn", "factor": 4.0}, 512),
    ({"rope_type": "default"}, 512), ({"rope_type": "linear", "factor": None}, 512), ("odd", 512),
])
def test_maximum_context_equals_that_of_the_engine(rope: object, longest: int) -> None:
    assert read(checkpoint({**CONFIG, "rope_scaling": rope}, {})).max_position == longest


def broken(text: bytes, size: int = 100) -> CheckpointFiles:
    """Return a checkpoint whose only safetensors file begins with `text`."""
    return CheckpointFiles({"config.json": json.dumps(CONFIG).encode(), "model.safetensors": text},
                           {"model.safetensors": size})


@pytest.mark.parametrize("text", [
    b"", b"abc", (10**9).to_bytes(8, "little") + b"{}", (1).to_bytes(8, "little") + b"{}",
    (5).to_bytes(8, "little") + b"{not}", (2).to_bytes(8, "little") + b"[]",
    *(len(body).to_bytes(8, "little") + body for body in (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}',
        b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":"x","data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[9,4]}}',
        b'{"a":{"shape":[1],"data_offsets":[0,4]}}', b'{"a":7}', b'\xff\xfe')),
])
def test_invalid_header_is_an_error_that_names_the_file(text: bytes) -> None:
    with pytest.raises(ModelUnavailableError, match=r"model\.safetensors") as caught:
        read(broken(text))
    assert (caught.value.code, caught.value.exit_code) == ("invalid_model_file", 4)
    assert caught.value.remedy


def test_header_of_excessive_length_is_rejected() -> None:
    with pytest.raises(ModelUnavailableError, match="200000000"):
        read(broken((200_000_000).to_bytes(8, "little") + b"{", size=1 << 40))


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_size_that_neither_config_nor_tensors_show_is_named(key: str) -> None:
    config = {name: value for name, value in CONFIG.items() if name != key}
    with pytest.raises(ModelUnavailableError, match=rf"not understood.*{key}") as refusal:
        read(checkpoint(config, {}))
    assert refusal.value.code == "architecture_not_understood"


def test_header_with_more_data_than_the_file_is_rejected() -> None:
    head, _ = header({f"t{number}": ("F32", [10]) for number in range(10)})
    entries = json.loads(head[8:])
    for entry in entries.values():
        entry["data_offsets"] = [0, 40] if "shape" in entry else None
    entries.pop("__metadata__")
    text = json.dumps(entries).encode()
    with pytest.raises(ModelUnavailableError, match="more data"):
        read(broken(len(text).to_bytes(8, "little") + text))


def test_header_longer_than_the_first_read_is_read_completely() -> None:
    tensors = {f"model.layers.0.{'x' * 200}{number}.weight": ("BF16", [1, 1]) for number in range(1000)}
    files = checkpoint(CONFIG, tensors)
    assert read(files).tensor_bytes.linears.parameters == 1000
    assert len([name for name, _ in files.reads if name == "model.safetensors"]) == 2


@pytest.mark.parametrize(("files", "words"), [
    ({}, "config.json"),
    ({"config.json": b"[]"}, "config.json"),
    ({"config.json": b"{"}, "config.json"),
    ({"config.json": b"[" * 100_000}, "config.json"),
    ({"config.json": b'{"hidden_size": "big", "num_hidden_layers": 1, "num_attention_heads": 1}',
      "model.safetensors": header({})[0]}, "hidden_size"),
    ({"config.json": json.dumps(CONFIG).encode(), "pytorch_model.bin": b"x"}, "safetensors"),
    ({"config.json": json.dumps(CONFIG).encode(),
      "model.safetensors.index.json": b'{"weight_map": {"a": "b.safetensors"}}'}, r"b\.safetensors"),
    ({"config.json": json.dumps(CONFIG).encode(), "model.safetensors.index.json": b'{"weight_map": []}'}, "weight_map"),
])
def test_missing_or_invalid_file_is_named(files: dict[str, bytes], words: str) -> None:
    with pytest.raises(ModelUnavailableError, match=words):
        read(CheckpointFiles(files))


def test_excessively_large_config_is_not_read() -> None:
    files = CheckpointFiles({"config.json": b"{}"}, {"config.json": 1 << 40})
    with pytest.raises(ModelUnavailableError, match="too large"):
        read(files)
    assert files.reads == []


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailableError, match="absent") as caught:
        read(LocalFiles(tmp_path / "absent"))
    assert caught.value.code == "unreadable_model_folder"
