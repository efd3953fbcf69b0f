"""Conversion to INT4: result, and unsupported models."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fakes import captured
from shoehorn.common.errors import ModelUnavailableError, SettingsError
from shoehorn.config import settings
from shoehorn.deployment import served_model
from shoehorn.deployment.served_model import ShapeReader
from shoehorn.int4 import artifact, convert, layout, quantizer, shard_writer
from shoehorn.int4 import journal as journal_module
from shoehorn.int4.convert import ConversionOptions
from shoehorn.int4.layout import MAX_BIT_WIDTHS, UNQUANTIZED, BitWidths, PlannedFiles
from shoehorn.model import checkpoint
from shoehorn.model.reference import ModelRef
from shoehorn.planner.plan import Plan
from shoehorn.store import pull
from support.converting import HIDDEN, VOCAB, all_tensors, convert_here, local, write_model
from support.plans import HUGE, machine, planned

INT4 = BitWidths(4, 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source") / "little")


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_linear_layers_embedding_and_head_are_quantized_and_the_rest_is_copied(tmp_path: Path, model: Path,
                                                                               bits: int) -> None:
    folder = convert_here(local(tmp_path, model), ConversionOptions(bits))
    before, after = all_tensors(model), all_tensors(folder)
    errors = json.loads((folder / "conversion.json").read_text())["shards"]
    errors = {name: error for shard in errors.values() for name, error in shard["errors"].items()}
    for name, tensor in before.items():
        outer = name in ("model.embed_tokens.weight", "lm_head.weight")
        if tensor.dim() != 2 or (outer and bits == 16):
            assert torch.equal(after.pop(name), tensor)
            continue
        packed, scale, shape = (after.pop(f"{name}_{part}") for part in ("packed", "scale", "shape"))
        restored = quantizer.dequantize(packed, scale, bits if outer else 4)
        assert shape.tolist() == list(tensor.shape)
        error = float((restored - tensor.float()).norm() / tensor.float().norm())
        assert error == pytest.approx(errors[name], rel=1e-2)
        assert error < (0.01 if outer and bits == 8 else 0.11)
    assert not after
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: index[name] for path in folder.glob("*.safetensors") for name in load_file(path)} == index
    assert (folder / "tokenizer.json").exists()
    shape = checkpoint.read(pull.LocalFiles(folder))
    assert (shape.quantization, shape.packed_embedding) == ("compressed-tensors", bits != 16)


def test_experts_are_quantized_but_not_router_and_tied_embedding(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(5)
    experts = {f"model.layers.0.mlp.experts.{number}.{name}_proj.weight":
               (torch.randn(*size, generator=random) * 0.01 * (number + 1)).half()
               for number in range(4) for name, size in {"gate": (384, 256), "up": (384, 256),
                                                         "down": (256, 384)}.items()}
    copied = {"model.layers.0.mlp.gate.weight": torch.randn(4, 256, generator=random).half(),
            "model.embed_tokens.weight": torch.randn(VOCAB, 256, generator=random).half()}
    model = tmp_path / "moe"
    model.mkdir()
    save_file(experts | copied, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps({
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 256, "moe_intermediate_size": 384,
        "num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "tie_word_embeddings": True, "torch_dtype": "float16"}))
    folder = convert_here(local(tmp_path, model), ConversionOptions(group=128))
    after = all_tensors(folder)
    for name, tensor in copied.items():
        assert torch.equal(after.pop(name), tensor)
    for name, tensor in experts.items():
        packed, scale = after[f"{name}_packed"], after[f"{name}_scale"]
        assert scale.dtype is torch.float16
        restored = quantizer.dequantize(packed, scale, 4)
        assert float((restored - tensor.float()).norm() / tensor.float().norm()) < 0.11
    assert len(after) == 3 * len(experts)
    quantized = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert quantized["ignore"] == ["model.layers.0.mlp.gate"]
    assert [group["targets"] for group in quantized["config_groups"].values()] == [["Linear"]]


@pytest.mark.parametrize("fits", [True, False])
def test_gpu_path_has_the_same_result(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch,
                                      fits: bool) -> None:  # a parameter
    """Tensor operations of the GPU path, in several threads; tensors stay in host memory."""
    (tmp_path / "cpu").mkdir()
    expected = convert_here(local(tmp_path / "cpu", model), ConversionOptions(8))
    devices, compiled = [], quantizer._on_cpu

    def moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
        devices.append(device)
        if not fits:
            raise torch.OutOfMemoryError
        monkeypatch.setattr(quantizer, "_on_cpu", quantizer._by_tensors)
        return tensor

    really_to = torch.Tensor.to
    monkeypatch.setattr(quantizer, "device", lambda: "cuda")
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, to, *more, **named: moved(tensor, to) if to == "cuda"
                        else really_to(tensor, to, *more, **named))
    with shard_writer.workers(2) as pool:
        assert isinstance(pool, ThreadPoolExecutor)
    folder = convert.convert(settings.load(local(tmp_path, model)), ConversionOptions(8), 2, lambda _: None)
    assert devices
    assert (quantizer._on_cpu is compiled) is not fits
    journals = [journal_module.read_journal(each) for each in (folder, expected)]
    for name, entry in journals[0].shards.items():
        assert entry["errors"] == pytest.approx(journals[1].shards[name]["errors"], rel=1e-3)


def test_planned_shape_equals_the_shape_of_the_result(tmp_path: Path, model: Path) -> None:
    converting = settings.load(local(tmp_path, model))
    ref = served_model.served_reference(converting)
    shapes = ShapeReader(converting)
    before = shapes.read(ref, None)
    after = shapes.read(ref, convert_here(local(tmp_path, model), ConversionOptions(8)))
    assert before.tensor_bytes == after.tensor_bytes
    assert before.kv_layers == after.kv_layers


@pytest.mark.parametrize(("name", "bits", "gigabytes"), [
    ("deepseek-r1-distill-llama-70b", INT4, 36.4), ("deepseek-r1-distill-llama-70b", UNQUANTIZED, 39.5),
    ("mixtral-8x7b-instruct-v0.1", MAX_BIT_WIDTHS, 24.5), ("qwen3-30b-a3b", MAX_BIT_WIDTHS, 16.4),
    ("deepseek-v2-lite-chat", MAX_BIT_WIDTHS, 8.4),
    ("gemma-3-12b-it", MAX_BIT_WIDTHS, 8.4)])
def test_real_models_keep_their_shape_and_shrink(name: str, bits: BitWidths, gigabytes: float) -> None:
    files = captured.files(name)
    plan = layout.layout(files, bits)
    converted, original = checkpoint.read(PlannedFiles(files, plan)), checkpoint.read(files)
    assert converted.weights_bytes / 1e9 == pytest.approx(gigabytes, rel=0.02)
    assert converted.notes == original.notes
    experts = converted.experts and replace(converted.experts, cacheable=False)  # INT4 can be cached on the GPU
    assert experts == original.experts
    for shard in plan.shards:
        ends = sorted((begin, item.source.name) for item in shard.tensors for begin in item.offsets.values())
        assert ends[0][0] == len(shard.header)
    ignored = plan.config["quantization_config"]["ignore"]
    assert not any(name.endswith(("_proj", "experts")) and ".layers." in name and "vision" not in name
                   for name in ignored), ignored[:5]


def test_routers_are_not_quantized() -> None:
    ignored = layout.layout(captured.files("qwen3-30b-a3b"), UNQUANTIZED).config["quantization_config"]["ignore"]
    assert "model.layers.0.mlp.gate" in ignored
    assert "model.layers.47.mlp.gate" in ignored


def test_matrices_not_divisible_by_128_get_smaller_groups(tmp_path: Path) -> None:
    folder = convert_here(local(tmp_path, write_model(tmp_path / "odd", 1, 192)))
    assert json.loads((folder / "conversion.json").read_text())["group"] == 64


@pytest.mark.parametrize(("inner", "group"), [(512, 128), (640, 64), (384, 64), (192, 64), (96, 32)])
def test_halves_for_two_gpus_contain_complete_groups_if_64_permits(tmp_path: Path, inner: int, group: int) -> None:
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.ones(inner, 256),
               "model.layers.0.mlp.down_proj.weight": torch.ones(256, inner)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert layout.layout(pull.LocalFiles(tmp_path), UNQUANTIZED).group == group


def test_tied_embedding_is_not_quantized() -> None:
    plan = layout.layout(captured.files("gemma-3-12b-it"), MAX_BIT_WIDTHS)
    assert plan.bits == UNQUANTIZED


@pytest.mark.parametrize(("change", "name", "code"), [
    ({"quantization_config": {"quant_method": "awq"}}, "awq", "int4_already_quantized"),
    ({"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM", "int4_unsupported_architecture")])
def test_unsupported_model_is_rejected(tmp_path: Path, change: dict[str, object], name: str, code: str) -> None:
    model = write_model(tmp_path / "strange", 1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(SettingsError, match=name) as caught:
        convert_here(local(tmp_path, model))
    assert caught.value.code == code
    assert not list((tmp_path / "models").rglob("*.safetensors"))


def test_weight_that_is_not_finite_is_rejected(tmp_path: Path) -> None:
    model = write_model(tmp_path / "broken", 1)
    shard = model / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, shard)
    with pytest.raises(ModelUnavailableError, match=r"mlp\.up_proj\.weight") as caught:
        convert_here(local(tmp_path, model))
    assert caught.value.code == "invalid_weights"
    assert artifact.locate(tmp_path / "models", ModelRef(str(model), "local", "master")) is None


def test_embedding_and_head_get_8_bits_if_4_lose_too_much(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tails", 1)
    shard = model / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    noise = torch.rand(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1)).clamp_min(0.01)
    tensors["lm_head.weight"] = (tensors["lm_head.weight"].float() / noise).to(torch.bfloat16)
    save_file(tensors, shard)
    journal = journal_module.read_journal(convert_here(local(tmp_path, model)))
    assert journal
    assert journal.bits == BitWidths(4, 8)


def test_embedding_and_head_are_unquantized_for_the_cpu(tmp_path: Path, model: Path) -> None:
    journal = journal_module.read_journal(convert_here(local(tmp_path, model, VRAM_PROFILE="cpu")))
    assert journal
    assert journal.bits == UNQUANTIZED


def test_quantized_embedding_is_rejected_on_the_cpu_without_the_kernel(tmp_path: Path, model: Path) -> None:
    convert_here(local(tmp_path, model), ConversionOptions(4))
    converting = settings.load(local(tmp_path, model, VRAM_PROFILE="cpu"))
    ref = served_model.served_reference(converting)
    shape = ShapeReader(converting).read(ref, served_model.served_folder(converting.models_dir, ref), on_cpu=True)
    assert isinstance(planned(machine(), shape, VRAM_PROFILE="cpu", QUANTIZATION="int4"), Plan)
    with pytest.raises(SettingsError, match="embedding is quantized") as error:
        planned(machine(), shape, VRAM_PROFILE="cpu", QUANTIZATION="int4", CPU_COMPUTE="off")
    assert "CPU_COMPUTE" in error.value.remedy


def test_plan_detects_the_converted_model() -> None:
    files = captured.files("deepseek-r1-distill-llama-70b")
    shape = checkpoint.read(PlannedFiles(files, layout.layout(files, MAX_BIT_WIDTHS)))
    plan = planned(machine(HUGE), shape, QUANTIZATION="int4")
    assert isinstance(plan, Plan)
    assert "quantization" not in plan.engine_args
    with pytest.raises(SettingsError, match="contradict"):
        planned(machine(HUGE), shape, QUANTIZATION="int4", VLLM_EXTRA_ARGS="--quantization bitsandbytes")
