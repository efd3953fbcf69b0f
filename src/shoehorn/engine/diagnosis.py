"""Why the engine ended, in words: the engine's own log lines -> cause and remedy.

Rules: the first line that matches counts, because the engine repeats and wraps its first failure; what no row knows is
`unknown` and carries the engine's last lines. A row is `final` when the same start would fail the same way again, and
`memory` when a start that needs less of the card would not.
Source of the texts: vLLM 0.32.0 (vllm/v1/core/kv_cache_utils.py, vllm/v1/worker/utils.py, vllm/v1/engine/core.py)
and torch 2.13.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from shoehorn.common.units import GIB, MIB


@dataclass(frozen=True)
class Diagnosis:
    """A failure of the engine.

    Attributes:
        name: short and stable, for metrics.
        final: the same start would fail again, so it is not tried again.
        memory: a start that needs less memory of the GPU could succeed.
        missing_bytes: what the GPU lacked, where the engine says it; 0 where not.
        cache_made: the KV cache lay on the card already.
    """

    name: str
    cause: str
    remedy: str
    final: bool
    memory: bool = False
    missing_bytes: int = 0
    cache_made: bool = False


@dataclass(frozen=True)
class _Row:
    name: str
    pattern: re.Pattern[str]
    cause: str
    remedy: str
    final: bool = True
    memory: bool = False


_ROWS = (
    _Row("context_exceeds_kv_cache", re.compile(r"To serve at least one request with the model's max seq len"),
         "The KV cache that fits holds less than one request of MAX_MODEL_LEN tokens.",
         "Set MAX_MODEL_LEN to the estimated maximum in the engine's message above, or less.", memory=True),
    _Row("no_kv_cache_memory", re.compile(r"No available memory for the cache blocks"),
         "After the weights nothing is left for the KV cache.",
         "Choose a smaller model or a larger VRAM_LIMIT, or offload more: VLLM_EXTRA_ARGS='--cpu-offload-gb N'.",
         memory=True),
    _Row("gpu_in_use", re.compile(r"Free memory on device .* is less than desired GPU memory utilization"),
         "Less GPU memory is free than the plan uses: another process holds the card.",
         "End the other process (`nvidia-smi` names it), or set VRAM_LIMIT to what is free.", memory=True),
    _Row("gpu_out_of_memory", re.compile(r"CUDA out of memory|torch\.OutOfMemoryError|not enough GPU memory|"
                                           r"\"aten::empty\".*API call failed"),  # how a kernel of its own says it
         "The GPU ran out of memory while the engine started.",
         "Lower MAX_MODEL_LEN or MAX_NUM_SEQS, or offload more: VLLM_EXTRA_ARGS='--cpu-offload-gb N'.", memory=True),
    _Row("host_out_of_memory", re.compile(r"DefaultCPUAllocator: can.t allocate memory|MemoryError\b"),
         "The host ran out of memory while the engine started.",
         "Give the container more memory, or offload less: VLLM_EXTRA_ARGS='--cpu-offload-gb N'."),
    _Row("unsupported_model", re.compile(r"Model architectures \[.*\] are not supported|"
                                         r"does not recognize this architecture"),
         "The engine does not know this model's architecture.",
         "Choose another MODEL_ID; the engine's message above names what it does not know."),
    _Row("unsupported_dtype", re.compile(r"Bfloat16 is only supported on GPUs|compute capability of at least"),
         "This GPU lacks a number format or kernel that the plan uses.",
         "Set VLLM_EXTRA_ARGS='--dtype float16'; if that fails too, the card is too old for this engine."),
    _Row("bad_engine_argument", re.compile(r"error: (unrecognized arguments|argument )|"
                                           r"validation errors? for \w+Config"),
         "The engine refused an option.",
         "Correct VLLM_EXTRA_ARGS, the setting or the profile that the engine's message above names."),
    _Row("shared_memory_too_small", re.compile(r"Insufficient space in /dev/shm"),
         "The container's shared memory (/dev/shm) is too small for the engine.",
         "Start it with --shm-size 8g (docker run) or shm_size: 8gb (compose)."),
    _Row("no_compiler", re.compile(r"Failed to find C compiler|CalledProcessError: Command '\['[^']*(gcc|clang|cc)'"),
         "The engine compiles small parts of itself at start, and found no working C compiler.",
         "Install gcc, binutils and Python's headers where it runs; the image has them."),
    _Row("bad_weights", re.compile(r"SafetensorError|Error while deserializing header"),
         "A weight file is damaged.", "Run `shoehorn pull` again; it checks every file and fetches what is damaged."),
)


HUNG = Diagnosis("hung", "The engine hangs: nothing moves, and it does not write a token.",
                 "It is started again; if that happens often, look for errors of the GPU (`dmesg`, Xid) on the host.",
                 False)
"""What the watchdog found, not the log."""


def diagnose(lines: Iterable[str], status: int, memory_kill: bool = False) -> Diagnosis:
    """The cause of an exit.

    Args:
        lines: the engine's last lines, oldest first.
        status: its exit status; negative for a signal.
        memory_kill: the kernel killed some process for memory meanwhile: an engine whose core dies ends by itself.
    """
    kept = list(lines)
    for line in kept:
        for row in _ROWS:
            if row.pattern.search(line):
                return Diagnosis(row.name, row.cause, row.remedy, row.final, row.memory, _missing_bytes(row.name, kept),
                                 any("KV cache size:" in each for each in kept))
    if status == -9 or memory_kill or any(_KILLED.search(line) for line in kept):
        return Diagnosis("killed", "The engine was killed (SIGKILL), most often because memory ran out.",
                         "See `dmesg` on the host for an out-of-memory kill; give the container more memory.", False)
    last = " | ".join(kept[-3:]) or "it printed nothing"
    return Diagnosis("unknown", f"The engine ended with status {status}: {last}",
                     "The lines above this one are the engine's own; search them for the first error.", False)


_KILLED = re.compile(r"Worker proc \S+ died unexpectedly \(exit code: -9\)")
_NEEDED = re.compile(r"\(([\d.]+) GiB KV cache is needed.*?available KV cache memory \(([\d.]+) GiB\)", re.DOTALL)
_AVAILABLE = re.compile(r"Available KV cache memory: (-?[\d.]+) GiB")
_FREE = re.compile(r"Free memory on device \S+ \(([\d.]+)/[\d.]+ GiB\).*utilization \([\d.]+, ([\d.]+) GiB\)")
_TRIED = re.compile(r"Tried to allocate ([\d.]+) (MiB|GiB)\..*?of which ([\d.]+) (MiB|GiB) is free")


def _missing_bytes(name: str, lines: list[str]) -> int:
    """What the engine says that the card lacked."""
    text = "\n".join(lines)
    if name == "context_exceeds_kv_cache" and (match := _NEEDED.search(text)):
        return _bytes(match[1], "GiB") - _bytes(match[2], "GiB")
    if name == "no_kv_cache_memory" and (match := _AVAILABLE.search(text)):
        return max(0, -_bytes(match[1], "GiB"))
    if name == "gpu_in_use" and (match := _FREE.search(text)):
        return _bytes(match[2], "GiB") - _bytes(match[1], "GiB")
    if name == "gpu_out_of_memory" and (match := _TRIED.search(text)):
        return max(0, _bytes(match[1], match[2]) - _bytes(match[3], match[4]))
    return 0


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * (GIB if unit == "GiB" else MIB))
