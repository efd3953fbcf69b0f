"""Calibration of a conversion: layer after layer, resumable, with its state in a folder within the conversion.

Rules:
- `advance` quantizes layers in order and writes each one's codes and scales to one file, which is synced and hashed
  before `progress.json` records it; `release` deletes the files that converted shards have taken over;
- a killed calibration resumes with the interrupted layer; if its files are damaged, or needed again, it starts over;
  the result is the same bytes on the same device;
- some sequences that calibration does not use also pass through the unquantized layers: at the end, the KL divergence
  of the next token between both is the measured loss of this model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from shoehorn.common.atomic_file import sync_directory, write_atomic
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.common.units import format_size
from shoehorn.int4.calibration import layer as layer_module
from shoehorn.int4.calibration import loss
from shoehorn.int4.calibration.budget import Budget
from shoehorn.int4.calibration.decoder import Decoder, layer_name
from shoehorn.int4.calibration.hidden import HiddenStates
from shoehorn.int4.layout import CALIBRATION_FOLDER

log = logging.getLogger("convert")

CHECKED_SEQUENCES = 4
"""Sequences that measure the loss instead of calibrating."""

_PROGRESS = "progress.json"


@dataclass(frozen=True)
class Task:
    """Everything that a calibration depends on.

    Attributes:
        source: folder of the original.
        directory: folder of the conversion.
        ids: int64 [sequences, length]; the last CHECKED_SEQUENCES of them measure the loss.
        key: identifies text, model and options: state with another key is discarded.
        weights: names of the 4-bit weights in the checkpoint.
        scale_dtypes: dtype of the stored scales, by the dtype of the original.
    """

    source: Path
    directory: Path
    ids: torch.Tensor
    key: str
    group: int
    scale_dtype: torch.dtype
    weights: frozenset[str]
    budget: Budget


@dataclass
class _Progress:
    """Recorded state: layers done, CRC-32 of the next layer's inputs, and results by layer."""

    key: str
    done: int = 0
    crcs: list[int | None] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)
    data_free: list[str] = field(default_factory=list)
    loss: dict[str, float] | None = None


