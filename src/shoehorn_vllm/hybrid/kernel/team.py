"""The kernel's threads in this process: started once, reported, checked.

Rules:
- `SHOEHORN_CPU_THREADS` sets their number, the calling thread included; `SHOEHORN_CPU_SPIN_US` how long they spin
  after a product before they sleep;
- the calling thread works too: it is not pinned, and no other thread is pinned to the CPU that it is pinned to;
- a child that was forked starts threads of its own at its first product;
- CPUs that are taken away or given, and a cgroup's quota that changes, are found within `CHECK_S` seconds: the team is
  restarted with as many threads as there are CPUs then (not where the environment sets their number).
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shoehorn_vllm.hybrid.kernel import cpus, library
from shoehorn_vllm.hybrid.kernel.cpus import Choice

log = logging.getLogger("vllm.shoehorn.cpu_kernel")
SPIN_US = 200
CHECK_S = 5.0
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
          spin_us: int = SPIN_US, choice: Choice | None = None, caller: int | None = None) -> Team:
    """Start the threads, or restart them.

    Args:
        reserved: physical cores to leave free (2 with a GPU, 0 where the whole model runs on the CPU).
        allowed: the process's CPUs before the engine pinned its own threads; as they are now without.
        threads: their number, over the environment's and the choice by cores.
        spin_us: time that a thread spins after a product before it sleeps, unless the environment sets it.
        choice: of CPUs, in the place of one from the other arguments.
        caller: CPU of the thread that asks for products; where this thread is pinned to, or the first one, without.

    Raises:
        KernelUnavailableError: the library is missing.
        KernelError: a thread could not be created.
    """
    choice = choice or cpus.choose(cpus.present() if allowed is None else allowed, reserved)
    count = threads or int(os.environ.get("SHOEHORN_CPU_THREADS", "0")) or len(choice.cpus)
    spin_us = int(os.environ.get("SHOEHORN_CPU_SPIN_US", spin_us))
    own = cpus.present()
    if caller is None:
        caller = next(iter(own)) if len(own) == 1 else choice.cpus[0]
    others = [cpu for cpu in choice.cpus if cpu != caller]
    pinned = (caller, *(others[number] if number < len(others) else -1 for number in range(count - 1)))
    with _lock:
        library.check(library.load().pool_start((ctypes.c_int32 * count)(*pinned), count, spin_us), 0)
        team = Team(pinned, spin_us, choice)
        _state[:] = [team]
    return team


def adapt(allowed: Iterable[int], reserved: int, root: Path = Path("/")) -> bool:
    """Restart the team if other CPUs are there than at its start; return whether it was restarted.

    Args:
        allowed, reserved: as for `start`, now.
        root: where `sys` and `proc` are mounted.

    Raises:
        KernelError: a thread hangs, or could not be created.
    """
    team = current()
    if team is None or "SHOEHORN_CPU_THREADS" in os.environ:
        return False
    choice = cpus.choose(allowed, reserved, root)
    if choice.cpus == team.choice.cpus:
        return False
    log.warning("CPU kernel: available CPUs changed, threads are restarted before=%d now=%d quota=%s",
                len(team.choice.cpus), len(choice.cpus), choice.quota_cpus)
    caller = team.cpus[0] if team.cpus[0] in choice.allowed else None
    start(reserved, spin_us=team.spin_us, choice=choice, caller=caller)
    return True


def watch(reserved: int, allowed: Iterable[int]) -> None:
    """Start a thread that adapts the team as long as the process lives.

    Args:
        allowed: the process's CPUs before the engine pinned its own threads.
    """
    everywhere, ended = frozenset(allowed), threading.Event()

    def check() -> None:
        os.sched_setaffinity(0, everywhere)  # of this thread: what the kernel leaves of it is what the cpuset permits
        while not ended.wait(CHECK_S):
            try:
                adapt(cpus.present(), reserved)
            except library.KernelError as error:  # the next product fails with it
                log.error("%s", error)
                return

    threading.Thread(target=check, name="cpu kernel watch", daemon=True).start()


def current() -> Team | None:
    """The team of this process, if it was started."""
    return _state[0] if _state else None


def stop() -> None:
    """End the threads; products run on the calling thread alone then."""
    with _lock:
        library.check(library.load().pool_stop(), 0)
        _state.clear()
