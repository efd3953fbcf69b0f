"""Measure INT4 products of few rows on a GPU: each kernel that vLLM offers, torch's, gemlite's and Shoehorn's own.

The four matrices of a 70B layer, symmetric, in groups of 128 and 64. A CUDA graph has the calls of one kernel, over
weights that together exceed the L2 cache, so each product reads its weights from memory. Rates are bytes of weights and
scales by time, and their share of the bandwidth of a read on the same GPU.

usage: int4_kernels.py OUT.json [--kernels NAME ...] [--rows N ...]      on a GPU, with vLLM and src/ reachable
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME / "src"))

SHAPES = {"qkv": (8192, 10240), "o": (8192, 8192), "gate_up": (8192, 57344), "down": (28672, 8192)}  # k, n
ROWS = (1, 2, 4, 8, 16, 32)
LARGE_ROWS = (64, 512, 2048)
GROUPS = (128, 64)
VLLM = ("Machete", "Marlin", "Humming", "Conch", "TritonW4A16", "CutlassW4A8", "Exllama")
OTHERS = ("torch", "gemlite", "shoehorn-machete", "shoehorn-marlin")
ROTATED_BYTES = 400 << 20  # eight times an H100's L2 cache
_UNSUITABLE = (ValueError, RuntimeError, AssertionError, ImportError, TypeError, AttributeError, KeyError)
"""What kernels raise that do not support a matrix, or are not installed."""

Product = Callable[[torch.Tensor], torch.Tensor]


def random_weights(k: int, n: int, group: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed codes [n, k / 8] int32 and scales [n, k / group], as a checkpoint holds them."""
    codes = torch.randint(-2**31, 2**31, (n, k // 8), dtype=torch.int32, device="cuda")
    return codes, (torch.rand(n, k // group, device="cuda") * 0.01 + 0.005).to(dtype)


def reference(codes: torch.Tensor, scales: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return x @ W in fp32."""
    parts = []
    for some_codes, some_scales in zip(codes.split(4096), scales.split(4096), strict=True):
        shifts = torch.arange(0, 32, 4, device="cuda", dtype=torch.int32)
        numbers = ((some_codes.unsqueeze(-1) >> shifts) & 15).flatten(1).float() - 8
        group = numbers.shape[1] // some_scales.shape[1]
        parts.append(x.float() @ (numbers * some_scales.float().repeat_interleave(group, 1)).t())
    return torch.cat(parts, 1)


def vllm_product(name: str, k: int, n: int, group: int, codes: torch.Tensor, scales: torch.Tensor,
                 dtype: torch.dtype) -> Product:
    """Return a layer's product by a kernel of vLLM; raises ValueError with vLLM's reason if it does not fit."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
    from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
    from vllm.scalar_type import scalar_types

    activations, weight_type = dtype, scalar_types.uint4b8
    if name == "CutlassW4A8":
        activations, weight_type = torch.float8_e4m3fn, scalar_types.int4
    config = MPLinearLayerConfig((k, n), (k, n), weight_type, activations, group, False, dtype)
    kernel_type = getattr(linear, f"{name}LinearKernel")
    fits, reason = kernel_type.can_implement(config)
    if not fits:
        raise ValueError(str(reason))
    layer = torch.nn.Module()
    layer.params_dtype, layer.input_size_per_partition, layer.output_size_per_partition = dtype, k, n
    layer.output_partition_sizes, layer.input_size, layer.output_size = [n], k, n
    layer.bias = None
    layer.register_parameter("weight_packed", PackedvLLMParameter(
        input_dim=1, output_dim=0, packed_dim=1, packed_factor=8, weight_loader=print, data=codes.clone()))
    layer.register_parameter("weight_scale", GroupQuantScaleParameter(
        input_dim=1, output_dim=0, weight_loader=print, data=scales.clone()))
    kernel = kernel_type(config, w_q_param_name="weight_packed", w_s_param_name="weight_scale",
                         w_zp_param_name="weight_zero_point")
    kernel.process_weights_after_loading(layer)
    return lambda x: kernel.apply_weights(layer, x)


def own_product(name: str, k: int, n: int, group: int, codes: torch.Tensor, scales: torch.Tensor) -> Product:
    """Return the product of shoehorn_vllm.int4; its variant follows the name of the layout, as machete:1,1,8,2."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_scales
    from vllm.scalar_type import scalar_types

    from shoehorn_vllm.int4 import decode

    layout, _, numbers = name.partition(":")
    if layout == "machete":
        weights = ops.machete_prepack_B(codes.t(), scales.dtype, scalar_types.uint4b8, scales.dtype)
        laid_out = scales.t().contiguous()
    else:
        weights = ops.gptq_marlin_repack(codes.t().contiguous(), size_k=k, size_n=n, num_bits=4)
        laid_out = marlin_permute_scales(scales.t().contiguous(), k, n, group)
    variant = decode.Variant(*map(int, numbers.split(","))) if numbers else decode.DECODE
    kernel = _compiled(decode.Layout(layout), variant, group, scales.dtype)
    arrivals = decode.counters(n, weights.device)
    return lambda x: kernel.multiply(x, weights, laid_out, arrivals, n)


def most_rows(name: str) -> int:
    """Return the rows of a variant of shoehorn_vllm.int4."""
    _, _, numbers = name.partition(":")
    return 8 * int(numbers.split(",")[0] if numbers else 1)


@functools.cache
def _compiled(layout: Any, variant: Any, group: int, dtype: torch.dtype) -> Any:
    from shoehorn_vllm.int4 import decode

    return decode.Kernel(variant, layout, group, dtype, torch.device("cuda", torch.cuda.current_device()))


def torch_product(group: int, codes: torch.Tensor, scales: torch.Tensor) -> Product:
    """Return torch's _weight_int4pack_mm; its zero is 8 and its bytes hold two codes, the even one high."""
    shifts = torch.arange(0, 32, 4, device="cuda", dtype=torch.int32)
    numbers = ((codes.unsqueeze(-1) >> shifts) & 15).flatten(1).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(numbers[:, ::2] << 4 | numbers[:, 1::2], 8)
    with_zeros = torch.stack((scales, torch.zeros_like(scales)), -1).transpose(0, 1).contiguous()
    return lambda x: torch._weight_int4pack_mm(x, packed, group, with_zeros)


def gemlite_product(k: int, n: int, group: int, codes: torch.Tensor, scales: torch.Tensor) -> Product:
    """Return gemlite's layer with its configurations for the GPU, without a search."""
    from gemlite.core import DType, GemLiteLinearTriton, set_autotune

    set_autotune("fast")
    shifts = torch.arange(0, 32, 4, device="cuda", dtype=torch.int32)
    numbers = ((codes.unsqueeze(-1) >> shifts) & 15).flatten(1).to(torch.uint8)
    layer = GemLiteLinearTriton(4, group_size=group, in_features=k, out_features=n,
                                input_dtype=DType.BF16, output_dtype=DType.BF16)
    layer.pack(numbers, scales, 8, None)
    return lambda x: layer(x)


def make(name: str, k: int, n: int, group: int, codes: torch.Tensor, scales: torch.Tensor) -> Product:
    """Return a kernel's product."""
    if name in VLLM:
        return vllm_product(name, k, n, group, codes, scales, scales.dtype)
    if name == "torch":
        return torch_product(group, codes, scales)
    if name == "gemlite":
        return gemlite_product(k, n, group, codes, scales)
    return own_product(name.removeprefix("shoehorn-"), k, n, group, codes, scales)


def seconds(products: list[Product], x: torch.Tensor, replays: int = 10) -> float:
    """Return the seconds of one product, from a CUDA graph of one call of each."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for product in products[:2]:
            product(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [product(x) for product in products]
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    del outputs
    return float(begin.elapsed_time(end)) / 1e3 / replays / len(products)


def read_bandwidth() -> float:
    """Return the bytes per second of a sum over 8 GB, the best of three."""
    big = torch.empty(2 << 30, dtype=torch.float32, device="cuda").normal_()
    best = 0.0
    for _ in range(3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        big.sum()
        begin.record()
        for _ in range(5):
            big.sum()
        end.record()
        torch.cuda.synchronize()
        best = max(best, 5 * big.numel() * 4 / begin.elapsed_time(end) * 1e3)
    return best


def measure(name: str, rows: tuple[int, ...], shapes: tuple[str, ...], groups: tuple[int, ...],
            ) -> Iterator[dict[str, Any]]:
    """Yield one record for each matrix, group and number of rows."""
    dtype = torch.float16 if name == "Exllama" else torch.bfloat16
    torch.manual_seed(0)
    for group in groups:
        for shape in shapes:
            k, n = SHAPES[shape]
            codes, scales = random_weights(k, n, group, dtype)
            size = codes.nbytes + scales.nbytes
            record = {"kernel": name, "shape": shape, "group": group, "bytes": size}
            begun = time.monotonic()
            try:
                first = make(name, k, n, group, codes, scales)
                x = torch.randn(3, k, device="cuda", dtype=dtype)
                right = reference(codes, scales, x)
                record["difference"] = round(float((first(x).float() - right).norm() / right.norm()), 5)
                products = [first] + [make(name, k, n, group, *random_weights(k, n, group, dtype))
                                      for _ in range(max(2, -(-ROTATED_BYTES // size)) - 1)]
                record["prepare_seconds"] = round(time.monotonic() - begun, 2)
                record["microseconds"] = {}
                for count in rows:
                    if name.startswith("shoehorn") and count > most_rows(name):
                        continue
                    took = seconds(products, torch.randn(count, k, device="cuda", dtype=dtype))
                    record["microseconds"][str(count)] = round(took * 1e6, 2)
                del products
            except _UNSUITABLE as error:
                record["error"] = f"{type(error).__name__}: {error}"[:400]
            torch.cuda.empty_cache()
            yield record


def machete_schedules() -> Iterator[dict[str, Any]]:
    """Yield one record for each matrix and schedule of Machete at one row."""
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    names = ops.machete_supported_schedules(torch.bfloat16, scalar_types.uint4b8, group_scales_type=torch.bfloat16)
    for shape, (k, n) in SHAPES.items():
        layers = []
        for _ in range(max(2, -(-ROTATED_BYTES // (k * n // 2)))):
            codes, scales = random_weights(k, n, 128, torch.bfloat16)
            layers.append((ops.machete_prepack_B(codes.t(), torch.bfloat16, scalar_types.uint4b8, torch.bfloat16),
                           scales.t().contiguous()))
        times = {}
        for schedule in names:
            products = [lambda x, w=w, s=s, schedule=schedule: ops.machete_mm(
                a=x, b_q=w, b_type=scalar_types.uint4b8, b_group_scales=s, b_group_size=128, schedule=schedule)
                for w, s in layers]
            times[schedule] = round(seconds(products, torch.randn(1, k, device="cuda", dtype=torch.bfloat16)) * 1e6, 2)
        yield {"kernel": "Machete schedules, 1 row", "shape": shape, "group": 128,
               "bytes": int(k * n * (0.5 + 2 / 128)), "microseconds_by_schedule": times}


def _child(name: str, rows: tuple[int, ...], shapes: tuple[str, ...], groups: tuple[int, ...],
           records: multiprocessing.connection.Connection) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    init_distributed_environment(1, 0, "tcp://127.0.0.1:29551", 0, "gloo")
    with set_current_vllm_config(VllmConfig()):
        initialize_model_parallel(1, 1)
        if name == "bandwidth":
            records.send({"gpu": torch.cuda.get_device_name(), "read_bytes_per_second": read_bandwidth()})
        else:
            for record in machete_schedules() if name == "schedules" else measure(name, rows, shapes, groups):
                records.send(record)


def run(name: str, rows: tuple[int, ...], shapes: tuple[str, ...], groups: tuple[int, ...],
        limit: float) -> Iterator[dict[str, Any]]:
    """Yield the records of one kernel, measured in a process of its own that has `limit` seconds."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_child, args=(name, rows, shapes, groups, sender))
    process.start()
    sender.close()
    end = time.monotonic() + limit
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            yield receiver.recv()
        yield {"kernel": name, "error": f"timed out after {limit:.0f} s"}
    except EOFError:
        process.join()
        if process.exitcode:
            yield {"kernel": name, "error": f"exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def main() -> None:
    """Measure the kernels and write the records as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kernels", nargs="+", default=[*VLLM, *OTHERS])
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--groups", type=int, nargs="+", default=list(GROUPS))
    parser.add_argument("--limit", type=float, default=40.0, help="seconds of one kernel")
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"records": []}
    results["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    import vllm.model_executor.kernels.linear  # noqa: F401  # imported once: each kernel is measured in a fork

    rows, shapes, groups = tuple(arguments.rows), tuple(arguments.shapes), tuple(arguments.groups)
    for name in (*([] if "gpu" in results else ["bandwidth"]), *arguments.kernels):
        begun = time.monotonic()
        for record in run(name, rows, shapes, groups, arguments.limit):
            if "gpu" in record:
                results |= record
            else:
                best = float(results.get("read_bytes_per_second") or 0)
                if best and "microseconds" in record:
                    record["share"] = {count: round(record["bytes"] / took * 1e6 / best, 3)
                                       for count, took in record["microseconds"].items()}
                results["records"].append(record)
            print(json.dumps(record), flush=True)
            arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {time.monotonic() - begun:.1f} s", flush=True)


if __name__ == "__main__":
    main()
