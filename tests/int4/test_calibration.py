"""Calibrated conversion: arithmetic, inputs of a layer, memory plan, text, and whole conversions of small models."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from shoehorn.common.errors import ModelUnavailableError, SettingsError
from shoehorn.config import settings
from shoehorn.deployment import served_model
from shoehorn.deployment.served_model import ShapeReader
from shoehorn.int4 import quantizer
from shoehorn.int4.calibration import budget, gptq, inputs, text
from shoehorn.int4.calibration import layer as layer_module
from shoehorn.int4.calibration.budget import LayerSize
from shoehorn.int4.convert import ConversionOptions
from shoehorn.planner.plan import Plan
from support.converting import all_tensors, content, convert_here, local, readable, write_model
from support.plans import HUGE, machine, planned

BF16 = torch.bfloat16


def correlated(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs with few strong directions, as hidden states have."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=random) / math.sqrt(columns)
    return torch.randn(tokens, columns, generator=random) * torch.logspace(0, -2, columns) @ mixing


def output_error(weight: torch.Tensor, restored: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (weight - restored).T).norm() / (x @ weight.T).norm())


def data_free(weight: torch.Tensor, group: int) -> torch.Tensor:
    rows = quantizer.quantize(weight, 4, group, BF16)
    return quantizer.dequantize(rows.packed, rows.scale, 4)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_calibrated_codes_have_a_smaller_output_error_also_for_inputs_that_they_were_not_fitted_to(group: int) -> None:
    weight, x = torch.randn(96, 256, generator=torch.Generator().manual_seed(1)), correlated(4096, 256)
    codes = gptq.quantize(weight, gptq.Factor(x[:3072].T @ x[:3072], group), 4, BF16)
    assert codes.codes.min() >= -8
    assert codes.codes.max() <= 7
    packed = quantizer.pack(codes.codes, 4)
    assert torch.equal(quantizer.dequantize(packed, codes.scale, 4), codes.restored())
    unseen = x[3072:]
    assert output_error(weight, codes.restored(), unseen) < 0.6 * output_error(weight, data_free(weight, group), unseen)


def test_recorded_error_is_that_of_the_outputs() -> None:
    weight, x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)), correlated(2048, 128)
    factor = gptq.Factor(x.T @ x, 64, damping=1e-6)
    codes = gptq.quantize(weight, factor, 4, BF16)
    norm = float(codes.squared_norm.sum())
    recorded = math.sqrt(float(codes.squared_error.sum()) / norm)
    assert recorded == pytest.approx(output_error(weight, codes.restored(), x), rel=1e-2)
    free = data_free(weight, 64)
    assert math.sqrt(float(gptq.squared_error(weight - free, factor).sum()) / norm) == pytest.approx(
        output_error(weight, free, x), rel=1e-2)


def test_sweeps_never_raise_the_error() -> None:
    weight, x = torch.randn(64, 128, generator=torch.Generator().manual_seed(3)), correlated(1024, 128)
    errors = [float(gptq.quantize(weight, gptq.Factor(x.T @ x, 32), 4, BF16, sweeps).squared_error.sum())
              for sweeps in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.97 * errors[0]


def test_feedback_alone_lowers_the_error_and_reaches_beyond_the_group() -> None:
    weight, x = torch.randn(96, 256, generator=torch.Generator().manual_seed(1)), correlated(4096, 256)
    factor = gptq.Factor(x.T @ x, 32)
    whole = float(gptq.quantize(weight, factor, 4, BF16, sweeps=0).squared_error.sum())
    factor.upper = torch.block_diag(*(factor.upper[start:start + 32, start:start + 32] for start in range(0, 256, 32)))
    within = float(gptq.quantize(weight, factor, 4, BF16, sweeps=0).squared_error.sum())
    assert whole < 0.8 * within
    assert within < float(gptq.squared_error(weight - data_free(weight, 32), factor).sum())


def test_columns_and_groups_are_ordered_by_their_inputs() -> None:
    strength = torch.tensor([1.0, 2, 3, 4, 8, 7, 6, 5, 1, 1, 9, 1])
    assert gptq.Factor(torch.diag(strength), 4).order.tolist() == [10, 8, 9, 11, 4, 5, 6, 7, 3, 2, 1, 0]


@pytest.mark.parametrize("silent", [0, 5, 128])
def test_inputs_that_are_always_zero_leave_finite_codes(silent: int) -> None:
    x = correlated(512, 128)
    x[:, :silent] = 0
    weight = torch.randn(16, 128)
    if silent == 128:
        with pytest.raises(ValueError, match="no calibration input"):
            gptq.Factor(x.T @ x, 32)
        return
    restored = gptq.quantize(weight, gptq.Factor(x.T @ x, 32), 4, BF16).restored()
    assert bool(restored.isfinite().all())
    assert float((restored - weight).norm() / weight.norm()) < 0.2


def test_a_weight_that_is_not_finite_is_an_error() -> None:
    weight = torch.randn(4, 64)
    weight[1, 2] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        gptq.quantize(weight, gptq.Factor(torch.eye(64), 32), 4, BF16)


def test_memory_plan_keeps_to_the_budget_and_leaves_a_small_gpu_alone() -> None:
    layer = LayerSize(856_000_000, 28_672, 6 * 28_672 + 64 * 1024)  # of a 70B
    for gibibytes in (8, 24, 80):
        planned = budget.plan(layer, 1024, BF16, gibibytes << 30, 64 << 30)
        assert planned.device == "cuda"
        assert planned.total_bytes <= 0.86 * (gibibytes << 30)
    assert planned.columns == 28_672
    assert budget.plan(layer, 1024, BF16, 8 << 30, 0).columns < 28_672
    on_cpu = budget.plan(layer, 1024, BF16, 2 << 30, 64 << 30)
    assert (on_cpu.device, on_cpu.dtype) == ("cpu", torch.float32)
    assert on_cpu.total_bytes <= 64 << 30


def test_spans_and_passes_cover_every_column_once_within_the_bound() -> None:
    source = inputs.Source(("mlp.down_proj.weight",), 1536, "mlp.down_proj")
    parts = inputs.spans([source], 700, 64)
    assert [(span.begin, span.end) for span in parts] == [(0, 512), (512, 1024), (1024, 1536)]
    assert [len(members) for members in inputs.passes(parts, 2 * parts[0].bytes)] == [2, 1]
    assert [len(members) for members in inputs.passes(parts, 1)] == [1, 1, 1]


def mixture() -> torch.nn.Module:
    config = Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=96, num_hidden_layers=1, num_experts=4,
                            num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                            vocab_size=64, mlp_only_layers=[], intermediate_size=64)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).model.layers[0].mlp  # type: ignore[no-any-return]


def test_experts_are_calibrated_by_their_own_inputs_and_a_rare_one_stays_data_free() -> None:
    module = mixture()
    module.gate.weight.data = 0.1 * torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    module.gate.weight.data[:, 0] = 0
    module.gate.weight.data[3] = 0
    module.gate.weight.data[3, 0] = -1000.0  # hardly chosen: the first input is positive
    x = torch.randn(1, 512, 64).abs()
    names = [f"experts.{expert}.{kind}_proj.weight" for expert in range(4) for kind in ("gate", "up", "down")]
    plan = budget.Budget("cpu", torch.float32, 1, 64, 1 << 20, 64, 2, 0)
    before = {name: layer_module.weight_of(module, name).clone() for name in names}
    with torch.inference_mode():
        expected = module(x)
        results = layer_module.quantize_layer(module, names, 32, BF16, plan, lambda: module(x[:, :8]),
                                              lambda: module(x), lambda _: None)
        changed = module(x)
    assert {name for name, each in results.items() if not each.calibrated} == set(names[9:])
    for name, result in results.items():
        restored = quantizer.dequantize(result.packed, result.scale, 4)
        assert torch.equal(layer_module.weight_of(module, name), restored), name
        if name in names[9:]:
            assert torch.equal(restored, data_free(before[name], 32)), name
        else:
            assert result.output_error() < result.output_error("free"), name
    assert 0 < float((changed - expected).norm() / expected.norm()) < 0.12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return readable(write_model(tmp_path_factory.mktemp("source") / "little", 2))


def test_calibrated_conversion_has_smaller_output_errors_and_reports_them(tmp_path: Path, model: Path) -> None:
    folder = convert_here(local(tmp_path, model, CALIBRATION=str(model.parent / "text.txt")), ConversionOptions(16))
    journal = json.loads((folder / "conversion.json").read_text())["calibration"]
    assert len(journal["output_errors"]) == 14
    assert all(error < free for error, free in journal["output_errors"].values())
    assert journal["data_free"] == []
    assert 0 < journal["loss"]["kl_mean"] < 0.1
    assert not (folder / "calibration").exists()
    before, after = all_tensors(model), all_tensors(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    restored = quantizer.dequantize(after[f"{name}_packed"], after[f"{name}_scale"], 4)
    assert 0.05 < float((restored - before[name].float()).norm() / before[name].float().norm()) < 0.2


def test_text_gives_equal_sequences_of_every_file(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_text("w1 " * 40)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "w2 " * 40}) + "\n" + json.dumps({"messages": []}) + "\n")
    sequences = text.read(model, tmp_path, 5, 10)
    assert sequences.ids.tolist() == [[1] * 10, [2] * 10, [1] * 10, [2] * 10, [1] * 10]
    with pytest.raises(SettingsError) as caught:
        text.read(model, tmp_path, 5, 100)
    assert caught.value.code == "calibration_no_text"


def test_every_sequence_begins_as_the_model_expects_it(tmp_path: Path, model: Path) -> None:
    own = shutil.copytree(model, tmp_path / "own")
    tokenizer = Tokenizer.from_file(str(own / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="w7 $A", special_tokens=[("w7", 7)])
    tokenizer.save(str(own / "tokenizer.json"))
    (own / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast",
                                                           "bos_token": "w7"}))
    (tmp_path / "a.txt").write_text("w1 " * 40)
    assert text.read(own, tmp_path / "a.txt", 2, 5).ids.tolist() == [[7, 1, 1, 1, 1]] * 2


@pytest.mark.parametrize(("name", "data"), [("a.jsonl", b"{"), ("a.jsonl", b'{"other": 1}'), ("a.txt", b"\xff")])
def test_invalid_text_is_an_error_that_names_the_file(tmp_path: Path, model: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SettingsError, match=name) as caught:
        text.read(model, tmp_path, 5, 10)
    assert caught.value.code == "calibration_invalid_text"


def test_model_without_a_usable_tokenizer_is_converted_without_calibration_unless_it_was_asked_for(
        tmp_path: Path) -> None:
    plain = write_model(tmp_path / "plain", 1)
    (tmp_path / "off").mkdir()
    expected = content(convert_here(local(tmp_path / "off", plain)))
    assert content(convert_here(local(tmp_path, plain, CALIBRATION="auto"))) == expected
    (tmp_path / "on").mkdir()
    with pytest.raises(SettingsError) as caught:
        convert_here(local(tmp_path / "on", plain, CALIBRATION="on"))
    assert caught.value.code == "calibration_unsupported_model"


def test_weight_that_is_not_finite_is_named_before_anything_is_served(tmp_path: Path) -> None:
    broken = readable(write_model(tmp_path / "broken", 1))
    tensors = all_tensors(broken)
    shard = broken / "model-00002-of-00002.safetensors"
    own = {name: tensor for name, tensor in tensors.items() if ".layers." in name}
    own["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(own, shard)
    with pytest.raises(ModelUnavailableError) as caught:
        convert_here(local(tmp_path, broken, CALIBRATION=str(tmp_path / "text.txt")))
    assert caught.value.code == "invalid_weights"


def test_plan_shows_groups_calibration_and_measured_loss(tmp_path: Path, model: Path) -> None:
    for setting, expected in (("off", "INT4 in groups of 128, converted without calibration"),
                              (str(model.parent / "text.txt"), "calibrated with 3,584 tokens; measured loss: KL")):
        home = tmp_path / Path(setting).name
        home.mkdir()
        environment = local(home, model, CALIBRATION=setting)
        folder = convert_here(environment, ConversionOptions(16))
        converting = settings.load(environment)
        ref = served_model.served_reference(converting)
        shape = ShapeReader(converting).read(ref, served_model.served_folder(converting.models_dir, ref))
        plan = planned(machine(HUGE), shape, QUANTIZATION="int4")
        assert isinstance(plan, Plan)
        notes = [reason.params["note"] for reason in plan.reasons if reason.code == "model-note"]
        assert any(expected in note for note in notes), (folder, notes)
