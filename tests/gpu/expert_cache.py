"""Compares the expert cache with all experts resident on a GPU: same kernel, weights and tokens, passes of all sizes.

usage: expert_cache.py OUT.json      with vLLM and src/ reachable
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
from vllm.scalar_type import scalar_types
from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

from shoehorn_vllm.hybrid.expert_cache import ExpertCache
from shoehorn_vllm.hybrid.expert_waves import Tensors, Waves

EXPERTS, HIDDEN, INNER, EACH, GROUP, LAYERS = 128, 512, 256, 8, 128, 4
PASSES = (1, 2, 4, 5, 8, 300, 3, 40, 512, 512, 1, 8, 33)


def experts() -> Tensors:
    """Random experts in pinned host memory, in Marlin's layout, as device views."""
    def packed(*shape: int) -> torch.Tensor:
        return torch.randint(-2**31, 2**31 - 1, shape, dtype=torch.int32).pin_memory()

    def scales(*shape: int) -> torch.Tensor:
        return (torch.rand(shape) * 0.02).to(torch.bfloat16).pin_memory()

    return tuple(packed_or_scale for packed_or_scale in (
        packed(EXPERTS, HIDDEN // 16, INNER * 4), scales(EXPERTS, HIDDEN // GROUP, 2 * INNER),
        packed(EXPERTS, INNER // 16, HIDDEN * 2), scales(EXPERTS, INNER // GROUP, HIDDEN)))  # type: ignore[return-value]


def main() -> None:
    """Every pass through every layer, with several numbers of slots and sizes of scratch."""
    device, results = torch.device("cuda"), []
    for slots, size in ((8, 3), (16, 16), (44, 16), (127, 16), (128, 16)):
        torch.manual_seed(slots)
        host = [experts() for _ in range(LAYERS)]
        views: list[Any] = [tuple(get_accelerator_view_from_cpu_tensor(one) for one in layer) for layer in host]
        whole = [[one.to(device) for one in layer] for layer in host]
        waves = Waves(views[0], size, device)
        caches = [ExpertCache(view, slots, slots // 4, device, waves) for view in views]
        worst = 0.0
        for tokens in PASSES:
            x = torch.randn(tokens, HIDDEN, device=device, dtype=torch.bfloat16)
            for layer, cache in enumerate(caches):
                ids = torch.rand(tokens, EXPERTS, device=device).topk(EACH).indices.to(torch.int32)
                weights = torch.softmax(torch.rand(tokens, EACH, device=device), 1)

                def kernel(part: slice, choices: torch.Tensor, mapping: torch.Tensor | None, count: int,
                           half: int | None, cache: ExpertCache = cache, x: torch.Tensor = x,
                           weights: torch.Tensor = weights, waves: Waves = waves) -> torch.Tensor:
                    one = cache.tensors if half is None else waves.buffers[half]
                    return fused_marlin_moe(x[part], one[0], one[2], None, None, one[1], one[3], weights[part], choices,
                                            scalar_types.uint4b8.id, global_num_experts=count, expert_map=mapping)

                there = whole[layer]
                right = fused_marlin_moe(x, there[0], there[2], None, None, there[1], there[3], weights, ids,
                                         scalar_types.uint4b8.id).float()
                output = cache.run(ids, kernel).float()
                worst = max(worst, float((output - right).norm() / right.norm()))
        results.append({"slots": slots, "scratch": size, "worst_relative_difference": worst,
                        "lookups": [cache.lookups() for cache in caches]})
        assert worst < 0.01, results
    Path(sys.argv[1]).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
