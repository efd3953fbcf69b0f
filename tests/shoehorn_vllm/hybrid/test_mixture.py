"""Experts against float64: lists of tokens of any length, activations, biases, invalid ids."""

from __future__ import annotations

import pytest
import torch

from shoehorn_vllm.hybrid.kernel import products
from shoehorn_vllm.hybrid.kernel.library import Isa
from support.kernel_reference import activations, error, matrix, rounded

HIDDEN, INNER, COUNT, TOP_K = 192, 96, 5, 2


def activate(gate: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
    if name == "swigluoai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    if name.startswith("gelu"):
        return up * torch.nn.functional.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none")
    return up * torch.nn.functional.silu(gate)


def mixture(group: int, mxfp4: bool, activation: str, bias: bool) -> tuple[products.ExpertWeights, list[torch.Tensor]]:
    up = matrix((COUNT, 2 * INNER, HIDDEN), group, 1, mxfp4)
    down = matrix((COUNT, HIDDEN, INNER), group, 2, mxfp4)
    biases = [torch.randn(COUNT, rows).to(torch.bfloat16) if bias else None for rows in (2 * INNER, HIDDEN)]
    experts = products.ExpertWeights(products.PackedWeights(up.codes, up.scales),
                                  products.PackedWeights(down.codes, down.scales), activation, *biases)
    zeros = [torch.zeros(COUNT, rows) for rows in (2 * INNER, HIDDEN)]
    return experts, [up.values, down.values, *(b if b is not None else z for b, z in zip(biases, zeros, strict=True))]


def expected(parts: list[torch.Tensor], group: int, activation: str, x: torch.Tensor, router: torch.Tensor,
             ids: torch.Tensor) -> torch.Tensor:
    up, down, up_bias, down_bias = (part.double() for part in parts)
    y, x = torch.zeros(x.shape[0], HIDDEN, dtype=torch.float64), rounded(x)
    for expert in range(COUNT):
        both = x @ up[expert].T + up_bias[expert]
        halves = (both[:, 0::2], both[:, 1::2]) if activation == "swigluoai" else (both[:, :INNER], both[:, INNER:])
        inner = rounded(activate(*halves, activation).to(torch.bfloat16))
        share = torch.where(ids == expert, router.double(), 0).sum(-1, keepdim=True)
        y += share * (inner @ down[expert].T + down_bias[expert])
    return y


def draw(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(COUNT, generator=random)[:TOP_K] for _ in range(tokens)]).to(torch.int32)
    return activations(tokens, HIDDEN, seed), torch.rand(tokens, TOP_K, generator=random), ids


@pytest.mark.parametrize(("mxfp4", "activation", "bias"), [
    (False, "silu", False), (False, "gelu", True), (False, "gelu_tanh", False), (True, "swigluoai", True)])
def test_against_float64(isa: Isa, mxfp4: bool, activation: str, bias: bool, threads: int) -> None:
    weights, parts = mixture(32, mxfp4, activation, bias)
    for tokens in (1, 2, 5, 16, 40):
        x, router, ids = draw(tokens, tokens)
        y = torch.full((tokens, HIDDEN), torch.nan)
        products.experts(weights, x, router, ids, out=y, isa=isa)
        # the inner activations are rounded to bf16 and int8: a last bit that differs there is seen here
        assert error(y, expected(parts, 32, activation, x, router, ids)) < 2e-3, tokens


def test_one_expert_for_all_tokens_and_invalid_ids(isa: Isa, two_threads: object) -> None:
    weights, parts = mixture(32, False, "silu", False)
    x, router, ids = draw(19, 3)
    ids[:, 0], ids[3, 1], ids[4, 1] = 2, -1, COUNT
    y = products.experts(weights, x, router, ids, out=torch.full((19, HIDDEN), torch.nan), isa=isa)
    assert error(y, expected(parts, 32, "silu", x, router, ids)) < 2e-3
    ids[:] = -1
    assert not products.experts(weights, x, router, ids, isa=isa).any()


def test_the_number_of_threads_changes_no_bit() -> None:
    from shoehorn_vllm.hybrid.kernel import team

    weights, _ = mixture(32, False, "silu", False)
    results = []
    for count in (1, 2):
        team.start(reserved=0, threads=count)
        results.append(products.experts(weights, *draw(16, 1)))
        team.stop()
    assert torch.equal(*results)
