"""Triton kernels of the expert cache: which experts are on the GPU and which the CPU computes, copies, repacking.

All decisions are made on the device, so that a pass needs no synchronization and can be captured in a CUDA graph.

Rules:
- a slot holds one expert of its layer; a slot that a pass needs is never evicted in that pass;
- where absent experts are copied, the least recently used slot is evicted first; where the CPU computes them, the least
  often used one, and only for an expert that is used more than twice as often;
- the host tensors are read through their device views (UVA) by wide, coalesced loads of consecutive bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def assign_kernel(
        ids, count, slot_of, expert_of, used, needed, missing, source, target, counters, report, mapped,
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
    lookups, absent = tl.load(counters + 1) + tl.sum(requested, 0), tl.load(counters + 2) + misses
    tl.store(counters + 1, lookups)
    tl.store(counters + 2, absent)
    tl.store(report, lookups)
    tl.store(report + 1, absent)
    tl.store(counters + 3, misses.to(tl.int64))
    tl.debug_barrier()
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        chosen = tl.load(ids + place, mask=place < count, other=0).to(tl.int32)
        valid = (place < count) & (chosen >= 0) & (chosen < EXPERTS)
        tl.store(mapped + place, tl.load(slot_of + chosen, mask=valid, other=-1), mask=place < count)


@triton.jit
def share_kernel(
        ids, router, x, count, slot_of, expert_of, uses, needed, present, source, target, counters, report, left,
        host_ids, host_router, host_x, width,
        EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, SLOTS: tl.constexpr, SLOTS_2: tl.constexpr,
        BLOCK: tl.constexpr, WORDS: tl.constexpr, FILLS: tl.constexpr, FIRST: tl.constexpr):
    """Divides the choices between GPU and CPU. Program 0: the lists; program 1 + i: row i of the activations.

    `present` gets the experts' slots in this pass. The CPU gets the other choices, -1 in the place of those of the GPU.
    `report`, in host memory, gets the numbers of needed and of absent experts. At most one expert takes a slot for the
    next pass, if it was used much more than the one that it replaces: `source[0]`, `target[0]`. `left` counts the
    copies that this pass may still start (FILLS at its FIRST layer).
    """
    row = tl.program_id(0) - 1
    if row >= 0:
        for start in range(0, width, WORDS):
            place = start + tl.arange(0, WORDS)
            data = tl.load(x + row.to(tl.int64) * width + place, mask=place < width)
            tl.store(host_x + row.to(tl.int64) * width + place, data, mask=place < width)
    else:
        experts = tl.arange(0, EXPERTS_2)
        in_range = experts < EXPERTS
        tl.store(needed + experts, tl.zeros([EXPERTS_2], tl.int32), mask=in_range)
        tl.debug_barrier()
        for start in range(0, count, BLOCK):
            place = start + tl.arange(0, BLOCK)
            chosen = tl.load(ids + place, mask=place < count, other=-1).to(tl.int32)
            valid = (chosen >= 0) & (chosen < EXPERTS)
            tl.store(needed + chosen, tl.full([BLOCK], 1, tl.int32), mask=valid)
            slot = tl.load(slot_of + chosen, mask=valid, other=0)
            tl.store(host_ids + place, tl.where(valid & (slot < 0), chosen, -1), mask=place < count)
            weight = tl.load(router + place, mask=place < count, other=0.0)
            tl.store(host_router + place, weight, mask=place < count)
        tl.debug_barrier()
        requested = tl.load(needed + experts, mask=in_range, other=0)
        slot = tl.load(slot_of + experts, mask=in_range, other=0)
        tl.store(present + experts, slot, mask=in_range)
        used = tl.load(uses + experts, mask=in_range, other=0)
        used += requested * 4096 - (used >> 8)  # the last few hundred passes count
        tl.store(uses + experts, used, mask=in_range)
        tl.debug_barrier()
        lacking = in_range & (requested == 1) & (slot < 0)
        score = tl.where(lacking, used, -1)
        arriving = tl.argmax(score, 0)
        slots = tl.arange(0, SLOTS_2)
        real = slots < SLOTS
        occupant = tl.load(expert_of + slots, mask=real, other=0)
        busy = tl.load(needed + occupant, mask=real, other=1) == 1
        value = tl.where(real & (busy == 0), tl.load(uses + occupant, mask=real, other=0), 0x3FFFFFFF)
        leaving = tl.argmin(value, 0)
        budget = tl.load(left)
        if FIRST:
            budget = tl.full([], FILLS, tl.int32)
        moves = (budget > 0) & (tl.max(score, 0) // 2 > tl.min(value, 0) + 8192)
        moved = moves.to(tl.int32)
        evicted = tl.load(expert_of + leaving)
        tl.debug_barrier()
        tl.store(slot_of + evicted, -1, mask=moves)
        tl.store(slot_of + arriving, leaving, mask=moves)
        tl.store(expert_of + leaving, arriving, mask=moves)
        tl.store(source, arriving)
        tl.store(target, leaving)
        tl.store(left, budget - moved)
        tl.store(counters, tl.load(counters) + 1)
        lookups = tl.load(counters + 1) + tl.sum(requested, 0)
        absent = tl.load(counters + 2) + tl.sum(lacking.to(tl.int32), 0)
        tl.store(counters + 1, lookups)
        tl.store(counters + 2, absent)
        tl.store(report, lookups)
        tl.store(report + 1, absent)
        tl.store(counters + 3, moved.to(tl.int64))


@triton.jit
def copy_kernel(source, counters, host, stage, first, words, PROGRAMS: tl.constexpr, WORDS: tl.constexpr):
    """Program (i, j) copies its share of expert `source[first + i]` to place i of the stage."""
    number = tl.program_id(0)
    if first + number < tl.load(counters + 3):
        here = host + tl.load(source + first + number).to(tl.int64) * words
        there = stage + number.to(tl.int64) * words
        for start in range(tl.program_id(1) * WORDS, words, PROGRAMS * WORDS):
            place = start + tl.arange(0, WORDS)
            tl.store(there + place, tl.load(here + place, mask=place < words), mask=place < words)


@triton.jit
def codes_kernel(stage, there, target, counters, order, first, stage_bytes, offset, rows, words,
                 PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """Program (i, j) writes its share of the codes of the expert at place i of the stage into its slot."""
    number = tl.program_id(0)
    if first + number < tl.load(counters + 3):
        slot = tl.load(target + first + number).to(tl.int64)
        source = stage + number.to(tl.int64) * stage_bytes + offset
        half_k = words * 4 // rows
        for start in range(tl.program_id(1) * BLOCK, words, PROGRAMS * BLOCK):
            place = start + tl.arange(0, BLOCK)
            inside = place < words
            tile, within = place // (2 * rows), place % (2 * rows)
            result = tl.zeros([BLOCK], tl.int32)
            for code in tl.static_range(8):
                at = tl.load(order + within % 128 * 8 + code)
                k = tile * 16 + at % 256 // 16
                row = within // 128 * 64 + at // 256 * 16 + at % 16
                pair = tl.load(source + row * half_k + k // 2, mask=inside, other=0).to(tl.int32)
                result |= ((pair >> (k % 2 * 4)) & 15) << (4 * code)
            tl.store(there + slot * words + place, result, mask=inside)


@triton.jit
def values_kernel(stage, there, target, counters, order, first, stage_values, offset, rows, groups,
                  PERIOD: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """The same for scales or biases: [rows, groups] there, [groups, rows] here."""
    number = tl.program_id(0)
    if first + number < tl.load(counters + 3):
        slot = tl.load(target + first + number).to(tl.int64)
        source = stage + number.to(tl.int64) * stage_values + offset
        for start in range(tl.program_id(1) * BLOCK, rows * groups, PROGRAMS * BLOCK):
            place = start + tl.arange(0, BLOCK)
            inside = place < rows * groups
            row = place % rows
            row = row // PERIOD * PERIOD + tl.load(order + row % PERIOD)
            value = tl.load(source + row * groups + place // rows, mask=inside, other=0)
            tl.store(there + slot * (rows * groups) + place, value, mask=inside)
