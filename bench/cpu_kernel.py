"""Measure how fast the CPU kernel reads 4-bit weights, with memory and other kernels in the same run.

For each number of threads: the bandwidth at which the same threads read memory, then GB/s of weights (codes and
scales) for each number of tokens, for our kernel with each instruction set, for torch's INT4 kernel and, where vLLM's
CPU build is installed, for its own. Matrices take turns, more bytes than caches hold; the median of the calls
counts. Then a layer of experts with the shapes of Qwen3-30B-A3B: GB/s over the chosen experts' bytes.
usage: bench/cpu_kernel.py [--threads 1,2,4] [--tokens 1,2,4,8,16] [--isas avx2,avx512vnni] [--gib 1.5] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shoehorn_vllm.hybrid.kernel import cpus, library, products, team
from shoehorn_vllm.hybrid.kernel.library import Isa
from shoehorn_vllm.hybrid.kernel.products import ExpertWeights, PackedWeights

RESULTS = Path(__file__).resolve().parent / "results"
ROWS, K, GROUP = 14336, 8192, 128
EXPERTS, TOP_K, HIDDEN, INNER = 128, 8, 2048, 768
ROUNDS = 2


def rate(call: Callable[[int], Any], count: int, size: float) -> float:
    """GB/s of `call(number)`, the median over all numbers and rounds."""
    call(0)
    times = []
    for number in range(count * ROUNDS):
        start = time.perf_counter()
        call(number % count)
        times.append(time.perf_counter() - start)
    return round(size / statistics.median(times) / 1e9, 1)


def random_weights(*shape: int) -> PackedWeights:
    """Weights of [..., rows, k], groups of 128."""
    codes = torch.randint(-2**31, 2**31, (*shape[:-1], shape[-1] // 8), dtype=torch.int32)
    scales = torch.rand(*shape[:-1], shape[-1] // GROUP).mul_(0.01).add_(0.01).to(torch.bfloat16)
    return PackedWeights(codes, scales)


def torchs(weights: list[PackedWeights], tokens: list[int]) -> dict[str, float]:
    """GB/s of torch's INT4 kernel."""
    random = torch.randint(0, 16, (ROWS, K), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(random, 1)
    copies, scales = [packed.clone() for _ in weights], torch.rand(K // GROUP, ROWS, 2).to(torch.bfloat16)

    def multiply(x: torch.Tensor, number: int) -> None:
        torch.ops.aten._weight_int4pack_mm_for_cpu(x, copies[number], GROUP, scales)

    return {str(count): rate(partial(multiply, torch.randn(count, K).to(torch.bfloat16)), len(copies),
                             weights[0].nbytes) for count in tokens}


def vllms(weights: list[PackedWeights], tokens: list[int]) -> dict[str, float] | None:
    """GB/s of vLLM's kernel for the CPU, as its linear layers call it; None where it is not installed."""
    try:
        from vllm import _custom_ops as ops
        from vllm.model_executor.kernels.linear.mixed_precision.cpu import _get_isa_hint
    except ImportError:
        return None
    copies = [w.codes.view(ROWS // 16, K * 2) for w in weights]  # in its blocks of 16 rows
    scales, hint = torch.rand(K // GROUP, ROWS).to(torch.bfloat16), _get_isa_hint(torch.bfloat16)

    def multiply(x: torch.Tensor, number: int) -> None:
        ops.cpu_gemm_wna16(input=x, q_weight=copies[number], scales=scales, zeros=None, bias=None, pack_factor=8,
                           isa_hint=hint)

    return {str(count): rate(partial(multiply, torch.randn(count, K).to(torch.bfloat16)), len(copies),
                             weights[0].nbytes) for count in tokens}


def dense(weights: list[PackedWeights], isas: list[Isa], tokens: list[int]) -> dict[str, Any]:
    """Our kernel with the threads that were started, and the memory before and after."""

    def read(number: int) -> None:
        products.read(weights[number].codes)

    def multiply(isa: Isa, x: torch.Tensor, y: torch.Tensor, number: int) -> None:
        products.linear(weights[number], x, out=y, isa=isa)

    before = rate(read, len(weights), weights[0].codes.nbytes)
    speeds = {isa.name.lower(): {str(count): rate(
        partial(multiply, isa, torch.randn(count, K).bfloat16(), torch.empty(count, ROWS, dtype=torch.bfloat16)),
        len(weights), weights[0].nbytes) for count in tokens} for isa in isas}
    after = rate(read, len(weights), weights[0].codes.nbytes)
    return {"read": max(before, after), "read_before_and_after": [before, after], **speeds}


def mixture(layers: list[ExpertWeights], isas: list[Isa], tokens: list[int]) -> dict[str, Any]:
    """GB/s over the chosen experts, and milliseconds a layer."""

    def multiply(isa: Isa, x: torch.Tensor, router: torch.Tensor, draws: list[torch.Tensor], number: int) -> None:
        products.experts(layers[number % len(layers)], x, router, draws[number], isa=isa)

    result: dict[str, Any] = {}
    for count in tokens:
        x, router = torch.randn(count, HIDDEN).to(torch.bfloat16), torch.rand(count, TOP_K)
        draws = [torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(count)]).int() for _ in range(16)]
        active = statistics.mean(len(draw.unique()) for draw in draws) / EXPERTS
        size = active * (layers[0].up.nbytes + layers[0].down.nbytes)
        for isa in isas:
            speed = rate(partial(multiply, isa, x, router, draws), len(draws), size)
            result.setdefault(isa.name.lower(), {})[str(count)] = {
                "gb_per_s": speed, "ms": round(size / speed / 1e6, 2)}
    return result


def cpu_name() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    """Measure, print a line for each number of threads, write the result."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", default="")
    options.add_argument("--tokens", default="1,2,4,8,16")
    options.add_argument("--isas", default="")
    options.add_argument("--gib", type=float, default=1.5, help="bytes that take turns")
    options.add_argument("--others", default="", help="numbers of threads that torch's and vLLM's kernels are run with")
    options.add_argument("--out", type=Path, default=RESULTS / "cpu-kernel.json")
    arguments = options.parse_args()
    choice = cpus.choose(cpus.present(), 0)
    threads = [int(count) for count in arguments.threads.split(",") if count] or [len(choice.cpus)]
    tokens = [int(count) for count in arguments.tokens.split(",")]
    isas = [Isa[name.upper()] for name in arguments.isas.split(",") if name] or [
        isa for isa in library.supported_isas() if isa]
    weights = [random_weights(ROWS, K) for _ in range(round(arguments.gib * 2**30 / (ROWS * K / 2)))]
    layers = [ExpertWeights(random_weights(EXPERTS, 2 * INNER, HIDDEN), random_weights(EXPERTS, HIDDEN, INNER))
              for _ in range(max(2, round(arguments.gib)))]
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "cpu": cpu_name(), "logical_cpus": os.cpu_count(),
        "physical_cores": choice.physical_cores, "torch": torch.__version__, "python": platform.python_version(),
        "load_before": os.getloadavg()[0], "unit": "GB/s",
        "shape": {"rows": ROWS, "k": K, "group": GROUP, "matrices": len(weights)}, "threads": {}}
    for count in threads:
        team.start(reserved=0, threads=count)
        row = dense(weights, isas, tokens)
        row["experts"] = mixture(layers, isas, tokens)
        team.stop()
        if not arguments.others or str(count) in arguments.others.split(","):
            torch.set_num_threads(count)
            row |= {"torch": torchs(weights, tokens), "vllm": vllms(weights, tokens)}
        result["threads"][str(count)] = row
        print(count, json.dumps(row), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
