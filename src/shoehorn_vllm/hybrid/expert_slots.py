"""Triton kernels of the expert cache: which experts are on the GPU, and their copies over PCIe.

All decisions are made on the device, so that a pass needs no synchronization and can be captured in a CUDA graph.

Rules:
- a slot holds one expert of its layer; a slot that a pass needs is never evicted in that pass;
- the least recently used slot is evicted first;
- the host tensors are read through their device views (UVA) by wide, coalesced loads of consecutive bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def assign_kernel(
        ids, count, slot_of, expert_of, used, needed, missing, source, target, counters, mapped,
        EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, SLOTS: tl.constexpr, SLOTS_2: tl.constexpr,
        BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """One program. Gives every chosen expert a slot; `source[:n]`, `target[:n]` list the copies to make."""
    experts = tl.arange(0, EXPERTS_2)
    in_range = experts < EXPERTS
    tl.store(needed + experts, tl.zeros([EXPERTS_2], tl.int32), mask=in_range)
    tl.debug_barrier()
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        chosen = tl.load(ids + place, mask=place < count, other=-1).to(tl.int32)
        tl.store(needed + chosen, tl.full([BLOCK], 1, tl.int32), mask=(chosen >= 0) & (chosen < EXPERTS))
    tl.debug_barrier()
    requested = tl.load(needed + experts, mask=in_range, other=0)
    slot = tl.load(slot_of + experts, mask=in_range, other=0)
    lacking = ((requested == 1) & (slot < 0)).to(tl.int32)
    rank = tl.cumsum(lacking, 0) - 1
    misses = tl.sum(lacking, 0)
    tl.store(missing + rank, experts, mask=lacking == 1)
    clock = tl.load(counters) + 1
    slots = tl.arange(0, SLOTS_2)
    real = slots < SLOTS
    occupant = tl.load(expert_of + slots, mask=real, other=-1)
    busy = tl.load(needed + occupant, mask=real & (occupant >= 0), other=0) == 1
    tl.store(used + slots, tl.full([SLOTS_2], 0, tl.int64) + clock, mask=busy)
    tl.debug_barrier()
    last = tl.load(used + slots, mask=real, other=0)
    key = tl.where(real & (busy == 0), last * SLOTS_2 + slots, 0x7FFFFFFFFFFFFFFF)
    order = tl.zeros([SLOTS_2], tl.int32)
    for start in range(0, SLOTS_2, CHUNK):  # the rank of every slot among all, a chunk of the others at a time
        other = start + tl.arange(0, CHUNK)
        was = tl.load(used + other, mask=other < SLOTS, other=0)
        whose = tl.load(expert_of + other, mask=other < SLOTS, other=-1)
        taken = tl.load(needed + whose, mask=(other < SLOTS) & (whose >= 0), other=0) == 1
        rival = tl.where((other < SLOTS) & (taken == 0), was * SLOTS_2 + other, 0x7FFFFFFFFFFFFFFF)
        order += tl.sum((rival[None, :] < key[:, None]).to(tl.int32), 1)
    evicted = real & (busy == 0) & (order < misses)
    arriving = tl.load(missing + order, mask=evicted, other=0)
    tl.store(slot_of + occupant, tl.full([SLOTS_2], -1, tl.int32), mask=evicted & (occupant >= 0))
    tl.debug_barrier()
    tl.store(slot_of + arriving, slots, mask=evicted)
    tl.store(expert_of + slots, arriving, mask=evicted)
    tl.store(used + slots, tl.full([SLOTS_2], 0, tl.int64) + clock, mask=evicted)
    tl.store(source + order, arriving, mask=evicted)
    tl.store(target + order, slots, mask=evicted)
    tl.store(counters, clock)
    tl.store(counters + 1, tl.load(counters + 1) + tl.sum(requested, 0))
    tl.store(counters + 2, tl.load(counters + 2) + misses)
    tl.store(counters + 3, misses.to(tl.int64))
    tl.debug_barrier()
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        chosen = tl.load(ids + place, mask=place < count, other=0).to(tl.int32)
        valid = (place < count) & (chosen >= 0) & (chosen < EXPERTS)
        tl.store(mapped + place, tl.load(slot_of + chosen, mask=valid, other=-1), mask=place < count)


@triton.jit
def copy_kernel(
        source, target, counters, host_0, host_1, host_2, host_3, gpu_0, gpu_1, gpu_2, gpu_3,
        words_0, words_1, words_2, words_3, PROGRAMS: tl.constexpr, WORDS: tl.constexpr):
    """Program (i, j) copies its share of the four tensors of the i-th expert of the list."""
    number = tl.program_id(0)
    if number < tl.load(counters + 3):
        expert = tl.load(source + number).to(tl.int64)
        slot = tl.load(target + number).to(tl.int64)
        _copy_share(host_0 + expert * words_0, gpu_0 + slot * words_0, words_0, PROGRAMS, WORDS)
        _copy_share(host_1 + expert * words_1, gpu_1 + slot * words_1, words_1, PROGRAMS, WORDS)
        _copy_share(host_2 + expert * words_2, gpu_2 + slot * words_2, words_2, PROGRAMS, WORDS)
        _copy_share(host_3 + expert * words_3, gpu_3 + slot * words_3, words_3, PROGRAMS, WORDS)


@triton.jit
def _copy_share(here, there, words, PROGRAMS: tl.constexpr, WORDS: tl.constexpr):
    for start in range(tl.program_id(1) * WORDS, words, PROGRAMS * WORDS):
        place = start + tl.arange(0, WORDS)
        data = tl.load(here + place, mask=place < words)
        tl.store(there + place, data, mask=place < words)
