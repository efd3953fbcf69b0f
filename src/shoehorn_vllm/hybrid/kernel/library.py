"""The compiled library: loading it, its functions by their C types, its errors.

Rules:
- a call releases the interpreter's lock;
- the library is loaded at the first use and stays loaded;
- `SHOEHORN_CPU_ISA` chooses the instruction set (a name in `Isa`, or `auto`), for tests and measurements.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from enum import IntEnum
from functools import cache

from shoehorn_vllm.hybrid.kernel import build

LIBRARY_PATH = build.SOURCES.parent / build.LIBRARY


class Isa(IntEnum):
    """Instruction sets, slowest first."""

    PORTABLE = 0
    AVX2 = 1
    AVXVNNI = 2
    AVX512VNNI = 3


class Weights(ctypes.Structure):
    """`struct weights` in layout.h."""

    _fields_ = (("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("rows", ctypes.c_int64),
                ("k", ctypes.c_int64), ("codes_step", ctypes.c_int64), ("scales_step", ctypes.c_int64),
                ("group", ctypes.c_int32), ("format", ctypes.c_int32))


class Experts(ctypes.Structure):
    """`struct experts` in product.h."""

    _fields_ = (("up", Weights), ("down", Weights), ("up_bias", ctypes.c_void_p), ("down_bias", ctypes.c_void_p),
                ("up_bias_step", ctypes.c_int64), ("down_bias_step", ctypes.c_int64), ("count", ctypes.c_int64),
                ("activation", ctypes.c_int32), ("alpha", ctypes.c_float), ("limit", ctypes.c_float))


class Task(ctypes.Structure):
    """`struct task` in mailbox.c: a matrix, or experts with the number that a token chooses."""

    _fields_ = (("matrix", ctypes.POINTER(Weights)), ("experts", ctypes.POINTER(Experts)), ("top_k", ctypes.c_int64))


class Buffers(ctypes.Structure):
    """`struct buffers` in mailbox.c."""

    _fields_ = (("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("ids", ctypes.c_void_p), ("router", ctypes.c_void_p))


class KernelError(RuntimeError):
    """The CPU kernel did not complete a product."""


class KernelUnavailableError(KernelError):
    """The library was not built, or an instruction set is not supported here."""


class ThreadHungError(KernelError):
    """A thread of the team made no progress; the process must be restarted, as the thread may write later."""


_POINTER, _INT, _LONG, _DOUBLE = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "isa_available": (_INT,),
    "isa_best": (),
    "layout_bytes": (),
    "linear_run": (_POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG, _INT, _INT, _DOUBLE),
    "unpack_run": (_POINTER, _POINTER, _INT, _DOUBLE),
    "read_run": (_POINTER, _LONG, _INT, _POINTER, _DOUBLE),
    "experts_run": (_POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG, _POINTER, _LONG, _INT, _INT, _DOUBLE),
    "mailbox_start": (_POINTER, _POINTER, _INT, _POINTER, _INT, _INT, _DOUBLE),
    "mailbox_stop": (),
    "pool_start": (_POINTER, _INT, _INT),
    "pool_stop": (),
    "pool_threads": (),
    "pool_culprit": (),
    "pool_items": (_POINTER, _INT),
    "pool_inject": (_INT, _INT),
}


def tasks(structures: Sequence[Weights | Experts], top_k: int) -> ctypes.Array[Task]:
    """The mailbox's table of matrices and experts; it keeps the structures."""
    table = (Task * len(structures))()
    for entry, structure in zip(table, structures, strict=True):
        if isinstance(structure, Weights):
            entry.matrix = ctypes.pointer(structure)
        else:
            entry.experts, entry.top_k = ctypes.pointer(structure), top_k
    return table


@cache
def load(path: str = "") -> ctypes.CDLL:
    """Load the library of the package, or the one at `path`.

    Raises:
        KernelUnavailableError: the file is missing or made for another machine.
    """
    try:
        library = ctypes.CDLL(path or str(LIBRARY_PATH))
    except OSError as error:
        raise KernelUnavailableError(f"CPU kernel: unavailable ({error}). Install a C compiler and reinstall Shoehorn."
                                     ) from error
    for name, types in _SIGNATURES.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:  # of an earlier version, whose sources are newer now
            raise KernelUnavailableError(f"CPU kernel: {library._name} is outdated, {name} is missing. "
                                         "Reinstall Shoehorn.") from error
        function.argtypes, function.restype = types, ctypes.c_int
    if library.layout_bytes() != ctypes.sizeof(Experts):
        raise KernelUnavailableError(f"CPU kernel: {library._name} is outdated, its structures differ. "
                                     "Reinstall Shoehorn.")
    return library


def is_available() -> bool:
    """Return whether the library can be loaded here."""
    try:
        load()
    except KernelUnavailableError:
        return False
    return True


def supported_isas() -> tuple[Isa, ...]:
    """The instruction sets that this processor and this operating system support."""
    return tuple(isa for isa in Isa if load().isa_available(isa))


@cache
def default_isa() -> Isa:
    """The instruction set that `SHOEHORN_CPU_ISA` names, else the fastest that is supported.

    Raises:
        KernelUnavailableError: the named one is unknown or not supported here.
    """
    name = os.environ.get("SHOEHORN_CPU_ISA", "auto")
    if name == "auto":
        return Isa(load().isa_best())
    choices = {isa.name.lower(): isa for isa in supported_isas()}
    if name.lower() not in choices:
        raise KernelUnavailableError(f"SHOEHORN_CPU_ISA={name}: unsupported. Set auto, {', '.join(choices)}.")
    return choices[name.lower()]


def check(code: int, timeout_s: float) -> None:
    """Raise what a negative return code means.

    Raises:
        ThreadHungError: no progress within `timeout_s`, now or in an earlier call.
        KernelError: invalid arguments or out of memory.
    """
    if code == 0:
        return
    if code in (-errno.ETIMEDOUT, -errno.EOWNERDEAD):
        raise ThreadHungError(f"CPU kernel: thread {load().pool_culprit()} timed out after {timeout_s:g} s. "
                              "Restart the engine; look for a CPU that was taken away or stopped.")
    reason = {-errno.EINVAL: "invalid arguments", -errno.ENOMEM: "out of memory"}.get(code, os.strerror(-code))
    raise KernelError(f"CPU kernel: {reason}.")
