"""Measurement of the CPU kernel on this machine: about two seconds, in a process of its own.

`python -m shoehorn_vllm.hybrid.kernel.probe RESERVED` leaves that many physical cores free and prints one JSON object,
in bytes a second: `read`, at which the threads only read host memory, and `tokens_1` and `tokens_8`, at which they read
weights in INT4 to multiply them with one token and with eight. Matrices take turns, so that caches do not hold them.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from shoehorn_vllm.hybrid.kernel import products, team
from shoehorn_vllm.hybrid.kernel.products import PackedWeights

_ROWS, _K, _GROUP = 14336, 8192, 128
_MATRICES = 16
"""Of 59 MiB each: more than the caches of a server."""

_SECONDS = 0.4


def rate(call: Callable[[int], Any], size: int) -> float:
    """Return bytes a second of `call(number of the matrix)`, which reads `size` bytes: the median over the calls."""
    call(0)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < _MATRICES or time.perf_counter() - begin < _SECONDS:
        start = time.perf_counter()
        call(len(times) % _MATRICES)
        times.append(time.perf_counter() - start)
    return size / statistics.median(times)


def main(reserved: int) -> None:
    """Measure and print the result.

    Raises:
        KernelUnavailableError: the library is missing.
    """
    team.start(reserved)
    weights = [PackedWeights(torch.full((_ROWS, _K // 8), 0x3A5C7E19, dtype=torch.int32),
                             torch.full((_ROWS, _K // _GROUP), 0.01, dtype=torch.bfloat16)) for _ in range(_MATRICES)]

    def multiply(x: torch.Tensor, y: torch.Tensor, number: int) -> None:
        products.linear(weights[number], x, out=y)

    result = {"read": rate(lambda number: products.read(weights[number].codes), weights[0].codes.nbytes)}
    for tokens in (1, 8):
        x, y = torch.ones(tokens, _K, dtype=torch.bfloat16), torch.empty(tokens, _ROWS, dtype=torch.bfloat16)
        result[f"tokens_{tokens}"] = rate(partial(multiply, x, y), weights[0].nbytes)
    print(json.dumps({name: round(value) for name, value in result.items()}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
