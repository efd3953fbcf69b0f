"""Checks the kernels that divide choices between GPU and CPU and that repack experts, with Triton's interpreter.

usage: TRITON_INTERPRET=1 python expert_share_check.py SEED      with triton, torch, vLLM and src/ reachable
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import triton

from shoehorn_vllm.hybrid.expert_repack import code_order, scale_order
from shoehorn_vllm.hybrid.expert_slots import codes_kernel, share_kernel, values_kernel
from shoehorn_vllm.hybrid.expert_waves import runs

CASES = ((16, 8, 2, 4, 2), (12, 5, 1, 5, 1), (40, 1, 3, 11, 3))  # experts, slots, choices, most tokens, fills
WIDTH = 37


def integers(size: int, value: int = 0) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.int32)


def check_shares(experts: int, slots: int, each: int, most: int, fills: int, rounds: int) -> None:
    """Random passes of two layers: every choice is computed once, and hot experts take slots within the budget."""
    layers = []
    for _ in range(2):
        slot_of = integers(experts, -1)
        slot_of[:slots] = torch.arange(slots, dtype=torch.int32)
        layers.append({"slot_of": slot_of, "expert_of": torch.arange(slots, dtype=torch.int32),
                       "uses": integers(experts), "needed": integers(experts), "source": integers(1),
                       "target": integers(1), "counters": torch.zeros(4, dtype=torch.int64),
                       "report": torch.full((2,), -1)})
    left, present = integers(1, -9), integers(experts, -9)
    hot = [torch.randperm(experts)[:max(each, slots // 2)] for _ in layers]
    for now in range(1, rounds):
        moved = 0
        for number, layer in enumerate(layers):
            tokens = int(torch.randint(1, most + 1, ()))
            ids = torch.stack([hot[number][torch.randperm(len(hot[number]))[:each]] if torch.rand(()) < 0.9
                               else torch.randperm(experts)[:each] for _ in range(tokens)]).to(torch.int32)
            router, x = torch.rand(tokens, each), torch.randn(tokens, WIDTH).to(torch.bfloat16)
            host_ids, host_router = integers(tokens * each, -7), torch.full((tokens * each,), -7.0)
            host_x = torch.zeros(tokens, WIDTH, dtype=torch.bfloat16)
            before, lookups = layer["slot_of"].clone(), layer["counters"].tolist()
            share_kernel[(1 + tokens,)](
                ids, router, x, ids.numel(), layer["slot_of"], layer["expert_of"], layer["uses"], layer["needed"],
                present, layer["source"], layer["target"], layer["counters"], layer["report"], left, host_ids,
                host_router, host_x, WIDTH, EXPERTS=experts, EXPERTS_2=triton.next_power_of_2(experts), SLOTS=slots,
                SLOTS_2=triton.next_power_of_2(slots), BLOCK=16, WORDS=16, FILLS=fills, FIRST=number == 0)
            assert torch.equal(present, before), "the pass uses the slots as they were"
            flat = ids.flatten()
            assert torch.equal(host_ids, torch.where(before[flat.long()] < 0, flat, -1))
            assert torch.equal(host_router, router.flatten())
            assert torch.equal(host_x, x)
            requested = flat.unique()
            missing = int((before[requested.long()] < 0).sum())
            count, needed, lacking, moves = layer["counters"].tolist()
            assert [count, needed, lacking] == [now, lookups[1] + len(requested), lookups[2] + missing]
            assert layer["report"].tolist() == [needed, lacking]
            changed = (layer["slot_of"] != before).nonzero().flatten().tolist()
            assert moves in (0, 1)
            assert bool(moves) == bool(changed)
            moved += moves
            if moves:
                arriving, slot = int(layer["source"]), int(layer["target"])
                leaving = int((before == slot).nonzero())
                assert sorted(changed) == sorted((arriving, leaving))
                assert arriving in requested
                assert leaving not in requested, "its slot is in use in this pass"
                assert layer["uses"][arriving] > 2 * layer["uses"][leaving]
            for slot, expert in enumerate(layer["expert_of"].tolist()):
                assert int(layer["slot_of"][expert]) == slot
            assert int((layer["slot_of"] >= 0).sum()) == slots
        assert moved <= fills
    for number, layer in enumerate(layers):
        if slots >= 2 * each:
            assert (layer["slot_of"][hot[number]] >= 0).all(), "the hot experts are on the GPU"


def check_repacking(rows: int, k: int, group: int, mxfp4: bool) -> None:
    """Codes and scales of two experts, against vLLM's own permutations."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_fp4, marlin_utils_test

    numbers = torch.randint(0, 16, (2, rows, k), dtype=torch.int32)
    scales = torch.randint(100, 130, (2, rows, k // group)).to(torch.uint8) if mxfp4 else torch.rand(
        2, rows, k // group).to(torch.bfloat16)
    pairs = (numbers[..., 0::2] | numbers[..., 1::2] << 4).to(torch.uint8)
    stage = torch.cat([pairs.flatten(1), scales.view(torch.uint8).flatten(1)], 1).contiguous()
    target, counters = torch.tensor([0, 2, 0], dtype=torch.int32), torch.tensor([0, 0, 0, 3])  # the last two of three
    slots = torch.full((3, k // 16, rows * 2), -1, dtype=torch.int32)
    codes_kernel[(3, 2)](stage, slots, target, counters, torch.tensor(code_order(), dtype=torch.int32), 1,
                         stage.shape[1], 0, rows, k * rows // 8, PROGRAMS=2, BLOCK=256)
    size = scales.element_size()
    typed = torch.uint8 if size == 1 else torch.int16
    order = scale_order(group == k, mxfp4)
    values = torch.zeros(3, k // group, rows, dtype=scales.dtype)
    values_kernel[(3, 2)](stage.view(typed), values.view(typed), target, counters,
                          torch.tensor(order, dtype=torch.int32), 1, stage.shape[1] // size, pairs[0].numel() // size,
                          rows, k // group, PERIOD=len(order), PROGRAMS=2, BLOCK=64)
    for expert, slot in enumerate((2, 0)):
        right = marlin_utils_test.marlin_weights(numbers[expert].t().contiguous(), k, rows, 4,
                                                 marlin_utils_test.get_weight_perm(4))
        assert torch.equal(slots[slot], right), (rows, k, expert)
        if mxfp4:
            source = scales[expert].view(torch.float8_e8m0fnu).to(torch.bfloat16).t().contiguous()
            permuted = marlin_utils.marlin_permute_scales(source, k, rows, group)
            right = marlin_utils_fp4.mxfp4_marlin_process_scales(permuted).view(torch.uint8)
        else:
            right = marlin_utils.marlin_permute_scales(scales[expert].t().contiguous(), k, rows, group)
        assert torch.equal(values[slot].view(right.dtype), right), (rows, k, group, expert)
    assert (slots[1] == -1).all(), "a slot that is not listed is not written"
    assert not values[1].view(typed).any()


def check_runs() -> None:
    """Runs of consecutive experts cover a wave, each at its place."""
    for count in (0, 1, 5, 16, 40):
        numbers = sorted(torch.randperm(40)[:count].tolist())
        places = [-1] * count
        for place, first, last in runs(numbers):
            assert first - 1 not in numbers
            assert last not in numbers, "as few copies as possible"
            places[place:place + last - first] = range(first, last)
        assert places == numbers


def main() -> None:
    """All cases with one seed."""
    torch.manual_seed(int(sys.argv[1]))
    checks: list[Callable[[], None]] = [lambda case=case: check_shares(*case, rounds=25) for case in CASES]
    checks += [lambda shape=shape: check_repacking(*shape) for shape in (
        (128, 64, 32, False), (64, 256, 128, False), (192, 128, 128, False), (128, 96, 32, True))]
    checks.append(check_runs)
    for check in checks:
        check()
    print("ok")


if __name__ == "__main__":
    main()
