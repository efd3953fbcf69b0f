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
                ("k", ctypes.c_int64), ("group", ctypes.c_int32), ("format", ctypes.c_int32))


class Experts(ctypes.Structure):
    """`struct experts` in experts.c."""

    _fields_ = (("up", Weights), ("down", Weights), ("up_bias", ctypes.c_void_p), ("down_bias", ctypes.c_void_p),
                ("count", ctypes.c_int64), ("activation", ctypes.c_int32), ("alpha", ctypes.c_float),
                ("limit", ctypes.c_float))


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
    "linear_run": (_POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG, _INT, _INT, _DOUBLE),
    "unpack_run": (_POINTER, _POINTER, _INT, _DOUBLE),
    "read_run": (_POINTER, _LONG, _INT, _POINTER, _DOUBLE),
    "experts_run": (_POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG, _POINTER, _LONG, _INT, _INT, _DOUBLE),
    "mailbox_start": (_POINTER, _POINTER, _INT, _POINTER, _POINTER, _INT, _INT, _DOUBLE),
    "mailbox_stop": (),
    "pool_start": (_POINTER, _INT, _INT),
    "pool_stop": (),
    "pool_threads": (),
    "pool_culprit": (),
    "pool_items": (_POINTER, _INT),
    "pool_inject": (_INT, _INT),
}


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
