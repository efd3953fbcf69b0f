"""Why the engine ended, in words: the engine's own log lines -> cause and remedy.

Rules: the first line that matches counts, because the engine repeats and wraps its first failure; what no row knows is
`unknown` and carries the engine's last lines. A row is `final` when the same start would fail the same way again.
Source of the texts: vLLM 0.32.0 (vllm/v1/core/kv_cache_utils.py, vllm/v1/worker/utils.py, vllm/v1/engine/core.py)
and torch 2.13.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Diagnosis:
    """A failure of the engine.

    Attributes:
        name: short and stable, for metrics.
        final: the same start would fail again, so it is not tried again.
    """

    name: str
    cause: str
    remedy: str
    final: bool


@dataclass(frozen=True)
class _Row:
    name: str
    pattern: re.Pattern[str]
    cause: str
    remedy: str
    final: bool = True


_ROWS = (
    _Row("context_exceeds_kv_cache", re.compile(r"To serve at least one request with the model's max seq len"),
         "The KV cache that fits holds less than one request of MAX_MODEL_LEN tokens.",
         "Set MAX_MODEL_LEN to the estimated maximum in the engine's message above, or less."),
    _Row("no_kv_cache_memory", re.compile(r"No available memory for the cache blocks"),
         "After the weights nothing is left for the KV cache.",
         "Choose a smaller model or a larger VRAM_LIMIT, or offload more: VLLM_EXTRA_ARGS='--cpu-offload-gb N'."),
    _Row("gpu_in_use", re.compile(r"Free memory on device .* is less than desired GPU memory utilization"),
         "Less GPU memory is free than the plan uses: another process holds the card.",
         "End the other process (`nvidia-smi` names it), or set VRAM_LIMIT to what is free."),
    _Row("gpu_out_of_memory", re.compile(r"CUDA out of memory|torch\.OutOfMemoryError|not enough GPU memory"),
         "The GPU ran out of memory while the engine started.",
         "Lower MAX_MODEL_LEN or MAX_NUM_SEQS, or offload more: VLLM_EXTRA_ARGS='--cpu-offload-gb N'."),
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


def diagnose(lines: Iterable[str], status: int) -> Diagnosis:
    """The cause of an exit.

    Args:
        lines: the engine's last lines, oldest first.
        status: its exit status; negative for a signal.
    """
    kept = list(lines)
    for line in kept:
        for row in _ROWS:
            if row.pattern.search(line):
                return Diagnosis(row.name, row.cause, row.remedy, row.final)
    if status == -9:
        return Diagnosis("killed", "The engine was killed (SIGKILL), most often because memory ran out.",
                         "See `dmesg` on the host for an out-of-memory kill; give the container more memory.", False)
    last = " | ".join(kept[-3:]) or "it printed nothing"
    return Diagnosis("unknown", f"The engine ended with status {status}: {last}",
                     "The lines above this one are the engine's own; search them for the first error.", False)
