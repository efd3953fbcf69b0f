"""Quantization of a checkpoint: every place that describes it, and packed tensors without a description."""

from __future__ import annotations

from typing import Any

import pytest

from shoehorn.model.checkpoint import shape_of
from shoehorn.model.quantization import read_quantization
from shoehorn.model.safetensors import Tensor

CONFIG = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}
PLAIN = [Tensor("model.layers.0.mlp.up_proj.weight", "BF16", (128, 64), 16384)]


def method(config: dict[str, Any], files: dict[str, Any]) -> str:
    return str(read_quantization(config, files, PLAIN, []).get("quant_method", ""))


@pytest.mark.parametrize(("config", "files", "expected"), [
    ({"quantization_config": {"quant_method": "AWQ"}}, {}, "awq"),
    ({"compression_config": {"quant_method": "compressed_tensors"}}, {}, "compressed-tensors"),
    ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, {}, "fp8"),
    ({"llm_config": {"quantization_config": {"quant_method": "gptq"}}}, {}, "gptq"),
    ({"thinker_config": {"text_config": {"quantization_config": {"quant_method": "gptq"}}}}, {}, "gptq"),
    ({}, {"hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}}}, "modelopt"),
    ({}, {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4"}}}, "modelopt_fp4"),
    ({}, {"hf_quant_config.json": {"quantization": {"quant_algo": "MIXED_PRECISION"}}}, "modelopt_mixed"),
    ({"quantization_config": {"quant_algo": "NVFP4", "producer": {"name": "modelopt"}}}, {}, "modelopt_fp4"),
    ({"quantization_config": {"quant_method": "fp8"}}, {"hf_quant_config.json": {"quantization": {
        "quant_algo": "NVFP4"}}}, "fp8"),
    ({"quantization_config": None}, {}, ""), ({"quantization_config": {}}, {}, ""), ({}, {}, "")])
def test_description_is_found_where_the_engine_looks(config: dict[str, Any], files: dict[str, Any], expected: str
                                                     ) -> None:
    assert method(config, files) == expected


@pytest.mark.parametrize(("suffixes", "dtype", "expected"), [
    (("qweight", "qzeros", "scales"), "I32", "awq"), (("qweight", "qzeros", "g_idx"), "I32", "gptq"),
    (("weight_packed", "weight_scale"), "I32", "compressed-tensors"),
    (("weight", "weight_scale_inv"), "F8_E4M3", "fp8"),
    (("weight", "weight_scale", "weight_scale_2"), "U8", "modelopt_fp4"),
    (("weight", "weight.absmax"), "U8", "bitsandbytes"),
    (("weight",), "F8_E4M3", "packed"), (("codes",), "I8", "packed")])
def test_packed_tensors_are_never_unquantized(suffixes: tuple[str, ...], dtype: str, expected: str) -> None:
    tensors = [Tensor(f"model.layers.0.mlp.up_proj.{suffix}", dtype, (64, 64), 4096) for suffix in suffixes]
    notes: list[str] = []
    assert read_quantization({}, {}, tensors, notes)["quant_method"] == expected
    assert "--quantization" in notes[0]
    assert shape_of(CONFIG, tensors, 0).quantization == expected
