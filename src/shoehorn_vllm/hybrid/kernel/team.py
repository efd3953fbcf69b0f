"""The kernel's threads in this process: started once, reported, checked.

Rules:
- `SHOEHORN_CPU_THREADS` sets their number, the calling thread included; `SHOEHORN_CPU_SPIN_US` how long they spin
  after a product before they sleep;
- the calling thread works too: it is not pinned, and no other thread is pinned to the CPU that it is pinned to;
- a child that was forked starts threads of its own at its first product.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from shoehorn_vllm.hybrid.kernel import cpus, library
from shoehorn_vllm.hybrid.kernel.cpus import Choice

SPIN_US = 200
_lock = threading.Lock()
_state: list[Team] = []


@dataclass(frozen=True)
class Team:
    """Threads that compute together: `cpus[0]` is where the caller was at the start."""

    cpus: tuple[int, ...]
    spin_us: int
    choice: Choice

    def items(self) -> tuple[int, ...]:
        """Items of work that each thread has done: a thread that stays behind the others is starved or gone."""
        done = (ctypes.c_int64 * len(self.cpus))()
        length = library.load().pool_items(done, len(self.cpus))
        return tuple(done[:length])


def start(reserved: int, allowed: Iterable[int] | None = None, threads: int | None = None,
          spin_us: int = SPIN_US) -> Team:
    """Start the threads, or restart them.

    Args:
        reserved: physical cores to leave free (2 with a GPU, 0 where the whole model runs on the CPU).
        allowed: the process's CPUs before the engine pinned its own threads; as they are now without.
        threads: their number, over the environment's and the choice by cores.
        spin_us: time that a thread spins after a product before it sleeps, unless the environment sets it.

    Raises:
        KernelUnavailableError: the library is missing.
        KernelError: a thread could not be created.
    """
    choice = cpus.choose(cpus.present() if allowed is None else allowed, reserved)
    count = threads or int(os.environ.get("SHOEHORN_CPU_THREADS", "0")) or len(choice.cpus)
    spin_us = int(os.environ.get("SHOEHORN_CPU_SPIN_US", spin_us))
    own = cpus.present()
    caller = next(iter(own)) if len(own) == 1 else choice.cpus[0]
    others = [cpu for cpu in choice.cpus if cpu != caller]
    pinned = (caller, *(others[number] if number < len(others) else -1 for number in range(count - 1)))
    with _lock:
        library.check(library.load().pool_start((ctypes.c_int32 * count)(*pinned), count, spin_us), 0)
        team = Team(pinned, spin_us, choice)
        _state[:] = [team]
    return team


def current() -> Team | None:
    """The team of this process, if it was started."""
    return _state[0] if _state else None


def stop() -> None:
    """End the threads; products run on the calling thread alone then."""
    with _lock:
        library.check(library.load().pool_stop(), 0)
        _state.clear()
