"""Linear layers in host memory on a GPU: right products, hops, rates of the CPU, of streaming, and of both at once.

usage: host_layers.py OUT.json [LAYERS]      with vLLM and src/ reachable; 36 GB of host memory for 80 layers of a 70B
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shoehorn_vllm.hybrid.kernel import library, products, team
from shoehorn_vllm.hybrid.kernel.products import PackedWeights
from shoehorn_vllm.hybrid.offload.executor import Executor
from shoehorn_vllm.hybrid.offload.schedule import Level
from shoehorn_vllm.patches import pinned_memory

GROUP = 128
SHAPES = ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672))  # of a 70B's layer: rows, k
TOKENS = (1, 2, 4, 8, 16, 32)
SHARES = (0.0, 0.3, 0.6, 0.75, 1.0)


def random_weights(rows: int, k: int, group: int = GROUP) -> PackedWeights:
    """Weights in pinned memory."""
    codes = pinned_memory.allocate_like(torch.empty(rows, k // 8, dtype=torch.int32))
    codes.random_(-2**31, 2**31 - 1)
    scales = pinned_memory.allocate_like(torch.empty(rows, k // group, dtype=torch.bfloat16))
    scales.uniform_(0.005, 0.015)
    return PackedWeights(codes, scales)


def reference(weights: PackedWeights, x: torch.Tensor) -> torch.Tensor:
    """x @ weights.T in fp32, on the GPU."""
    codes = weights.codes.view(torch.uint8).to(x.device)
    values = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).float() - 8
    scales = weights.scales.to(x.device).float().repeat_interleave(weights.group, 1)
    return x.float() @ (values * scales).t()


def difference(y: torch.Tensor, right: torch.Tensor) -> float:
    """Relative distance."""
    return float((y.float() - right).norm() / right.norm())


def check(device: torch.device) -> dict[str, Any]:
    """Products of all ways against fp32, in passes of changing sizes, and from a CUDA graph."""
    worst: dict[str, float] = {"cpu": 0.0, "streamed": 0.0, "graph": 0.0}
    shapes = ((1024, 512, 128), (768, 576, 64), (512, 1024, 32), (640, 512, 128), (2048, 256, 64))
    weights = [random_weights(*shape) for shape in shapes]
    executor = Executor([Level(4, 0.0), Level(16, 0.5)], 2)
    for each in weights:
        executor.add(each)
    executor.start(device)
    for tokens in (1, 3, 16, 40, 300, 5, 1, 2, 64, 8, 8, 17, 4):
        for number, each in enumerate(weights):
            x = torch.randn(tokens, each.k, device=device, dtype=torch.bfloat16)
            kind = "cpu" if tokens <= 4 else "streamed"
            worst[kind] = max(worst[kind], difference(executor.multiply(number, x), reference(each, x)))
    x = torch.randn(2, 512, device=device, dtype=torch.bfloat16)

    def chain(x: torch.Tensor) -> torch.Tensor:
        y = executor.multiply(0, x)[:, :512].contiguous()
        return executor.multiply(3, y * 0.1)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x)
    for _ in range(5):
        x.copy_(torch.randn_like(x))
        graph.replay()
        first = reference(weights[0], x)[:, :512].bfloat16()
        torch.cuda.synchronize()
        worst["graph"] = max(worst["graph"], difference(y, reference(weights[3], first * 0.1)))
    library.load().mailbox_stop()
    return worst


def timed(call: Callable[[], Any], rounds: int) -> float:
    """Seconds of a call, the GPU's work included."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(rounds):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / rounds


def hops(device: torch.device) -> dict[str, float]:
    """Microseconds of a hop: a matrix of next to no bytes; eager and from a graph."""
    executor = Executor([Level(16, 0.0)], 2)
    for _ in range(50):
        executor.add(random_weights(64, 8192))
    executor.start(device)
    x = torch.randn(1, 8192, device=device, dtype=torch.bfloat16)

    def all_of_them() -> None:
        for number in range(50):
            executor.multiply(number, x)

    eager = timed(all_of_them, 20) / 50 * 1e6
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    replayed = timed(graph.replay, 20) / 50 * 1e6
    begin = time.perf_counter()
    for _ in range(1000):
        products.linear(executor.weights[0], torch.zeros(1, 8192, dtype=torch.bfloat16))
    product = (time.perf_counter() - begin) / 1000 * 1e6
    library.load().mailbox_stop()
    return {"eager_us": round(eager, 1), "graph_us": round(replayed, 1), "product_alone_us": round(product, 1)}


def rates(device: torch.device, layers: int) -> dict[str, Any]:
    """GB/s of weights over whole passes."""
    weights = [random_weights(*shape) for _ in range(layers) for shape in SHAPES]
    size = sum(each.nbytes for each in weights)
    began = team.current()
    result: dict[str, Any] = {"bytes": size, "threads": len(began.cpus) if began else 0}
    begin = time.perf_counter()
    for each in weights[:40]:
        products.read(each.codes)
    result["read"] = round(sum(each.codes.nbytes for each in weights[:40]) / (time.perf_counter() - begin) / 1e9, 1)
    for share in SHARES:
        executor = Executor([Level(64, share)] if share < 1 else [], 2)
        for each in weights:
            executor.add(each)
        executor.start(device)
        for tokens in TOKENS if share < 1 else (1, 32, 128, 512, 1024):
            xs = {k: torch.randn(tokens, k, device=device, dtype=torch.bfloat16) for k in (8192, 28672)}

            def forward(executor: Executor = executor, xs: dict[int, torch.Tensor] = xs) -> None:
                for number, each in enumerate(executor.weights):
                    executor.multiply(number, xs[each.k])

            result.setdefault(f"streamed_{share}", {})[str(tokens)] = round(size / timed(forward, 3) / 1e9, 1)
        print(share, result[f"streamed_{share}"], flush=True)
        library.load().mailbox_stop()
        del executor
    return result


def main() -> None:
    """Check, then measure."""
    device, out = torch.device("cuda"), Path(sys.argv[1])
    torch.zeros(1, device=device)
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "isa": library.default_isa().name.lower()}
    for name, part in (("differences", lambda: check(device)), ("hops", lambda: hops(device)),
                       ("rates", lambda: rates(device, int(sys.argv[2]) if len(sys.argv) > 2 else 16))):
        result[name] = part()
        print(name, json.dumps(result[name]), flush=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    assert max(result["differences"].values()) < 0.02


if __name__ == "__main__":
    main()
