"""Compares experts in host memory with all experts resident on a GPU: same weights and tokens, passes of all sizes.

Absent experts are copied to the GPU, or computed on the CPU, eagerly and from a CUDA graph; INT4, and MXFP4 with
biases.
The repacked experts are compared with vLLM's own, bit by bit. Then what the parts take.
usage: expert_cache.py OUT.json [LAYERS [speeds]]      with vLLM and src/ reachable
LAYERS: of which speeds are measured; `speeds`: nothing else.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig, MoEActivation
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_fp4
from vllm.scalar_type import scalar_types

from shoehorn_vllm.hybrid.expert_cache import CacheOptions, ExpertCache
from shoehorn_vllm.hybrid.expert_sharing import Sharing
from shoehorn_vllm.hybrid.expert_store import ExpertStore
from shoehorn_vllm.hybrid.expert_waves import Waves
from shoehorn_vllm.hybrid.kernel import library
from shoehorn_vllm.hybrid.kernel.products import ExpertWeights, PackedWeights
from shoehorn_vllm.telemetry.expert_lookups import Lookups

PASSES = (1, 2, 4, 5, 8, 300, 3, 40, 512, 512, 1, 8, 33)
LAYERS = 4
CASES = ({"slots": 8, "scratch": 3}, {"slots": 44, "divided": 11}, {"slots": 127, "divided": 20}, {"slots": 128},
         {"slots": 1, "computed": 64}, {"slots": 44, "computed": 40}, {"slots": 127, "computed": 8, "fills": 2})


@dataclass(frozen=True)
class Kind:
    """Experts of one format and size."""

    name: str
    experts: int
    hidden: int
    inner: int
    each: int
    group: int
    mxfp4: bool = False

    @property
    def activation(self) -> str:
        return "swigluoai" if self.mxfp4 else "silu"

    def store(self, fill: bool = True) -> ExpertStore:
        """Random experts in host memory, or zeros."""
        with torch.device("meta"):
            shapes = {"up_packed": (2 * self.inner, self.hidden), "down_packed": (self.hidden, self.inner)}
            tensors: dict[str, torch.Tensor] = {}
            for name, (rows, k) in shapes.items():
                tensors[name] = torch.empty(self.experts, rows, k // 2, dtype=torch.uint8) if self.mxfp4 else \
                    torch.empty(self.experts, rows, k // 8, dtype=torch.int32)
                tensors[name.replace("packed", "scale")] = torch.empty(
                    self.experts, rows, k // self.group, dtype=torch.uint8 if self.mxfp4 else torch.bfloat16)
            if self.mxfp4:
                tensors |= {"up_bias": torch.empty(self.experts, 2 * self.inner, dtype=torch.bfloat16),
                            "down_bias": torch.empty(self.experts, self.hidden, dtype=torch.bfloat16)}
        store = ExpertStore(tensors)
        if fill:
            store.data.random_(0, 256)
        for name, part in store.parts.items() if fill else ():
            view = store.view(name)
            if name.endswith("scale"):
                view.copy_(torch.randint(115, 121, view.shape).to(torch.uint8) if self.mxfp4 else
                           torch.rand(view.shape) * 0.02)
            elif part.dtype == torch.bfloat16:
                view.copy_(torch.randn(view.shape) * 0.1)
        return store

    def weights(self, store: ExpertStore) -> ExpertWeights:
        """The CPU's view."""
        up, down = (PackedWeights(store.view(f"{name}_packed"), store.view(f"{name}_scale")) for name in ("up", "down"))
        biases = (store.view("up_bias"), store.view("down_bias")) if self.mxfp4 else (None, None)
        return ExpertWeights(up, down, self.activation, *biases)

    def repacked(self, store: ExpertStore, device: torch.device) -> dict[str, torch.Tensor]:
        """All experts as vLLM repacks them."""
        result = {}
        for name, rows, k in (("up", 2 * self.inner, self.hidden), ("down", self.hidden, self.inner)):
            codes = store.view(f"{name}_packed").to(device).contiguous().view(torch.int32).transpose(1, 2).contiguous()
            result[f"{name}_packed"] = ops.gptq_marlin_moe_repack(codes, k, rows, 4)
            scales = store.view(f"{name}_scale").to(device)
            if self.mxfp4:
                scales = scales.contiguous().view(torch.float8_e8m0fnu).to(torch.bfloat16)
            permuted = marlin_utils.marlin_moe_permute_scales(scales.transpose(1, 2).contiguous(), k, rows, self.group)
            if self.mxfp4:
                permuted = torch.stack([marlin_utils_fp4.mxfp4_marlin_process_scales(one) for one in permuted])
                result[f"{name}_bias"] = torch.stack([marlin_utils.marlin_permute_bias(one) for one in store.view(
                    f"{name}_bias").to(device)])
            result[f"{name}_scale"] = permuted
        return result

    def multiply(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, router: torch.Tensor,
                 ids: torch.Tensor, experts: int = -1, mapping: torch.Tensor | None = None) -> torch.Tensor:
        """vLLM's kernel."""
        number = scalar_types.float4_e2m1f if self.mxfp4 else scalar_types.uint4b8
        more: dict[str, Any] = {"activation": MoEActivation.SWIGLUOAI, "activation_config": ApplyMoEActivationConfig(
            clamp_limit=7.0, alpha=1.702, beta=1.0)} if self.mxfp4 else {}
        scales = [tensors[f"{name}_scale"] for name in ("up", "down")]
        if self.mxfp4:
            scales = [scale.view(torch.float8_e8m0fnu) for scale in scales]
        result: torch.Tensor = fused_marlin_moe(
            x, tensors["up_packed"], tensors["down_packed"], tensors.get("up_bias"), tensors.get("down_bias"), *scales,
            router, ids, number.id, global_num_experts=experts, expert_map=mapping, **more)
        return result


