"""Comparison of the engine's memory with the plan, after the load.

Rules: the engine's figures come from the handler in `shoehorn_vllm.telemetry.memory_log`; the quantization state of
bitsandbytes is a part of its own if the engine reports it, otherwise part of the weights; the total comes from NVML;
the framework is the rest, so that the parts add up to the total. Activations are a reserve that is in use under load
only, so the total excludes them.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.units import MIB, format_size
from shoehorn.hardware import detect
from shoehorn.hardware.types import Gpu, Hardware
from shoehorn.planner.memory.device import DeviceMemory
from shoehorn.planner.plan import Plan
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import StateFile
from shoehorn_vllm.protocol import MEMORY_DIR_VARIABLE, MEMORY_HANDLER_CLASS

log = logging.getLogger("engine")

TOLERANCE = 0.10
"""Relative difference above which a part is a warning, unless it is small."""

_SMALL_BYTES = 256 * MIB
_RANK = re.compile(r"Worker(?:_PP(\d+))?(?:_TP(\d+))?")


@dataclass(frozen=True)
class Row:
    """One part of one GPU.

    Attributes:
        gpu: number in the plan; index: of NVML, as in the metrics.
        measured_bytes: None if unknown.
    """

    gpu: int
    part: str
    expected_bytes: int
    measured_bytes: int | None
    index: int = 0

    @property
    def differs(self) -> bool:
        """True if the difference deserves a warning."""
        if self.measured_bytes is None:
            return False
        difference = abs(self.measured_bytes - self.expected_bytes)
        return difference > _SMALL_BYTES and difference > TOLERANCE * max(self.expected_bytes, self.measured_bytes)


def prepare(run_dir: Path) -> dict[str, str]:
    """Write the engine's logging configuration and remove old reports; return the engine's variables for both.

    The configuration is vLLM's own (vllm/logger.py) with one more handler.
    """
    reports, config = RunDir(run_dir).engine_memory, RunDir(run_dir).engine_logging
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    line = "(%(vllm_process_name)s pid=%(process)d) %(levelname)s %(asctime)s [%(fileinfo)s:%(lineno)d] %(message)s"
    document = {
        "version": 1, "disable_existing_loggers": False,
        "formatters": {"vllm": {"()": "vllm.logging_utils.NewLineFormatter", "datefmt": "%m-%d %H:%M:%S",
                                "format": line}},
        "handlers": {"vllm": {"class": "logging.StreamHandler", "formatter": "vllm", "level": "INFO",
                              "stream": "ext://sys.stdout"},
                     "memory": {"class": MEMORY_HANDLER_CLASS}},
        "loggers": {"vllm": {"handlers": ["vllm", "memory"], "level": "INFO", "propagate": False}}}
    write_atomic(config, json.dumps(document, indent=1) + "\n")
    return {"VLLM_LOGGING_CONFIG_PATH": str(config), MEMORY_DIR_VARIABLE: str(reports)}


def read(run_dir: Path, gpus: int) -> tuple[Mapping[int, Mapping[str, Any]], int]:
    """Return (figures by GPU in the order of the ranks, KV cache tokens or 0 if unknown)."""
    by_rank: dict[int, dict[str, Any]] = {}
    tokens = 0
    for path in sorted(RunDir(run_dir).engine_memory.glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # its process is replacing it
        tokens = max(tokens, int(document.get("kv_cache_tokens", 0)))
        if "weights_bytes" not in document:
            continue
        rank = _RANK.match(str(document.get("process", "")))
        stage, part = (int(rank[1] or 0), int(rank[2] or 0)) if rank else (0, 0)
        by_rank[len(by_rank) if gpus > 1 and rank is None else stage * gpus + part] = document
    return {index: by_rank[key] for index, key in enumerate(sorted(by_rank))}, tokens


def compare(expected: Sequence[DeviceMemory], figures: Mapping[int, Mapping[str, Any]], used: Sequence[int],
            indices: Sequence[int] = ()) -> list[Row]:
    """Return the rows of every GPU.

    Args:
        used: bytes of each GPU that the appliance uses, by NVML.
        indices: of NVML; empty for those of the plan.
    """
    rows = []
    for gpu, parts in enumerate(expected):
        report, total = figures.get(gpu, {}), used[gpu] if gpu < len(used) else None
        weights_bytes = parts.weights_bytes + parts.embeddings_bytes + parts.offload_buffer_bytes
        expected_by_part = {"weights": weights_bytes, "quant_state": parts.quant_state_bytes,
                            "kv_cache": parts.kv_cache_bytes, "cuda_graphs": parts.cuda_graphs_bytes}
        measured = {"weights": report.get("weights_bytes"), "quant_state": report.get("quant_state_bytes"),
                    "kv_cache": report.get("kv_cache_bytes"),
                    "cuda_graphs": report.get("cuda_graphs_bytes", 0 if "weights_bytes" in report else None)}
        if measured["weights"] is None or measured["quant_state"] is None:
            expected_by_part["weights"] += expected_by_part.pop("quant_state")
            del measured["quant_state"]
        else:
            measured["weights"] -= measured["quant_state"]  # the engine reports their sum
        framework = None if None in measured.values() or total is None else max(
            0, total - sum(size for size in measured.values() if size))
        rows += [Row(gpu, part, size, measured[part]) for part, size in expected_by_part.items()]
        rows.append(Row(gpu, "framework", parts.framework_bytes, framework))
        rows.append(Row(gpu, "activations", parts.activations_bytes, None))
        rows.append(Row(gpu, "total", parts.total_bytes - parts.activations_bytes, total))
    return [replace(row, index=indices[row.gpu] if row.gpu < len(indices) else row.gpu) for row in rows]


def table(rows: Sequence[Row]) -> list[str]:
    """Format the rows for the log."""
    lines = [f"{'GPU':>3}  {'part':12}{'expected':>12}{'measured':>12}"]
    for row in rows:
        measured = "unknown" if row.measured_bytes is None else format_size(row.measured_bytes)
        mark = "  <- differs by more than 10 %" if row.differs else ""
        lines.append(f"{row.index:>3}  {row.part:12}{format_size(row.expected_bytes):>12}{measured:>12}{mark}")
    return lines


def offload_is_short(expected_bytes: int, figures: Mapping[int, Mapping[str, Any]]) -> bool:
    """Return True if the engine offloaded less than planned.

    Some versions of vLLM ignored --cpu-offload-gb silently, which fills the GPU.
    """
    return bool(expected_bytes and figures) and offloaded_bytes(figures) < expected_bytes * (1 - TOLERANCE)


def offload_is_undone(expected_bytes: int, rows: Sequence[Row]) -> bool:
    """Return True if the engine reports offloaded weights, but the GPUs hold them.

    vLLM 0.32.0's Humming backend repacks offloaded experts onto the GPU. The limit is half of the planned offload.
    """
    excess = sum(row.measured_bytes - row.expected_bytes for row in rows
                 if row.part == "weights" and row.measured_bytes is not None)
    return bool(expected_bytes) and 2 * excess > expected_bytes


def offloaded_bytes(figures: Mapping[int, Mapping[str, Any]]) -> int:
    """Return the bytes of weights that the engine reports in host memory."""
    return sum(int(report.get("offloaded_bytes", 0)) for report in figures.values())


def used_bytes(before: Sequence[Gpu], now: Hardware) -> list[int]:
    """Return the bytes that the appliance uses of each GPU by NVML.

    Args:
        before: the plan's GPUs, as they were before the start.
    """
    free = {gpu.uuid: gpu.free_bytes for gpu in now.gpus}
    return [max(0, gpu.free_bytes - free[gpu.uuid]) for gpu in before if gpu.uuid in free]


def record(plan: Plan, states: StateFile) -> None:
    """Log and publish the memory of a loaded engine next to the plan's."""
    figures, tokens = read(states.run_dir, max(1, len(plan.vram)))
    if not plan.vram:
        states.update(kv_cache_tokens=tokens)
        return
    rows = compare(plan.vram, figures, used_bytes(plan.gpus, detect.detect()), [gpu.index for gpu in plan.gpus])
    for line in table(rows):
        log.info("memory: %s", line)
    for row in rows:
        if row.differs:
            log.warning("memory: unexpected size gpu=%d part=%s measured=%s expected=%s", row.index, row.part,
                        format_size(row.measured_bytes or 0), format_size(row.expected_bytes))
    if tokens:
        log.info("memory: kv_cache_tokens=%d expected=%d", tokens, plan.kv_cache_tokens)
    if offload_is_short(plan.offloaded_bytes, figures):
        log.warning("memory: engine offloaded less than planned offloaded=%s planned=%s",
                    format_size(offloaded_bytes(figures)), format_size(plan.offloaded_bytes))
    elif offload_is_undone(plan.offloaded_bytes, rows):
        log.warning("memory: engine reports offloaded weights, but they are on the GPU offloaded=%s planned=%s",
                    format_size(offloaded_bytes(figures)), format_size(plan.offloaded_bytes))
    states.update(memory=tuple(asdict(row) for row in rows), kv_cache_tokens=tokens,
                  offloaded_bytes=offloaded_bytes(figures))
