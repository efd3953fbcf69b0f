"""Captures of public models and machines, and sparse checkpoints written from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from fakes import captured
from shoehorn.common.paths import HOME
from shoehorn.hardware.types import Hardware
from shoehorn.model import checkpoint
from shoehorn.model.files import LocalFiles

sys.path.append(str(HOME / "tests" / "gpu"))

import sparse_checkpoint  # its folder is not a package: the path is set just above

GIB = 1 << 30


@pytest.mark.parametrize("name", captured.names())
def test_tensors_have_the_size_that_the_publisher_states(name: str) -> None:
    document, tensors = captured.document(name), captured.tensors(name)
    total = sum(tensor.bytes for tensor in tensors)
    assert document["total_size"] in (None, total)
    if "files_size" in document:
        headers = document["files_size"] - total
        assert 50 * len(tensors) < headers < 200 * len(tensors)
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    assert document["source"]


def test_missing_tensor_changes_the_total_size() -> None:
    document = captured.document("llama-3.1-8b-instruct")
    total = sum(tensor.bytes for tensor in captured.tensors("llama-3.1-8b-instruct")[1:])
    assert total != document["total_size"]


@pytest.mark.parametrize("name", captured.names())
def test_planning_reads_a_captured_checkpoint_without_its_weights(name: str) -> None:
    files = captured.files(name)
    shape = checkpoint.read(files)
    assert shape.weights_bytes == sum(tensor.bytes for tensor in captured.tensors(name))
    assert sum(size for _, size in files.reads) < 50_000_000
    assert shape.layers == (captured.config(name).get("text_config") or captured.config(name))["num_hidden_layers"]


def test_reading_weights_of_a_capture_fails() -> None:
    files = captured.files("qwen3-8b")
    with pytest.raises(AssertionError, match="weights of"):
        files.read("model-00001-of-00004.safetensors")


@pytest.mark.parametrize(("name", "layers"), [
    ("llama-3.1-8b-instruct", None), ("llama-3.1-8b-bnb-4bit", 2), ("llama-3.1-8b-instruct-gptq", 2),
    ("llama-3.1-8b-instruct-w4a16", 2), ("llama-3.1-8b-instruct-fp8", 2), ("gemma-3-12b-it", 6),
    ("qwen2.5-32b-instruct-awq", 1)])
def test_sparse_checkpoint_is_valid_and_small_on_disk(tmp_path: Path, name: str, layers: int | None) -> None:
    config, tensors = captured.config(name), captured.tensors(name)
    if layers:
        config, tensors = sparse_checkpoint.first_layers(config, tensors, layers)
    sparse_checkpoint.write(tmp_path, config, tensors)
    shape = checkpoint.read(LocalFiles(tmp_path))
    assert shape.weights_bytes == sum(tensor.bytes for tensor in tensors)
    assert layers is None or shape.layers == layers
    assert not any("layers" in note for note in shape.notes)
    used = sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir())
    assert used < 100_000_000 < sum(path.stat().st_size for path in tmp_path.iterdir())
    shapes = {}
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "np") as opened:
            shapes |= {tensor: tuple(opened.get_slice(tensor).get_shape()) for tensor in opened.offset_keys()}
    assert shapes == {tensor.name: tensor.shape for tensor in tensors}
    vocabulary = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size()
    assert vocabulary == next(tensor.shape[0] for tensor in tensors if tensor.name.endswith("embed_tokens.weight"))


def test_data_that_must_not_be_zero_is_written(tmp_path: Path) -> None:
    def data_of(name: str, tensor: str) -> bytes:
        directory = tmp_path / name
        if not directory.exists():
            sparse_checkpoint.write(directory, *sparse_checkpoint.first_layers(
                captured.config(name), captured.tensors(name), 1))
        with (directory / "model.safetensors").open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            begin, end = json.loads(file.read(length))[tensor]["data_offsets"]
            file.seek(8 + length + begin)
            return file.read(end - begin)

    gptq, packed, state = "llama-3.1-8b-instruct-gptq", "llama-3.1-8b-instruct-w4a16", "llama-3.1-8b-bnb-4bit"
    layer = "model.layers.0."
    assert np.all(np.frombuffer(data_of(gptq, layer + "input_layernorm.weight"), np.float16) == 1)
    groups = np.frombuffer(data_of(gptq, layer + "mlp.down_proj.g_idx"), np.int32)
    assert (groups[127], groups[128], groups[-1]) == (0, 1, 14336 // 128 - 1)
    assert np.frombuffer(data_of(packed, layer + "mlp.down_proj.weight_shape"), np.int64).tolist() == [4096, 14336]
    written = json.loads(data_of(state, layer + "mlp.down_proj.weight.quant_state.bitsandbytes__nf4"))
    assert written["shape"] == [4096, 14336]
    scales = data_of("llama-3.1-8b-instruct-fp8", layer + "mlp.down_proj.input_scale")
    assert np.frombuffer(scales, np.uint16).tolist() == [0x3F80]  # 1.0 in bfloat16
    router = np.frombuffer(data_of("qwen3-30b-a3b", layer + "mlp.gate.weight"), np.uint16)
    assert len(set(router.tolist())) > 100
    assert not any(data_of(gptq, layer + "mlp.down_proj.qweight"))


def test_config_of_a_shortened_model_is_consistent() -> None:
    config, _ = sparse_checkpoint.first_layers(captured.config("gpt-oss-20b"), captured.tensors("gpt-oss-20b"), 3)
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    config, tensors = sparse_checkpoint.first_layers(captured.config("deepseek-v3"), captured.tensors("deepseek-v3"), 4)
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (4, 0)
    assert not any(".layers.61." in tensor.name for tensor in tensors)


def test_command_writes_a_capture(tmp_path: Path) -> None:
    subprocess.run([sys.executable, HOME / "tests" / "gpu" / "sparse_checkpoint.py", "mistral-7b-instruct-v0.3",
                    tmp_path / "out", "--layers", "2"], check=True, timeout=60, env=dict(os.environ))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**captured.config("mistral-7b-instruct-v0.3"), "num_hidden_layers": 2}
    assert "chat_template" in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("name", captured.machines())
def test_captured_machine_is_plausible(name: str) -> None:
    machine = captured.machine(name)
    written, document = json.loads(json.dumps(machine.to_json())), json.loads(
        (captured.MACHINES / f"{name}.json").read_text())
    assert Hardware.from_json(written) == machine
    assert _only(written, document) == document, "captures of earlier versions have fewer fields"
    assert machine.gpus
    assert machine.host_available_bytes < machine.host_memory_bytes
    assert int(machine.driver_version.split(".")[0]) >= 580
    for index, gpu in enumerate(machine.gpus):
        assert (gpu.index, gpu.mig) == (index, False)
        assert 0 < gpu.free_bytes <= gpu.total_bytes
        assert gpu.compute_capability >= (7, 5)
    assert len({gpu.uuid for gpu in machine.gpus}) == len(machine.gpus)


def _only(written: Any, document: Any) -> Any:
    """Leave out the fields that a document lacks."""
    if isinstance(document, dict):
        return {key: _only(written[key], value) for key, value in document.items()}
    if isinstance(document, list):
        return [_only(one, other) for one, other in zip(written, document, strict=True)]
    return written


def test_machines_cover_eleven_gpus_with_much_and_little_host_memory() -> None:
    names = {captured.machine(name).gpus[0].name for name in captured.machines()}
    assert len(names) == 11
    assert {len(captured.machine(name).gpus) for name in captured.machines()} == {1, 2, 4}
    memory_sizes: dict[tuple[str, int], set[int]] = {}
    for name in captured.machines():
        machine = captured.machine(name)
        memory_sizes.setdefault((machine.gpus[0].name, machine.gpus[0].total_bytes * len(machine.gpus)), set()).add(
            machine.host_memory_bytes // GIB)
    assert sum(len(sizes) > 1 for sizes in memory_sizes.values()) >= 5