class Calibration:
    """The calibration of one conversion.

    Args:
        count: called with the finished share of the whole.

    Raises:
        SettingsError: the model is unsupported.
    """

    def __init__(self, task: Task, count: Callable[[float], None]) -> None:
        self._task, self._count = task, count
        self._decoder = Decoder(task.source, task.budget.device, task.budget.dtype)
        self._folder = task.directory / CALIBRATION_FOLDER
        self._folder.mkdir(exist_ok=True)
        (self._folder / "reference").mkdir(exist_ok=True)
        sequences, length = task.ids.shape
        width = self._decoder.hidden_size
        self._hidden = HiddenStates(self._folder, (sequences, length, width), task.budget.dtype)
        self._reference = HiddenStates(self._folder / "reference", (self._checked, length, width), task.budget.dtype)
        self._calls: list[dict[str, Any]] = []
        self._progress = self._resumed()

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self._decoder.layers

    @property
    def _checked(self) -> int:
        return min(CHECKED_SEQUENCES, len(self._task.ids) - 1)

    @property
    def results(self) -> dict[str, Any]:
        """Errors and loss for the journal; complete after the last layer."""
        state = self._progress
        return {"output_errors": state.errors, "data_free": state.data_free, "loss": state.loss}

    def advance(self, layers: Iterable[int]) -> None:
        """Quantize all layers up to the highest of `layers` that are not quantized yet.

        Raises:
            ModelUnavailableError: a tensor of the original is missing or damaged.
        """
        layers = [index for index in layers if index < self.layers]
        last = max(layers, default=-1)
        needed = {index for index in layers if index < self._progress.done}
        if any(not self._is_intact(index) for index in needed):
            log.warning("Calibrated layer missing or damaged, calibrating again")
            self._progress = self._restart()
        torch.set_num_threads(self._task.budget.threads)  # the workers of the shards set it to 1 for the process
        with torch.inference_mode():
            while self._progress.done <= last:
                try:
                    self._quantize(self._progress.done)
                except torch.OutOfMemoryError as error:
                    self._reduce(error)

    def has(self, name: str) -> bool:
        """Return whether a weight is calibrated here."""
        return name in self._task.weights and self._layer_of.get(name, self.layers) < self.layers

    def rows(self, name: str, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return packed codes and scales of some rows of a weight of a quantized layer."""
        path = self._path(self._layer_of[name])
        with safe_open(path, "pt") as file:
            return (file.get_slice(f"{name}_packed")[begin:end], file.get_slice(f"{name}_scale")[begin:end])

    def release(self, layers: Iterable[int]) -> None:
        """Delete the files of layers whose shards are recorded."""
        for index in layers:
            self._path(index).unlink(missing_ok=True)

    @property
    def _layer_of(self) -> Mapping[str, int]:
        return self._decoder.layer_of

    def _path(self, index: int) -> Path:
        return self._folder / f"layer-{index:05d}.safetensors"

    def _quantize(self, index: int) -> None:
        task, budget, started = self._task, self._task.budget, time.monotonic()
        names = {layer_name(name): name for name, layer in self._layer_of.items()
                 if layer == index and name in task.weights}
        inputs, outputs = self._hidden.of(index), self._hidden.of(index + 1)
        call, share = self._call(index), 1.0 / self.layers
        calibrating = len(task.ids) - self._checked

        def run(module: torch.nn.Module, source: torch.Tensor, target: torch.Tensor | None, end: int) -> None:
            for begin in range(0, end, budget.batch):
                part = source[begin:min(begin + budget.batch, end)].to(budget.device)
                result = module(part, **call)
                result = result[0] if isinstance(result, tuple) else result
                if target is not None:
                    target[begin:begin + len(part)] = result.to(target.device)

        with self._decoder.loaded(index) as module:
            run(module, self._reference.of(index), self._reference.of(index + 1), self._checked)
            try:
                results = layer_module.quantize_layer(
                    module, names, task.group, task.scale_dtype, budget, lambda: run(module, inputs, None, 1),
                    lambda: run(module, inputs, None, calibrating), lambda part: self._count(0.8 * share * part))
            except ValueError as error:
                raise ModelUnavailableError(f"Layer {index}: a weight {error}.",
                                            "The checkpoint is damaged: choose another MODEL_ID or MODEL_REVISION.",
                                            code="invalid_weights") from error
            run(module, inputs, outputs, len(task.ids))
        self._record(index, {names[name]: result for name, result in results.items()})
        self._count(0.2 * share)
        errors = [pair for name in names.values() if (pair := self._progress.errors.get(name))]
        if errors:
            log.info("Calibrated layer=%d of=%d output_error=%.4f data_free=%.4f seconds=%.1f", index + 1, self.layers,
                     *(sum(pair[kind] for pair in errors) / len(errors) for kind in (0, 1)), time.monotonic() - started)

    def _reduce(self, error: torch.OutOfMemoryError) -> None:
        """Halve the memory of the matrices H after another program took memory of the GPU."""
        budget = self._task.budget
        if budget.columns < 2 * self._task.group:
            raise ModelUnavailableError("Calibration: the GPU is out of memory.",
                                        "Free memory of the GPU, or set CALIBRATION=off.",
                                        code="calibration_out_of_memory") from error
        torch.cuda.empty_cache()
        columns = budget.columns // 2 // self._task.group * self._task.group
        self._task = replace(self._task, budget=replace(
            budget, batch=max(1, budget.batch // 2), columns=columns, pass_bytes=budget.pass_bytes // 2,
            rows=max(64, budget.rows // 2)))
        log.warning("GPU out of memory, repeating the layer with less columns=%d", columns)

    def _record(self, index: int, results: Mapping[str, layer_module.QuantizedWeight]) -> None:
        tensors = {}
        for name, result in results.items():
            tensors[f"{name}_packed"] = result.packed
            tensors[f"{name}_scale"] = result.scale
        path = self._path(index)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(partial, path)
        sync_directory(self._folder)
        state = self._progress
        state.files[str(index)] = digest
        state.errors |= layer_module.output_errors(results)
        state.data_free += [name for name, result in results.items() if not result.calibrated]
        state.crcs = [self._hidden.crc(index + 1), self._reference.crc(index + 1)]
        state.done = index + 1
        if state.done == self.layers:
            state.loss = loss.measure(self._decoder, self._reference.of(state.done),
                                      self._hidden.of(state.done)[-self._checked:])
            self._log_loss(state.loss)
        self._write()

    def _log_loss(self, measured: Mapping[str, float] | None) -> None:
        if measured is None:
            log.info("Loss not measured: the original's output head is deleted already")
            return
        high = measured["kl_mean"] > loss.WARNING_KL
        log.log(logging.WARNING if high else logging.INFO,
                "Measured loss of the INT4 layers%s kl_mean=%.4f kl_p99=%.3f same_top1=%.3f positions=%d",
                ": high, consider --group-size 32 or QUANTIZATION=none" if high else "", measured["kl_mean"],
                measured["kl_p99"], measured["same_top1"], measured["positions"])

    def _call(self, index: int) -> dict[str, Any]:
        if not self._calls:
            self._begin(write=False)
        return self._calls[index]

    def _begin(self, *, write: bool) -> None:
        """Compute the arguments of the layers and, for a new calibration, the first layer's inputs."""
        ids = self._task.ids if write else self._task.ids[:1]
        hidden, reference = self._hidden.of(0), self._reference.of(0)
        for number, row in enumerate(ids):
            embedded, self._calls = self._decoder.begin(row.unsqueeze(0))
            if write:
                hidden[number] = embedded[0].to(hidden.device)
        if write:
            reference.copy_(hidden[len(ids) - self._checked:])
        self._decoder.end_begin()

    def _resumed(self) -> _Progress:
        try:
            state = _Progress(**json.loads((self._folder / _PROGRESS).read_text(encoding="utf-8")))
            if state.key == self._task.key and (state.done == self.layers or
                                                state.crcs == [self._hidden.crc(state.done),
                                                               self._reference.crc(state.done)]):
                if state.done:
                    log.info("Resuming the calibration layer=%d of=%d", state.done + 1, self.layers)
                self._count(state.done / self.layers)
                return state
        except FileNotFoundError:
            pass
        except (ValueError, TypeError) as error:
            log.warning("Invalid calibration state, calibrating again error=%s", error)
        return self._restart()

    def _restart(self) -> _Progress:
        for path in self._folder.glob("layer-*"):
            path.unlink()
        self._progress = _Progress(self._task.key)
        budget = self._task.budget
        sequences, length = self._task.ids.shape
        log.info("Calibrating device=%s sequences=%d length=%d memory=%s columns=%d hidden_states=%s", budget.device,
                 sequences, length, format_size(budget.total_bytes), budget.columns, format_size(self._hidden.bytes))
        torch.set_num_threads(budget.threads)
        with torch.inference_mode():
            self._begin(write=True)
        self._progress.crcs = [self._hidden.crc(0), self._reference.crc(0)]
        self._write()
        return self._progress

    def _write(self) -> None:
        write_atomic(self._folder / _PROGRESS, json.dumps(vars(self._progress)))

    def _is_intact(self, index: int) -> bool:
        try:
            with self._path(index).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == self._progress.files.get(str(index))
        except FileNotFoundError:
            return False
