"""Decision whether a conversion is calibrated, and the task of its calibration.

Rules:
- `off` never calibrates; `on` and a path always do, or fail with the reason; `auto` does on a CPU if transformers
  supports the model without code from its repository and the estimated time is at most MOST_SECONDS. On a GPU it does
  not yet: no calibration was measured there to its end;
- the decision and its parameters are recorded in the journal, so a resumed conversion keeps them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from shoehorn.common.errors import ModelUnavailableError, SettingsError
from shoehorn.int4 import quantizer
from shoehorn.int4.calibration import budget as budgets
from shoehorn.int4.calibration import text
from shoehorn.int4.calibration.decoder import Decoder
from shoehorn.int4.calibration.run import CHECKED_SEQUENCES, Task
from shoehorn.int4.journal import Limits
from shoehorn.int4.layout import CALIBRATION_FOLDER
from shoehorn.model.files import LocalFiles, read_json

log = logging.getLogger("convert")

MOST_SECONDS = 3600
"""Longest estimated time of a calibration that CALIBRATION=auto starts."""

_PACKAGED = ("auto", "on", "packaged")
_IDS = "ids.safetensors"
_PASSES = 2
_SOLVE_OPERATIONS = 12
"""Operations per weight and column of its matrix: error feedback, two sweeps, and the measured errors."""


def describe(setting: str, source: Path, directory: Path, limits: Limits) -> dict[str, Any] | None:
    """Decide about a new conversion; return what its journal records, or None for a data-free one.

    Args:
        setting: CALIBRATION.
        directory: folder of the conversion, which gets the token ids, so that a resumed conversion needs no text.
        limits: of memory, CPUs and tokens.

    Raises:
        SettingsError: `on` or a path, but the model or the text is unsupported.
    """
    if setting == "off":
        return None
    try:
        return _describe(setting, source, directory, limits)
    except SettingsError as error:
        if setting != "auto":
            raise
        log.warning("Converting without calibration cause=%s", error.cause)
        return None


def task(description: Mapping[str, Any], source: Path, directory: Path, group: int,
         weights: frozenset[str]) -> Task:
    """Return the task of a described calibration.

    Raises:
        ModelUnavailableError: the state of the calibration is damaged.
    """
    try:
        ids = load_file(directory / CALIBRATION_FOLDER / _IDS)["ids"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelUnavailableError(f"{directory}: the state of the calibration is damaged ({error}).",
                                    "Remove the partial conversion: shoehorn models rm.",
                                    code="calibration_damaged") from error
    planned = dict(description["budget"])
    planned["dtype"] = quantizer.DTYPES[planned["dtype"]]
    dtype = _dtype(source)
    return Task(source, directory, ids, f"{description} {group}", group,
                torch.float16 if dtype == "F16" else torch.bfloat16, weights, budgets.Budget(**planned))


def _describe(setting: str, source: Path, directory: Path, limits: Limits) -> dict[str, Any] | None:
    config = read_json(LocalFiles(source), LocalFiles(source).names(), "config.json")
    inner = config.get("text_config") or {}
    positions = config.get("max_position_embeddings") or inner.get("max_position_embeddings")
    length = min(budgets.LENGTH, int(positions or budgets.LENGTH))
    dtype = quantizer.DTYPES[_dtype(source)]
    decoder = Decoder(source, "cpu", torch.float32)
    size = decoder.size(length)
    gpu_bytes = torch.cuda.mem_get_info()[0] if quantizer.device() == "cuda" else 0
    threads = min(torch.get_num_threads(), max(1, round(limits.cpus)) if limits.cpus else torch.get_num_threads())
    torch.set_num_threads(threads)
    budget = replace(budgets.plan(size, length, dtype, gpu_bytes, limits.host_bytes), threads=threads)
    count = budgets.sequence_count(budget.device, length, limits.tokens) + CHECKED_SEQUENCES
    sequences = text.read(source, _path(setting), count, length)
    if len(sequences.ids) <= CHECKED_SEQUENCES:
        raise SettingsError(f"CALIBRATION: the text has fewer than {(CHECKED_SEQUENCES + 1) * length} tokens.",
                            "Use a longer text.", code="calibration_no_text")
    seconds = _estimate(decoder, len(sequences.ids) * length, budget.device)
    log.info("Estimated calibration minutes=%.0f device=%s tokens=%d", seconds / 60, budget.device,
             sequences.ids.numel())
    if setting == "auto" and budget.device != "cpu":
        log.warning("Converting without calibration, which is not measured on a GPU yet; CALIBRATION=on calibrates")
        return None
    if setting == "auto" and seconds > MOST_SECONDS:
        log.warning("Converting without calibration, which would take %.1f h; CALIBRATION=on calibrates anyway",
                    seconds / 3600)
        return None
    folder = directory / CALIBRATION_FOLDER
    folder.mkdir(exist_ok=True)
    save_file({"ids": sequences.ids}, folder / _IDS)
    names = {value: name for name, value in quantizer.DTYPES.items()}
    return {"text": setting if _path(setting) else "packaged", "text_sha256": sequences.sha256,
            "sequences": len(sequences.ids), "length": length,
            "budget": {**asdict(budget), "dtype": names[budget.dtype]}}


def _estimate(decoder: Decoder, tokens: int, device: str) -> float:
    """Estimate the seconds of a calibration from the operations and the measured rate of one multiplication."""
    matrix = torch.randn(2048, 2048, device=device)
    _ = matrix @ matrix
    started = time.perf_counter()
    repeats = 3
    for _number in range(repeats):
        matrix = matrix @ matrix / 2048
    _ = float(matrix[0, 0])
    rate = repeats * 2 * 2048 ** 3 / (time.perf_counter() - started)
    return decoder.operations(tokens, _PASSES, _SOLVE_OPERATIONS) / rate


def _dtype(source: Path) -> str:
    config = read_json(LocalFiles(source), LocalFiles(source).names(), "config.json")
    name = str(config.get("dtype") or config.get("torch_dtype") or
               (config.get("text_config") or {}).get("torch_dtype") or "bfloat16")
    return {"float16": "F16", "float32": "F32"}.get(name, "BF16")


def _path(setting: str) -> Path | None:
    return None if setting in _PACKAGED else Path(setting)
