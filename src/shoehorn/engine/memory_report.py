"""What the engine says of its memory, beside what was expected: read after the load, compared, and put into words.

Rules: the engine's figures come from the handler in `shoehorn_vllm.telemetry.memory_log`; bitsandbytes' state is
apart from the weights where the engine said it, and else is part of them; the total is what NVML shows; framework is
what the others leave of it, so that the parts add up to the total. Activations are a reserve, resident only under load,
and stand outside of the total's parts until then.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.units import MIB, format_size
from shoehorn.hardware.types import Hardware
from shoehorn.planner.memory.breakdown import VramParts
from shoehorn.runtime.run_dir import RunDir

TOLERANCE = 0.10
"""A part that differs by more is a warning, unless it is small."""

_SMALL_BYTES = 256 * MIB
_RANK = re.compile(r"Worker(?:_PP(\d+))?(?:_TP(\d+))?")


@dataclass(frozen=True)
class Row:
    """One part of one GPU. `measured_bytes` is None where the engine does not say it."""

    gpu: int
    part: str
    expected_bytes: int
    measured_bytes: int | None

    @property
    def differs(self) -> bool:
        """Whether the difference is worth a warning."""
        if self.measured_bytes is None:
            return False
        difference = abs(self.measured_bytes - self.expected_bytes)
        return difference > _SMALL_BYTES and difference > TOLERANCE * max(self.expected_bytes, self.measured_bytes)


def prepare(run_dir: Path) -> dict[str, str]:
    """Write the engine's logging configuration and clear old reports; returns the variables that the engine needs.

    The configuration is vLLM's own (vllm/logger.py), with the handler beside its stream.
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
                     "memory": {"class": "shoehorn_vllm.telemetry.memory_log.Handler"}},
        "loggers": {"vllm": {"handlers": ["vllm", "memory"], "level": "INFO", "propagate": False}}}
    write_atomic(config, json.dumps(document, indent=1) + "\n")
    return {"VLLM_LOGGING_CONFIG_PATH": str(config), "SHOEHORN_MEMORY_DIR": str(reports)}


def read(run_dir: Path, gpus: int) -> tuple[Mapping[int, Mapping[str, Any]], int]:
    """(figures by GPU in the order of the ranks, KV cache tokens; 0 where unknown)."""
    found: dict[int, dict[str, Any]] = {}
    tokens = 0
    for path in sorted(RunDir(run_dir).engine_memory.glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # its process is just replacing or has lost it
        tokens = max(tokens, int(document.get("kv_cache_tokens", 0)))
        if "weights_bytes" not in document:
            continue
        rank = _RANK.match(str(document.get("process", "")))
        stage, part = (int(rank[1] or 0), int(rank[2] or 0)) if rank else (0, 0)
        found[len(found) if gpus > 1 and rank is None else stage * gpus + part] = document
    return {index: found[key] for index, key in enumerate(sorted(found))}, tokens


def compare(expected: Sequence[VramParts], figures: Mapping[int, Mapping[str, Any]], used: Sequence[int],
            ) -> list[Row]:
    """The rows of every GPU.

    Args:
        used: bytes that the appliance holds of each GPU by NVML.
    """
    rows = []
    for gpu, parts in enumerate(expected):
        said, total = figures.get(gpu, {}), used[gpu] if gpu < len(used) else None
        held = parts.weights_bytes + parts.embeddings_bytes + parts.offload_buffer_bytes
        expected_by_part = {"weights": held, "quant_state": parts.quant_state_bytes,
                            "kv_cache": parts.kv_cache_bytes, "cuda_graphs": parts.cuda_graphs_bytes}
        measured = {"weights": said.get("weights_bytes"), "quant_state": said.get("quant_state_bytes"),
                    "kv_cache": said.get("kv_cache_bytes"),
                    "cuda_graphs": said.get("cuda_graphs_bytes", 0 if "weights_bytes" in said else None)}
        if measured["weights"] is None or measured["quant_state"] is None:
            expected_by_part["weights"] += expected_by_part.pop("quant_state")
            del measured["quant_state"]
        else:
            measured["weights"] -= measured["quant_state"]  # the engine counts both as one
        known = None if None in measured.values() or total is None else max(
            0, total - sum(size for size in measured.values() if size))
        rows += [Row(gpu, part, size, measured[part]) for part, size in expected_by_part.items()]
        rows.append(Row(gpu, "framework", parts.framework_bytes, known))
        rows.append(Row(gpu, "activations", parts.activations_bytes, None))
        rows.append(Row(gpu, "total", parts.total_bytes - parts.activations_bytes, total))
    return rows


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as lines for the log."""
    lines = [f"{'GPU':>3}  {'part':12}{'expected':>12}{'measured':>12}"]
    for row in rows:
        measured = "unknown" if row.measured_bytes is None else format_size(row.measured_bytes)
        mark = "  <- differs by more than 10 %" if row.differs else ""
        lines.append(f"{row.gpu:>3}  {row.part:12}{format_size(row.expected_bytes):>12}{measured:>12}{mark}")
    return lines


def offload_complaint(expected_bytes: int, figures: Mapping[int, Mapping[str, Any]]) -> str:
    """What is wrong with the offload, in words; empty when the engine did what was planned.

    vLLM has ignored --cpu-offload-gb in some versions without a word, and then the card overflows or is slow elsewhere.
    """
    done = sum(int(said.get("offloaded_bytes", 0)) for said in figures.values())
    if not expected_bytes or not figures or done >= expected_bytes * (1 - TOLERANCE):
        return ""
    return (f"{format_size(expected_bytes)} of the weights were planned into host memory, and the engine put "
            f"{format_size(done)} there")


def taken(before: Hardware, now: Hardware, gpus: int) -> list[int]:
    """What the appliance took of each GPU since the plan, by NVML, in the order in which the plan uses them."""
    free = {gpu.uuid: gpu.free_bytes for gpu in now.gpus}
    used = sorted(before.gpus, key=lambda gpu: (-gpu.total_bytes, gpu.index))[:gpus]
    return [max(0, gpu.free_bytes - free[gpu.uuid]) for gpu in used if gpu.uuid in free]
