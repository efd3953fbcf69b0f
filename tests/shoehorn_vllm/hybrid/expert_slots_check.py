"""Checks the expert cache's kernels with Triton's interpreter; a program of its own, since the interpreter is chosen
when Triton is imported.

usage: TRITON_INTERPRET=1 python expert_slots_check.py SEED      with triton, torch and src/ reachable
"""

from __future__ import annotations

import sys

import torch

from shoehorn_vllm.hybrid.expert_slots import assign_kernel, copy_kernel

CASES = ((16, 8, 2, 4), (12, 5, 1, 5), (40, 33, 3, 11), (8, 8, 4, 2))  # experts, slots, choices, most tokens


def integers(size: int, value: int = 0) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.int32)


def power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def check(experts: int, slots: int, each: int, most: int, rounds: int) -> None:
    """Random passes: the cache holds what was needed, and evicts the least recently used experts."""
    slot_of, expert_of, used = integers(experts, -1), integers(slots, -1), torch.zeros(slots, dtype=torch.int64)
    needed, missing = integers(experts), integers(experts)
    source, target, counters = integers(experts), integers(experts), torch.zeros(4, dtype=torch.int64)
    report = torch.full((2,), -1)
    host, gpu = torch.randint(0, 1 << 40, (experts, 37)), torch.full((slots, 37), -1)
    stage = torch.full((3, 37), -1)
    last: dict[int, int] = {}
    lookups = copies = 0
    for now in range(1, rounds):
        ids = torch.randint(experts, (int(torch.randint(1, most + 1, ())) * each,)).tolist()
        mapped = integers(len(ids), -7)
        assign_kernel[(1,)](
            torch.tensor(ids, dtype=torch.int32), len(ids), slot_of, expert_of, used, needed, missing, source, target,
            counters, report, mapped, EXPERTS=experts, EXPERTS_2=power_of_2(experts), SLOTS=slots,
            SLOTS_2=power_of_2(slots), BLOCK=16, CHUNK=min(8, power_of_2(slots)))
        for first in range(0, min(len(ids), experts), len(stage)):  # a stage full at a time, as on the GPU
            copy_kernel[(len(stage), 2)](source, counters, host, stage, first, 37, PROGRAMS=2, WORDS=8)
            for number in range(first, min(first + len(stage), int(counters[3]))):
                gpu[target[number]] = stage[number - first]
        requested, before = set(ids), set(last)
        present = {expert for expert in expert_of.tolist() if expert >= 0}
        copied = requested - before
        lookups, copies = lookups + len(requested), copies + len(copied)
        assert requested <= present
        assert counters.tolist() == [now, lookups, copies, len(copied)]
        assert report.tolist() == [lookups, copies]
        evicted, remaining = before - present, (before & present) - requested
        assert all(last[old] <= last[young] for old in evicted for young in remaining), (evicted, remaining, last)
        last = {expert: now if expert in requested else last[expert] for expert in present}
        assert [int(expert_of[slot]) for slot in mapped] == ids
        for slot, expert in enumerate(expert_of.tolist()):
            if expert >= 0:
                assert int(slot_of[expert]) == slot
                assert torch.equal(gpu[slot], host[expert])
        assert int((slot_of >= 0).sum()) == len(present)


def main() -> None:
    """All cases with one seed."""
    torch.manual_seed(int(sys.argv[1]))
    for case in CASES:
        check(*case, rounds=12)
    print("ok")


if __name__ == "__main__":
    main()
