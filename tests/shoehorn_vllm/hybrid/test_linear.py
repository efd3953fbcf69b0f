"""The dense product against float64: every batch, group, format, instruction set; no value left unwritten."""

from __future__ import annotations

import itertools

import pytest
import torch

from shoehorn_vllm.hybrid.kernel import library, products
from shoehorn_vllm.hybrid.kernel.library import Isa
from support.kernel_reference import Matrix, activations, error, matrix, rounded

TOKENS = range(1, 18)
FORMATS = [(32, False), (64, False), (128, False), (32, True)]
# k: within one block, blocks and a part of one (also of the smallest group), more than one chunk of scales
SIZES = {32: (32, 576 + 32, 4096 + 288), 64: (64, 576, 4096 + 192), 128: (128, 1152, 4096 + 384)}
ROWS = 37


def weights(packed: Matrix) -> products.PackedWeights:
    return products.PackedWeights(packed.codes, packed.scales)


@pytest.mark.parametrize(("group", "mxfp4"), FORMATS)
def test_against_float64(isa: Isa, group: int, mxfp4: bool, threads: int) -> None:
    for number, k in enumerate(SIZES[group]):
        packed = matrix((ROWS, k), group, number, mxfp4)
        x = activations(max(TOKENS), k, 7)
        expected = rounded(x) @ packed.values.T
        for tokens in TOKENS:
            y = torch.full((tokens, ROWS), torch.nan)
            products.linear(weights(packed), x[:tokens], out=y, isa=isa)
            assert error(y, expected[:tokens]) < 2e-6, (k, tokens)


@pytest.mark.parametrize(("group", "mxfp4"), FORMATS)
def test_int8_activations_cost_little(isa: Isa, group: int, mxfp4: bool, two_threads: object) -> None:
    packed, x = matrix((64, 1024), group, 1, mxfp4), torch.randn(4, 1024).to(torch.bfloat16)
    assert error(products.linear(weights(packed), x, isa=isa), x.double() @ packed.values.T) < 0.011


def test_rows_that_no_chunk_divides(isa: Isa, threads: int) -> None:
    for rows, tokens in itertools.product((1, 2, 3, 5, 255, 257, 1031), (1, 4, 8)):
        packed, x = matrix((rows, 256), 64, rows), activations(tokens, 256, 3)
        y = torch.full((tokens, rows), torch.nan)
        products.linear(weights(packed), x, out=y, isa=isa)
        assert error(y, rounded(x) @ packed.values.T) < 2e-6, (rows, tokens)


def test_only_the_output_is_written(isa: Isa, two_threads: object) -> None:
    packed, x = matrix((ROWS, 576), 64, 1), activations(5, 576, 3)
    whole = torch.full((7, ROWS + 6), torch.nan)
    products.linear(weights(packed), x, out=whole[1:6, 3:ROWS + 3], isa=isa)
    assert whole[1:6, 3:ROWS + 3].isfinite().all()
    assert whole.isnan().sum() == whole.numel() - 5 * ROWS


def test_bias_and_bf16(isa: Isa, two_threads: object) -> None:
    packed, x = matrix((ROWS, 576), 64, 1), activations(5, 576, 3)
    bias = torch.randn(ROWS).to(torch.bfloat16)
    y = torch.full((5, ROWS), torch.nan, dtype=torch.bfloat16)
    products.linear(weights(packed), x, bias, out=y, isa=isa)
    assert error(y, rounded(x) @ packed.values.T + bias.double()) < 4e-3


def test_rows_of_activations_apart(isa: Isa, two_threads: object) -> None:
    packed, x = matrix((ROWS, 256), 64, 1), activations(4, 512, 3)
    y = products.linear(weights(packed), x[:, 256:], isa=isa)
    assert torch.equal(y, products.linear(weights(packed), x[:, 256:].clone(), isa=isa))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_fault_in_the_activations_is_not_hidden(isa: Isa, value: float, two_threads: object) -> None:
    packed, x = matrix((ROWS, 576), 64, 1), activations(3, 576, 3)
    x[1, 100] = value
    y = products.linear(weights(packed), x, isa=isa)
    assert not y[1].isfinite().any()
    assert y[0].isfinite().all()
    assert y[2].isfinite().all()


def test_the_number_of_threads_changes_no_bit() -> None:
    from shoehorn_vllm.hybrid.kernel import team

    packed, x = matrix((257, 1152), 128, 1), activations(16, 1152, 3)
    results = []
    for count in (1, 2):
        team.start(reserved=0, threads=count)
        results.append(products.linear(weights(packed), x))
        team.stop()
    assert torch.equal(*results)


@pytest.mark.parametrize(("group", "mxfp4"), FORMATS)
def test_unpacked_weights_are_exact(isa: Isa, group: int, mxfp4: bool, two_threads: object) -> None:
    packed = matrix((ROWS, 640), group, 1, mxfp4)
    out = torch.full((ROWS, 640), torch.nan, dtype=torch.bfloat16)
    products.unpack(weights(packed), out, isa=isa)
    assert torch.equal(out, packed.values.to(torch.bfloat16))


def test_what_does_not_fit_is_refused() -> None:
    packed = matrix((8, 128), 64, 1)
    with pytest.raises(library.KernelError, match="Shapes: mismatch"):
        products.linear(weights(packed), activations(2, 256, 1))
    with pytest.raises(library.KernelError, match="unsupported"):
        products.linear(weights(packed), torch.zeros(2, 128))
    with pytest.raises(library.KernelError, match="unsupported shapes"):
        products.PackedWeights(packed.codes, packed.scales[:, :1].repeat(1, 8))
