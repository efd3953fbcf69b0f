"""Pinned host memory: no more than asked for, in huge pages, several of which are fetched at a time.

torch takes it from `cudaHostAlloc`, in powers of two and 4 KiB at a time: the 33 GiB of an offloaded 70B became 39, at
2.8 GB/s. Here a tensor gets a mapping of its own that is populated by several threads and then registered with CUDA, at
five times that speed (bench/results/pinned-memory-h100.json).

Rules:
- a tensor lies in one mapping: CUDA copies no range that spans two of them;
- a mapping is not for child processes: Linux would copy pinned pages into each of them;
- where CUDA refuses a mapping, and for what is small, torch's own is taken.

Sources: torch 2.13.0, CachingHostAllocator.h (its `pinned_max_round_threshold_mb` hands out blocks that are too small
when freed ones are used again, and is no way out); CUDA driver API, cuMemHostRegister; Linux, madvise(2).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache

import torch
from vllm.model_executor.offloader.base import should_pin_memory

_LEAST = 1 << 16
_HUGE = 2 << 20
_PIECE = 16 * _HUGE
_POPULATE_WRITE = 23  # since Linux 5.14; before it, registering fetches the pages
_held: dict[int, int] = {}  # bytes by address
_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def like(data: torch.Tensor) -> torch.Tensor:
    """Host memory for a tensor of that size, stride and type, pinned where the engine pins; what it holds is undefined.

    Args:
        data: of any device; at least one element.
    """
    wanted = _span_bytes(data)
    held = _pinned(wanted) if wanted >= _LEAST and should_pin_memory() else None
    if held is None:
        return torch.empty_strided(data.size(), data.stride(), dtype=data.dtype, device="cpu",
                                   pin_memory=should_pin_memory())
    return held.view(data.dtype).as_strided(data.size(), data.stride())


def copied(data: torch.Tensor, place: torch.Tensor | None = None) -> torch.Tensor:
    """Copy a tensor to the host: to that place where it takes exactly its memory, else to new memory.

    Args:
        data: of any device.
        place: on the CPU, with storage of its own, which nothing else reads any more.
    """
    if place is not None and _span_bytes(data) == place.untyped_storage().nbytes():
        held = torch.empty(0, dtype=data.dtype).set_(place.untyped_storage(), 0, data.size(), data.stride())
    else:
        held = like(data)
    return held.copy_(data)


def _span_bytes(data: torch.Tensor) -> int:
    """From a tensor's first element to its last one."""
    if not data.numel():
        return 0
    return (sum((size - 1) * stride for size, stride in zip(data.size(), data.stride(), strict=True)) + 1
            ) * data.element_size()


def pinned_bytes() -> int:
    """What this process holds here, without torch's own."""
    return sum(_held.values())


def _pinned(wanted: int) -> torch.Tensor | None:
    """That many bytes; None where CUDA does not take them."""
    try:
        mapping = mmap.mmap(-1, wanted + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # no address space for it, as where a host does not overcommit
        return None
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    offset = -start % _HUGE
    with suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    mapping.madvise(mmap.MADV_DONTFORK)
    address = start + offset

    def populate(begin: int) -> None:
        _libc.madvise(address + begin, min(_PIECE, wanted - begin), _POPULATE_WRITE)

    list(_threads().map(populate, range(0, wanted, _PIECE)))
    if not _register(address, wanted):
        return None
    _held[address] = wanted
    weakref.finalize(mapping, _unregister, address).atexit = False
    return torch.frombuffer(mapping, dtype=torch.uint8, count=wanted, offset=offset)


@cache
def _threads() -> ThreadPoolExecutor:
    """Started once: a new thread's stack waits for those that populate."""
    return ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))), "populate")


def _register(address: int, size: int) -> bool:
    """Pin it; the driver's own call, because an error of the runtime's would come up again at the next kernel."""
    return int(_driver().cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(size), 0)) == 0


def _unregister(address: int) -> None:
    del _held[address]
    _driver().cuMemHostUnregister(ctypes.c_void_p(address))


def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