SMALL = (Kind("int4", 128, 512, 256, 8, 128), Kind("mxfp4", 32, 512, 256, 4, 32, True))
QWEN = Kind("qwen3-30b-a3b", 128, 2048, 768, 8, 128)


class Layers:
    """Some layers of a model with one configuration of the cache."""

    def __init__(self, kind: Kind, options: CacheOptions, stores: list[ExpertStore], device: torch.device) -> None:
        self.kind, self.waves = kind, Waves(stores[0], options.scratch, device)
        self.sharing = Sharing(options.computed, kind.each, options.fills, device) if options.computed else None
        self.caches: list[ExpertCache] = []
        self._lookups = Lookups("cpu")
        for store in stores:
            if self.sharing:
                self.sharing.add_weights(kind.weights(store))
            self.caches.append(ExpertCache(store, options, self._lookups.row(), self.waves, self.sharing, device))
        if self.sharing:
            self.sharing.start()

    def run(self, number: int, x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        cache = self.caches[number]

        def kernel(part: slice, choices: torch.Tensor, mapping: torch.Tensor | None, count: int,
                   scratch: bool) -> torch.Tensor:
            tensors = self.waves.scratch if scratch else cache.tensors
            return self.kind.multiply(tensors, x[part], router[part], choices, count, mapping)

        return cache.run(x, ids, router, kernel)

    def close(self) -> None:
        if self.sharing:
            torch.cuda.synchronize()
            library.load().mailbox_stop()


def draw(kind: Kind, tokens: int, device: torch.device, skew: float = 0.0) -> tuple[torch.Tensor, ...]:
    """(x, router weights, ids); with a skew low numbers are chosen more often."""
    favour = -skew * torch.arange(1, kind.experts + 1, device=device).log()
    noise = -(-torch.rand(tokens, kind.experts, device=device).log()).log()
    ids = (favour + noise).topk(kind.each).indices.to(torch.int32)
    x = torch.randn(tokens, kind.hidden, device=device, dtype=torch.bfloat16)
    return x, torch.softmax(torch.rand(tokens, kind.each, device=device), 1), ids


def difference(y: torch.Tensor, right: torch.Tensor) -> float:
    return float((y.float() - right.float()).norm() / right.float().norm())


def compare(kind: Kind, device: torch.device) -> list[dict[str, Any]]:
    """Every pass through every layer, in every configuration."""
    results = []
    stores = [kind.store() for _ in range(LAYERS)]
    whole = [kind.repacked(store, device) for store in stores]
    for case in CASES:
        options = CacheOptions(**{**case, "slots": min(case["slots"], kind.experts)})
        layers = Layers(kind, options, stores, device)
        for number, cache in enumerate(layers.caches):
            for name, tensor in cache.tensors.items():
                right = whole[number][name][:cache.slots]
                assert torch.equal(tensor.view(torch.uint8), right.view(torch.uint8)), (kind.name, name)
        worst = 0.0
        for tokens in PASSES * 3:
            for number in range(LAYERS):
                x, router, ids = draw(kind, tokens, device, 1.0)
                right = kind.multiply(whole[number], x, router, ids)
                worst = max(worst, difference(layers.run(number, x, router, ids), right))
        results.append({"kind": kind.name, **case, "worst_relative_difference": worst,
                        "lookups": [cache.lookups() for cache in layers.caches]})
        if options.slots < kind.experts and (options.computed or options.slots >= kind.each):
            results[-1]["graph"] = replayed(layers, whole, device)
        layers.close()
        print(json.dumps(results[-1]), flush=True)
        assert max(worst, results[-1].get("graph", 0.0)) < 0.02, results[-1]
    return results


def replayed(layers: Layers, whole: list[dict[str, torch.Tensor]], device: torch.device) -> float:
    """The worst difference of all layers in a CUDA graph."""
    kind, tokens, worst = layers.kind, 1, 0.0
    inputs = [draw(kind, tokens, device) for _ in range(LAYERS)]

    def forward() -> list[torch.Tensor]:
        return [layers.run(number, *inputs[number]) for number in range(LAYERS)]

    forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = forward()
    for turn in range(50):
        for number in range(LAYERS):
            for old, new in zip(inputs[number], draw(kind, tokens, device, 1.5), strict=True):
                old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        worst = max([worst, *(difference(outputs[number], kind.multiply(whole[number], *inputs[number]))
                              for number in range(LAYERS))])
        assert worst < 0.05, (turn, worst)
    return worst


def timed(call: Callable[[], Any], rounds: int) -> float:
    """Milliseconds of a call."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(rounds):
        call()
    torch.cuda.synchronize()
    return round((time.perf_counter() - begin) / rounds * 1e3, 3)


WAYS = {"copied, 48 slots": CacheOptions(48, 16, 12), "computed, 1 slot": CacheOptions(1, 16, 0, 256),
        "computed, 48 slots, no fills": CacheOptions(48, 16, 0, 256, 0),
        "computed, 48 slots": CacheOptions(48, 16, 0, 256, 2),
        "copied, 48 slots, waves of 32": CacheOptions(48, 32, 12)}


def speeds(device: torch.device, count: int, whole: dict[str, Any], out: Path) -> None:
    """Milliseconds of all experts of `count` layers of Qwen3-30B-A3B, uniform and skewed routing."""
    kind, result = QWEN, whole.setdefault("speeds", {"layers": count})
    stores = [kind.store(fill=False) for _ in range(count)]
    result["expert_bytes"] = stores[0].expert_bytes
    waves = Waves(stores[0], 16, device)
    places, counters = torch.arange(16, dtype=torch.int32, device=device), torch.tensor([0, 0, 0, 16], device=device)
    stage = torch.zeros(16, stores[0].expert_bytes, dtype=torch.uint8, device=device)
    result["repack of 16 experts, ms"] = timed(
        lambda: waves.repacker.run(stage, waves.scratch, places, counters, 0, 16), 50)
    codes = torch.zeros(16, 2048 // 8, 1536, dtype=torch.int32, device=device)
    result["vLLM's repack of 16 gate and up matrices, ms"] = timed(
        lambda: ops.gptq_marlin_moe_repack(codes, 2048, 1536, 4), 50)
    for name, options in WAYS.items():
        layers = Layers(kind, options, stores, device)
        for tokens in (1, 2, 4, 8, 16, 32):
            for skew in (0.0, 1.2) if tokens in (1, 8) else (0.0,):
                if options.computed or tokens <= options.divided:
                    result[f"{name}: {tokens} tokens, skew {skew}"] = replay_speed(layers, tokens, skew, device)
        for tokens in (64, 128, 256, 512, 2048):
            inputs = [draw(kind, tokens, device) for _ in range(count)]

            def forward(layers: Layers = layers, inputs: list[tuple[torch.Tensor, ...]] = inputs) -> None:
                for number in range(count):
                    layers.run(number, *inputs[number])

            result[f"{name}: {tokens} tokens, eager"] = timed(forward, 4)
        layers.close()
        print(json.dumps(result, indent=1), flush=True)
        out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def replay_speed(layers: Layers, tokens: int, skew: float, device: torch.device) -> dict[str, float]:
    """Milliseconds of a replayed pass with other inputs each time, and the share of absent experts."""
    count, rounds = len(layers.caches), 40
    drawn = [[torch.stack(part) for part in zip(*(draw(layers.kind, tokens, device, skew) for _ in range(count)),
                                                strict=True)] for _ in range(rounds)]
    inputs = [part.clone() for part in drawn[0]]

    def forward() -> None:
        for number in range(count):
            layers.run(number, *(part[number] for part in inputs))

    forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    turn = iter(range(10**6))

    def step() -> None:
        now = next(turn) % rounds
        for old, new in zip(inputs, drawn[now], strict=True):
            old.copy_(new)
        graph.replay()

    timed(step, 400 if skew else 40)  # hot experts take their slots
    before = [cache.lookups() for cache in layers.caches]
    spent = timed(step, 80)
    after = [cache.lookups() for cache in layers.caches]
    needed, absent = (sum(new[i] - old[i] for old, new in zip(before, after, strict=True)) for i in (0, 1))
    return {"ms": spent, "absent": round(absent / needed, 3)}


def main() -> None:
    """Compare, and measure with that many layers."""
    device, out, count = torch.device("cuda"), Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 16
    torch.manual_seed(0)
    torch.zeros(1, device=device)
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "compared": []}
    for part in SMALL if "speeds" not in sys.argv else ():
        result["compared"] += compare(part, device)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if count:
        speeds(device, count, result, out)


if __name__ == "__main__":
    main()
