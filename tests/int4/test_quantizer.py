"""The numbers of INT4: as compressed-tensors reads them, and never worse than the plain way."""

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


def plain(weight: torch.Tensor, bits: int, group: int) -> float:
    """The squared error of rounding with the scale that the largest weight of a group gives."""
    values = weight.float().view(-1, group)
    scale = (values.abs().amax(1, keepdim=True) / ((2 ** bits - 1) / 2)).clamp_min(1e-12).to(torch.bfloat16).float()
    codes = (values / scale).round().clamp(-2 ** (bits - 1), 2 ** (bits - 1) - 1)
    return float((values - codes * scale).square().sum())


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one giant", "all above zero", "zeros"])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 64), (4, 32), (8, 128)])
def test_the_error_is_what_it_says_and_no_larger_than_the_plain_ways(kind: str, bits: int, group: int) -> None:
    weight = weights(kind).to(torch.bfloat16)
    found = quantizer.quantize(weight, bits, group, torch.bfloat16)
    again = quantizer.dequantize(found.packed, found.scale, bits)
    assert float((weight.float() - again).square().sum()) == pytest.approx(found.lost, rel=1e-3, abs=1e-12)
    assert found.whole == pytest.approx(float(weight.float().square().sum()), rel=1e-4)
    assert found.lost <= plain(weight, bits, group) * 1.0001


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one giant", "all above zero", "zeros"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_cpu_and_a_gpu_find_the_same(kind: str, dtype: str, bits: int) -> None:
    weight = weights(kind).to(quantizer.DTYPES[dtype])
    scale_dtype = quantizer.DTYPES["F16" if dtype == "F16" else "BF16"]
    compiled = quantizer.quantize(weight, bits, 128, scale_dtype)
    packed, scale, lost, whole = quantizer._by_tensors(weight, bits, 128, scale_dtype)  # else on a GPU only
    same = (compiled.packed.view(-1) == packed).float().mean()
    assert float(same) > 0.99, "but for sums that differ in their last digit"
    assert torch.isclose(compiled.scale.view(-1), scale, rtol=0.01).float().mean() > 0.99
    assert compiled.lost == pytest.approx(lost, rel=1e-3)
    assert compiled.whole == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize(("dtype", "tiny"), [("BF16", 1e-39), ("F16", 6e-8), ("F32", 1e-44)])
def test_weights_too_small_for_a_scale_become_zeros(dtype: str, tiny: float) -> None:
    weight = weights("normal").to(quantizer.DTYPES[dtype])
    weight[0, :128] = tiny
    weight[0, 3] = 0
    for found in (quantizer.quantize(weight, 4, 128, quantizer.DTYPES["F16" if dtype == "F16" else "BF16"]),
                  quantizer.Quantized(*quantizer._by_tensors(weight, 4, 128, quantizer.DTYPES["BF16"]))):  # as above
        again = quantizer.dequantize(found.packed.view(ROWS, -1), found.scale.view(ROWS, -1), 4)
        assert torch.isfinite(again).all()
        assert float(again[0, :128].abs().max()) <= 10 * tiny
        assert found.lost < 0.02 * found.whole


def test_normal_weights_lose_what_the_documentation_says() -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    found = quantizer.quantize(weight, 4, 128, torch.bfloat16)
    assert (found.lost / found.whole) ** 0.5 == pytest.approx(0.097, abs=0.001)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # what it imports does that
@pytest.mark.parametrize("bits", [4, 8])
def test_the_library_that_the_engine_uses_unpacks_the_same_codes(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    weight = weights("normal")
    found = quantizer.quantize(weight, bits, 128, torch.bfloat16)
    codes = unpack_from_int32(found.packed, bits, torch.Size((ROWS, COLUMNS)))
    again = codes.float().view(ROWS, -1, 128) * found.scale.float().unsqueeze(-1)
    assert torch.equal(again.view(ROWS, COLUMNS), quantizer.dequantize(found.packed, found.scale, bits))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # what it imports does that
def test_trained_weights_lose_at_most_a_fifth_more_than_in_nf4() -> None:
    from bitsandbytes import functional

    lost, nf4 = 0.0, 0.0
    for name, tensor in load_file(HOME / "demo" / "model" / "model.safetensors").items():
        if ".layers." in name and tensor.dim() == 2:
            lost += quantizer.quantize(tensor, 4, 128, torch.bfloat16).lost
            packed, state = functional.quantize_4bit(tensor.float(), blocksize=64, quant_type="nf4")
            nf4 += float((functional.dequantize_4bit(packed, state) - tensor.float()).square().sum())
    assert (lost / nf4) ** 0.5 <= 1.2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(bad: float) -> None:
    weight = weights("normal")
    weight[1, 1] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantizer.quantize(weight, 4, 128, torch.bfloat16)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_bytes_of_a_file_come_and_go_as_they_are(dtype: str) -> None:
    data = np.random.default_rng(1).standard_normal(64).astype(np.float32).tobytes()
    assert quantizer.to_bytes(quantizer.from_bytes(bytearray(data), dtype, 8)) == data
