"""Logging handler in every process of vLLM that saves the engine's memory figures as JSON.

Rules: it reads the records' templates and arguments, not the formatted text; each process has one file, replaced
atomically, in the folder that `SHOEHORN_MEMORY_DIR` names; it never raises into the engine.

Source of the templates: vLLM 0.32.0, v1/worker/gpu_worker.py, v1/worker/gpu/model_runner.py, v1/core/kv_cache_utils.py,
model_executor/offloader/; and `quant_state` beside this file.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from shoehorn_vllm.protocol import MEMORY_DIR_VARIABLE
from shoehorn_vllm.telemetry import quant_state

_GIB = 1 << 30
_NUMBER = r"(-?[\d.]+)"
_CONSUMED = re.compile(rf"Actual usage is {_NUMBER} GiB for consumed memory .*?{_NUMBER} GiB for peak activation, and "
                       rf"{_NUMBER} GiB for CUDAGraph memory", re.DOTALL)
_PREFETCHED = re.compile(rf"Total GPU memory saved: {_NUMBER} GB, Static buffer pool: {_NUMBER} GB")


def figures(template: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Extract the figures of a log record by name; empty for most records. Sizes in bytes."""
    if template.startswith("Model loading took"):
        return {"weights_bytes": _bytes(arguments[0])}
    if template == quant_state.TEMPLATE:
        return {"quant_state_bytes": int(arguments[0])}
    if template.startswith("Available KV cache memory"):
        return {"kv_cache_bytes": _bytes(arguments[0])}
    if template.startswith("Graph capturing finished"):  # logged twice; the later one is the real capture
        return {"cuda_graphs_bytes": _bytes(arguments[1])}
    if "KV cache size: %s tokens" in template:
        return {"kv_cache_tokens": int(str(arguments[1]).replace(",", "")), "max_concurrency": float(arguments[3])}
    if template.startswith("Total CPU offloaded parameters"):
        return {"offloaded_bytes": _bytes(arguments[0])}
    if template.startswith("[PrefetchOffloader]") and (match := _PREFETCHED.search(template)):
        return {"offloaded_bytes": round(float(match[1]) * 1e9), "offload_buffer_bytes": round(float(match[2]) * 1e9)}
    if "for consumed memory" in template and (match := _CONSUMED.search(template)):
        # the peak includes the estimate of the graphs, so activations alone are unknown
        return {"consumed_bytes": _bytes(match[1]), "peak_activation_bytes": _bytes(match[2])}
    return {}


def _bytes(gib: object) -> int:
    return round(float(str(gib)) * _GIB)


class MemoryLogHandler(logging.Handler):
    """Saves the figures of this process."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._pid, self._figures = 0, {}  # type: int, dict[str, Any]

    def emit(self, record: logging.LogRecord) -> None:
        """Save the figures of one record, if it has any."""
        directory = os.environ.get(MEMORY_DIR_VARIABLE)
        arguments = record.args if isinstance(record.args, tuple) else ()
        try:
            new = figures(str(record.msg), arguments)
            if not new or not directory:
                return
            if self._pid != os.getpid():  # a fork inherits the handler, not the figures
                self._pid, self._figures = os.getpid(), {}
            self._figures |= new
            document = {"process": getattr(record, "vllm_process_name", record.processName), **self._figures}
            path = Path(directory) / f"{self._pid}.json"
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(document), encoding="utf-8")
            partial.replace(path)
        except (OSError, ValueError, TypeError, IndexError):  # a changed template or full disk must not stop vLLM
            self.handleError(record)
