"""Quantizer: compatible with compressed-tensors, and never worse than simple rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shoehorn.common.paths import HOME
from shoehorn.int4 import quantizer

ROWS, COLUMNS = 48, 512


def weights(kind: str) -> torch.Tensor:
    random = torch.Generator().manual_seed(7)
    normal = torch.randn(ROWS, COLUMNS, generator=random) * 0.02
    if kind == "heavy tails":
        return normal / torch.rand(ROWS, COLUMNS, generator=random).clamp_min(0.05)
    if kind == "one giant":
        normal[3, 5] = 40.0
    if kind == "all above zero":
        return normal.abs()
    return torch.zeros(ROWS, COLUMNS) if kind == "zeros" else normal


def simple_error(weight: torch.Tensor, bits: int, group: int) -> float:
    """Return the squared error of rounding with the scale of the largest weight of a group."""
    values = weight.float().view(-1, group)
    scale = (values.abs().amax(1, keepdim=True) / ((2 ** bits - 1) / 2)).clamp_min(1e-12).to(torch.bfloat16).float()
    codes = (values / scale).round().clamp(-2 ** (bits - 1), 2 ** (bits - 1) - 1)
    return float((values - codes * scale).square().sum())


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one giant", "all above zero", "zeros"])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 64), (4, 32), (8, 128)])
def test_error_is_correct_and_at_most_that_of_simple_rounding(kind: str, bits: int, group: int) -> None:
    weight = weights(kind).to(torch.bfloat16)
    rows = quantizer.quantize(weight, bits, group, torch.bfloat16)
    restored = quantizer.dequantize(rows.packed, rows.scale, bits)
    assert float((weight.float() - restored).square().sum()) == pytest.approx(rows.squared_error, rel=1e-3, abs=1e-12)
    assert rows.squared_norm == pytest.approx(float(weight.float().square().sum()), rel=1e-4)
    assert rows.squared_error <= simple_error(weight, bits, group) * 1.0001


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one giant", "all above zero", "zeros"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("bits", [4, 8])
def test_cpu_and_gpu_paths_agree(kind: str, dtype: str, bits: int) -> None:
    weight = weights(kind).to(quantizer.DTYPES[dtype])
    scale_dtype = quantizer.DTYPES["F16" if dtype == "F16" else "BF16"]
    compiled = quantizer.quantize(weight, bits, 128, scale_dtype)
    packed, scale, squared_error, squared_norm = quantizer._by_tensors(weight, bits, 128, scale_dtype)
    same = (compiled.packed.view(-1) == packed).float().mean()
    assert float(same) > 0.99, "only rounding of sums may differ"
    assert torch.isclose(compiled.scale.view(-1), scale, rtol=0.01).float().mean() > 0.99
    assert compiled.squared_error == pytest.approx(squared_error, rel=1e-3)
    assert compiled.squared_norm == pytest.approx(squared_norm, rel=1e-4)


@pytest.mark.parametrize(("dtype", "tiny"), [("BF16", 1e-39), ("F16", 6e-8), ("F32", 1e-44)])
def test_weights_too_small_for_a_scale_become_zeros(dtype: str, tiny: float) -> None:
    weight = weights("normal").to(quantizer.DTYPES[dtype])
    weight[0, :128] = tiny
    weight[0, 3] = 0
    for rows in (quantizer.quantize(weight, 4, 128, quantizer.DTYPES["F16" if dtype == "F16" else "BF16"]),
                 quantizer.QuantizedRows(*quantizer._by_tensors(weight, 4, 128, quantizer.DTYPES["BF16"]))):
        restored = quantizer.dequantize(rows.packed.view(ROWS, -1), rows.scale.view(ROWS, -1), 4)
        assert torch.isfinite(restored).all()
        assert float(restored[0, :128].abs().max()) <= 10 * tiny
        assert rows.squared_error < 0.02 * rows.squared_norm


def test_error_of_normal_weights_is_as_documented() -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    rows = quantizer.quantize(weight, 4, 128, torch.bfloat16)
    assert (rows.squared_error / rows.squared_norm) ** 0.5 == pytest.approx(0.097, abs=0.001)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # raised by its imports
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_unpacks_the_same_codes(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    weight = weights("normal")
    rows = quantizer.quantize(weight, bits, 128, torch.bfloat16)
    codes = unpack_from_int32(rows.packed, bits, torch.Size((ROWS, COLUMNS)))
    restored = codes.float().view(ROWS, -1, 128) * rows.scale.float().unsqueeze(-1)
    assert torch.equal(restored.view(ROWS, COLUMNS), quantizer.dequantize(rows.packed, rows.scale, bits))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # raised by its imports
def test_error_of_trained_weights_is_at_most_a_fifth_above_nf4() -> None:
    from bitsandbytes import functional

    squared_error, nf4 = 0.0, 0.0
    for name, tensor in load_file(HOME / "demo" / "model" / "model.safetensors").items():
        if ".layers." in name and tensor.dim() == 2:
            squared_error += quantizer.quantize(tensor, 4, 128, torch.bfloat16).squared_error
            packed, state = functional.quantize_4bit(tensor.float(), blocksize=64, quant_type="nf4")
            nf4 += float((functional.dequantize_4bit(packed, state) - tensor.float()).square().sum())
    assert (squared_error / nf4) ** 0.5 <= 1.2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_value_that_is_not_finite_is_rejected(bad: float) -> None:
    weight = weights("normal")
    weight[1, 1] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantizer.quantize(weight, 4, 128, torch.bfloat16)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_bytes_of_a_file_are_converted_without_change(dtype: str) -> None:
    data = np.random.default_rng(1).standard_normal(64).astype(np.float32).tobytes()
    assert quantizer.to_bytes(quantizer.from_bytes(bytearray(data), dtype, 8)) == data
