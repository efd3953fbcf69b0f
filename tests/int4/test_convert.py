"""Conversion to INT4: what comes out, and what is refused."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
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
from shoehorn.int4.convert import Wish
from shoehorn.int4.layout import BOUND, KEPT, Bits, Outline
from shoehorn.model import checkpoint
from shoehorn.model.reference import ModelRef
from shoehorn.planner.plan import Plan
from shoehorn.store import pull
from support.converting import HIDDEN, VOCAB, all_tensors, in_here, local, write_model
from support.plans import HUGE, machine, planned

INT4 = Bits(4, 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source") / "little")


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_linears_embedding_and_head_are_quantized_and_the_rest_is_as_it_was(tmp_path: Path, model: Path,
                                                                           bits: int) -> None:
    folder = in_here(local(tmp_path, model), Wish(bits))
    before, after = all_tensors(model), all_tensors(folder)
    errors = json.loads((folder / "conversion.json").read_text())["shards"]
    errors = {name: error for shard in errors.values() for name, error in shard["errors"].items()}
    for name, tensor in before.items():
        outer = name in ("model.embed_tokens.weight", "lm_head.weight")
        if tensor.dim() != 2 or (outer and bits == 16):
            assert torch.equal(after.pop(name), tensor)
            continue
        packed, scale, shape = (after.pop(f"{name}_{part}") for part in ("packed", "scale", "shape"))
        again = quantizer.dequantize(packed, scale, bits if outer else 4)
        assert shape.tolist() == list(tensor.shape)
        error = float((again - tensor.float()).norm() / tensor.float().norm())
        assert error == pytest.approx(errors[name], rel=1e-2)
        assert error < (0.01 if outer and bits == 8 else 0.11)
    assert not after
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: index[name] for path in folder.glob("*.safetensors") for name in load_file(path)} == index
    assert (folder / "tokenizer.json").exists()
    found = checkpoint.read(pull.LocalFiles(folder))
    assert (found.quantization, found.packed_embedding) == ("compressed-tensors", bits != 16)


def test_experts_are_quantized_each_for_itself_and_router_and_tied_embedding_are_not(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(5)
    experts = {f"model.layers.0.mlp.experts.{number}.{name}_proj.weight":
               (torch.randn(*size, generator=random) * 0.01 * (number + 1)).half()
               for number in range(4) for name, size in {"gate": (384, 256), "up": (384, 256),
                                                         "down": (256, 384)}.items()}
    kept = {"model.layers.0.mlp.gate.weight": torch.randn(4, 256, generator=random).half(),
            "model.embed_tokens.weight": torch.randn(VOCAB, 256, generator=random).half()}
    model = tmp_path / "moe"
    model.mkdir()
    save_file(experts | kept, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps({
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 256, "moe_intermediate_size": 384,
        "num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "tie_word_embeddings": True, "torch_dtype": "float16"}))
    folder = in_here(local(tmp_path, model), Wish(group=128))
    after = all_tensors(folder)
    for name, tensor in kept.items():
        assert torch.equal(after.pop(name), tensor)
    for name, tensor in experts.items():
        packed, scale = after[f"{name}_packed"], after[f"{name}_scale"]
        assert scale.dtype is torch.float16
        again = quantizer.dequantize(packed, scale, 4)
        assert float((again - tensor.float()).norm() / tensor.float().norm()) < 0.11
    assert len(after) == 3 * len(experts)
    quantized = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert quantized["ignore"] == ["model.layers.0.mlp.gate"]
    assert [group["targets"] for group in quantized["config_groups"].values()] == [["Linear"]]


@pytest.mark.parametrize("room", [True, False])
def test_on_a_gpu_the_same_comes_out(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch,
                                     room: bool) -> None:  # a parameter
    """Its tensor operations, by several threads; the device itself is only asked for."""
    (tmp_path / "cpu").mkdir()
    expected = in_here(local(tmp_path / "cpu", model), Wish(8))
    asked, compiled = [], quantizer._on_cpu

    def moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
        asked.append(device)
        if not room:
            raise torch.OutOfMemoryError
        monkeypatch.setattr(quantizer, "_on_cpu", quantizer._by_tensors)
        return tensor

    really_to = torch.Tensor.to
    monkeypatch.setattr(quantizer, "device", lambda: "cuda")
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, to, *more, **named: moved(tensor, to) if to == "cuda"
                        else really_to(tensor, to, *more, **named))
    with shard_writer.workers() as pool:
        assert isinstance(pool, ThreadPoolExecutor)
    folder = convert.convert(settings.load(local(tmp_path, model)), Wish(8), lambda _: None)
    assert asked
    assert (quantizer._on_cpu is compiled) is not room
    journals = [journal_module.read_journal(each) for each in (folder, expected)]
    for name, entry in journals[0].shards.items():
        assert entry["errors"] == pytest.approx(journals[1].shards[name]["errors"], rel=1e-3)


def test_what_is_planned_before_is_what_comes_out(tmp_path: Path, model: Path) -> None:
    wanted = settings.load(local(tmp_path, model))
    ref = served_model.served_reference(wanted)
    shapes = ShapeReader(wanted)
    before = shapes.read(ref, None)
    after = shapes.read(ref, in_here(local(tmp_path, model), Wish(8)))
    assert before.tensor_bytes == after.tensor_bytes
    assert before.kv_layers == after.kv_layers


@pytest.mark.parametrize(("name", "bits", "gigabytes"), [
    ("deepseek-r1-distill-llama-70b", INT4, 36.4), ("deepseek-r1-distill-llama-70b", KEPT, 39.5),
    ("mixtral-8x7b-instruct-v0.1", BOUND, 24.5), ("qwen3-30b-a3b", BOUND, 16.4), ("deepseek-v2-lite-chat", BOUND, 8.4),
    ("gemma-3-12b-it", BOUND, 8.4)])
def test_true_models_keep_their_shape_and_shrink(name: str, bits: Bits, gigabytes: float) -> None:
    files = captured.files(name)
    made = layout.layout(files, bits)
    found, whole = checkpoint.read(Outline(files, made)), checkpoint.read(files)
    assert found.weights_bytes / 1e9 == pytest.approx(gigabytes, rel=0.02)
    assert found.notes == whole.notes
    assert found.experts == whole.experts
    for shard in made.shards:
        ends = sorted((begin, item.source.name) for item in shard.items for begin in item.places.values())
        assert ends[0][0] == len(shard.header)
    ignored = made.config["quantization_config"]["ignore"]
    assert not any(name.endswith(("_proj", "experts")) and ".layers." in name and "vision" not in name
                   for name in ignored), ignored[:5]


def test_routers_are_left_alone() -> None:
    ignored = layout.layout(captured.files("qwen3-30b-a3b"), KEPT).config["quantization_config"]["ignore"]
    assert "model.layers.0.mlp.gate" in ignored
    assert "model.layers.47.mlp.gate" in ignored


def test_matrices_that_128_does_not_divide_get_smaller_groups(tmp_path: Path) -> None:
    folder = in_here(local(tmp_path, write_model(tmp_path / "odd", 1, 192)))
    assert json.loads((folder / "conversion.json").read_text())["group"] == 64


@pytest.mark.parametrize(("inner", "group"), [(512, 128), (640, 64), (384, 64), (192, 64), (96, 32)])
def test_halves_for_two_gpus_hold_whole_groups_where_64_can(tmp_path: Path, inner: int, group: int) -> None:
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.ones(inner, 256),
               "model.layers.0.mlp.down_proj.weight": torch.ones(256, inner)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert layout.layout(pull.LocalFiles(tmp_path), KEPT).group == group


def test_a_tied_embedding_stays_as_it_is() -> None:
    made = layout.layout(captured.files("gemma-3-12b-it"), BOUND)
    assert made.bits == KEPT


@pytest.mark.parametrize(("change", "words"), [
    ({"quantization_config": {"quant_method": "awq"}}, "quantized already, by awq"),
    ({"architectures": ["FalconForCausalLM"]}, "layers of FalconForCausalLM are not understood")])
def test_what_would_not_be_served_is_refused_by_name(tmp_path: Path, change: dict[str, object], words: str) -> None:
    model = write_model(tmp_path / "strange", 1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(SettingsError, match=words):
        in_here(local(tmp_path, model))
    assert not list((tmp_path / "models").rglob("*.safetensors"))


def test_a_weight_that_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    model = write_model(tmp_path / "broken", 1)
    shard = model / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, shard)
    with pytest.raises(ModelUnavailableError, match=r"mlp\.up_proj\.weight holds a number that is not finite"):
        in_here(local(tmp_path, model))
    assert artifact.locate(tmp_path / "models", ModelRef(str(model), "local", "master")) is None


def test_embedding_and_head_get_8_bits_where_4_lose_too_much(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tails", 1)
    shard = model / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    noise = torch.rand(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1)).clamp_min(0.01)
    tensors["lm_head.weight"] = (tensors["lm_head.weight"].float() / noise).to(torch.bfloat16)
    save_file(tensors, shard)
    journal = journal_module.read_journal(in_here(local(tmp_path, model)))
    assert journal
    assert (journal.embedding, journal.head) == (4, 8)


def test_for_the_cpu_both_stay_as_they_are(tmp_path: Path, model: Path) -> None:
    journal = journal_module.read_journal(in_here(local(tmp_path, model, VRAM_PROFILE="cpu")))
    assert journal
    assert journal.bits == KEPT


def test_a_quantized_embedding_is_refused_on_the_cpu_with_what_to_type(tmp_path: Path, model: Path) -> None:
    in_here(local(tmp_path, model), Wish(4))
    wanted = settings.load(local(tmp_path, model, VRAM_PROFILE="cpu"))
    ref = served_model.served_reference(wanted)
    shape = ShapeReader(wanted).read(ref, served_model.served_folder(wanted.models_dir, ref), on_cpu=True)
    with pytest.raises(SettingsError, match="embedding is quantized") as error:
        planned(machine(), shape, VRAM_PROFILE="cpu", QUANTIZATION="int4")
    assert "shoehorn models rm" in error.value.remedy


def test_a_plan_takes_the_converted_model_for_what_it_is() -> None:
    files = captured.files("deepseek-r1-distill-llama-70b")
    shape = checkpoint.read(Outline(files, layout.layout(files, BOUND)))
    plan = planned(machine(HUGE), shape, QUANTIZATION="int4")
    assert isinstance(plan, Plan)
    assert "quantization" not in plan.engine_args
    with pytest.raises(SettingsError, match="contradict"):
        planned(machine(HUGE), shape, QUANTIZATION="int4", VLLM_EXTRA_ARGS="--quantization bitsandbytes")
