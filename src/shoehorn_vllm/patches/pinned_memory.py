"""Pinned host memory in exact sizes and huge pages, populated by several threads.

torch allocates it with `cudaHostAlloc`, in powers of two and pages of 4 KiB: the 33 GiB of an offloaded 70B became 39,
at 2.8 GB/s. Here a tensor gets a mapping of its own that several threads populate before it is registered with CUDA, at
five times that speed (bench/results/pinned-memory-h100.json).

Rules:
- a tensor has one mapping: CUDA copies no range that spans two of them;
- child processes do not inherit a mapping: Linux would copy pinned pages into each of them;
- small tensors, and those whose mapping CUDA refuses, use torch's allocator.

Sources: torch 2.13.0, CachingHostAllocator.h (its `pinned_max_round_threshold_mb` returns blocks that are too small
when freed ones are reused, so it does not help); CUDA driver API, cuMemHostRegister; Linux, madvise(2).
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

_MIN_BYTES = 1 << 16
_HUGE_PAGE_BYTES = 2 << 20
_CHUNK_BYTES = 16 * _HUGE_PAGE_BYTES
_POPULATE_WRITE = 23  # since Linux 5.14; before it, registering populates the pages
_pinned_by_address: dict[int, int] = {}  # bytes
_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def allocate_like(data: torch.Tensor) -> torch.Tensor:
    """Allocate host memory of a tensor's size, stride and dtype, pinned where the engine pins: zeros from 64 KiB on.

    Args:
        data: of any device; at least one element.
    """
    size = _span_bytes(data)
    buffer = _pin(size) if size >= _MIN_BYTES and should_pin_memory() else None
    if buffer is None:
        own = torch.empty_strided(data.size(), data.stride(), dtype=data.dtype, device="cpu",
                                  pin_memory=should_pin_memory())
        return own.zero_() if size >= _MIN_BYTES else own
    return buffer.view(data.dtype).as_strided(data.size(), data.stride())


def copy_to_host(data: torch.Tensor, place: torch.Tensor | None = None) -> torch.Tensor:
    """Copy a tensor to host memory: into `place` if it fits exactly, else into new memory.

    Args:
        data: of any device.
        place: on the CPU, with a storage of its own that is no longer in use.
    """
    if place is not None and _span_bytes(data) == place.untyped_storage().nbytes():
        copy = torch.empty(0, dtype=data.dtype).set_(place.untyped_storage(), 0, data.size(), data.stride())
    else:
        copy = allocate_like(data)
    return copy.copy_(data)


def _span_bytes(data: torch.Tensor) -> int:
    """The bytes from a tensor's first element to its last one."""
    if not data.numel():
        return 0
    return (sum((size - 1) * stride for size, stride in zip(data.size(), data.stride(), strict=True)) + 1
            ) * data.element_size()


def pinned_bytes() -> int:
    """Bytes that this process has pinned here, without those of torch's allocator."""
    return sum(_pinned_by_address.values())


def _pin(size: int) -> torch.Tensor | None:
    """Allocate pinned bytes; None where the system or CUDA refuses."""
    try:
        mapping = mmap.mmap(-1, size + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # no address space, for example without overcommit
        return None
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    offset = -start % _HUGE_PAGE_BYTES
    with suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    mapping.madvise(mmap.MADV_DONTFORK)
    address = start + offset

    def populate(begin: int) -> None:
        _libc.madvise(address + begin, min(_CHUNK_BYTES, size - begin), _POPULATE_WRITE)

    list(_threads().map(populate, range(0, size, _CHUNK_BYTES)))
    if not _register(address, size):
        return None
    _pinned_by_address[address] = size
    weakref.finalize(mapping, _unregister, address).atexit = False
    return torch.frombuffer(mapping, dtype=torch.uint8, count=size, offset=offset)


@cache
def _threads() -> ThreadPoolExecutor:
    """Threads started once: the stack of a new thread waits for those that populate."""
    return ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))), "populate")


def _register(address: int, size: int) -> bool:
    """Pin a range by the driver's call: an error of the CUDA runtime would surface at the next kernel."""
    return int(_driver().cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(size), 0)) == 0


def _unregister(address: int) -> None:
    del _pinned_by_address[address]
    _driver().cuMemHostUnregister(ctypes.c_void_p(address))


def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
