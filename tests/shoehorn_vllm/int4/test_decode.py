"""The kernel for few rows, compiled for the CPU: addresses, groups, parts of blocks in any order, bias."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from shoehorn.common.paths import HOME

pytestmark = [pytest.mark.contract,
              pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]  # torch and vLLM

SOURCE = HOME / "src" / "shoehorn_vllm" / "int4" / "decode.cu"
_MAIN = """
#include "cuda_on_cpu.h"
#include "decode.cu"
extern "C" void run(const unsigned* order, unsigned blocks, const void* weights, const void* scales, const void* x,
                    void* y, const void* bias, float* partial, int* arrivals, int m, int n, int k, int has_bias) {
    for (unsigned i = 0; i < blocks; i++)
        run_block(order[i], blocks, WARPS * 32, [=] {
            int4_decode((const uint4*)weights, (const uint4*)scales, (const u32*)x, (u16*)y, (const u16*)bias, partial,
                        arrivals, m, n, k, has_bias); });
}
"""


def _bf16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _float(halves: np.ndarray) -> np.ndarray:
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _marlin(codes: np.ndarray, scales: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes [k, n], scales [k / group, n] and bias [n] in the layout of vLLM's own functions."""
    import torch
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_bias, marlin_permute_scales
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import get_weight_perm, marlin_weights

    k, n = codes.shape
    packed = marlin_weights(torch.from_numpy(codes.astype(np.int32)), k, n, 4, get_weight_perm(4))
    moved = marlin_permute_scales(torch.from_numpy(scales.astype(np.int32)), k, n, k // len(scales))
    return (packed.numpy(), moved.numpy().astype(np.uint16),
            marlin_permute_bias(torch.from_numpy(bias.astype(np.int32))).numpy().astype(np.uint16))


def _machete(codes: np.ndarray, scales: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes, scales and bias in Machete's layout, as its own function packed numbered codes on an H100."""
    k, n = codes.shape
    parts = codes.reshape(k // 64, 4, 2, 4, 2, n // 16, 2, 8)  # of k: 64, 16, 8, 2, 1; of n: 16, 8, 1
    nibbles = parts.transpose(0, 5, 7, 3, 1, 4, 2, 6).reshape(-1, 8).astype(np.uint32)
    return (nibbles << np.arange(0, 32, 4, dtype=np.uint32)).sum(1, dtype=np.uint32), scales, bias


class Compiled:
    """A variant of the kernel for the CPU."""

    def __init__(self, folder: Path, tiles: int, group: int, quarters: int, is_machete: bool, warps: int = 2) -> None:
        self.tiles, self.group = tiles, group
        (folder / "main.cpp").write_text(_MAIN, encoding="utf-8")
        library = folder / f"decode-{tiles}-{group}.so"
        defined = {"TILES": tiles, "GROUP": group, "QUARTERS": quarters, "WARPS": warps, "MIN_BLOCKS": 1, "IS_BF16": 1,
                   "IS_MACHETE": int(is_machete)}
        subprocess.run(["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w", "-o", str(library),
                        f"-I{HOME / 'tests' / 'fakes'}", f"-I{SOURCE.parent}", str(folder / "main.cpp"),
                        *(f"-D{name}={value}" for name, value in defined.items())], check=True)
        self._run = ctypes.CDLL(str(library)).run

    def multiply(self, weights: np.ndarray, scales: np.ndarray, x: np.ndarray, bias: np.ndarray, n: int,
                 order: Sequence[int]) -> np.ndarray:
        """Return the product, bf16 as integers, of as many blocks as `order` has."""
        m, k = x.shape
        y, partial = np.zeros((m, n), np.uint16), np.zeros(len(order) * 2 * 512 * self.tiles, np.float32)
        arrivals = np.zeros(n // 64, np.int32)
        arrays = [np.array(order, np.uint32), len(order), weights, scales, x, y, bias, partial, arrivals]
        self._run(*(ctypes.c_void_p(each.ctypes.data) if isinstance(each, np.ndarray) else each for each in arrays),
                  m, n, k, int(bool(len(bias))))
        assert not arrivals.any(), "the next call begins with zeros"
        return y


@pytest.mark.parametrize("is_machete", [True, False])
@pytest.mark.parametrize(("rows", "tiles", "group", "quarters"), [(1, 1, 128, 1), (8, 1, 64, 2), (11, 2, 32, 1)])
def test_product_is_exact_to_rounding_whatever_the_order_of_blocks(
        tmp_path: Path, rows: int, tiles: int, group: int, quarters: int, is_machete: bool) -> None:
    random = np.random.default_rng(0)
    k, n = 384, 192
    codes = random.integers(0, 16, (k, n))
    scales = _bf16(random.uniform(0.005, 0.015, (k // group, n)))
    x, bias = _bf16(random.normal(size=(rows, k))), _bf16(random.normal(size=n))
    kernel = Compiled(tmp_path, tiles, group, quarters, is_machete)
    laid_out = (_machete if is_machete else _marlin)(codes, scales, bias)
    numbers = (codes - 8) * np.repeat(_float(scales), group, 0)
    right = _float(x).astype(np.float64) @ numbers + _float(bias)
    results = []
    for order in ([0], [0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        results.append(kernel.multiply(laid_out[0], laid_out[1], x, laid_out[2], n, order))
        np.testing.assert_allclose(_float(results[-1]), right, rtol=2 ** -7, atol=1e-3)
    np.testing.assert_array_equal(results[1], results[2])
    without = kernel.multiply(laid_out[0], laid_out[1], x, np.zeros(0, np.uint16), n, [1, 0])
    np.testing.assert_allclose(_float(without), right - _float(bias), rtol=2 ** -7, atol=1e-3)
