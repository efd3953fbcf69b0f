"""Calibrated quantization of one decoder layer.

Rules: every weight is quantized against the inputs that it gets from the layers before it, quantized already; a weight
that calibration never or hardly reaches, as of a rare expert, keeps the data-free result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch

from shoehorn.int4 import quantizer
from shoehorn.int4.calibration import gptq
from shoehorn.int4.calibration.budget import Budget
from shoehorn.int4.calibration.inputs import Forward, Span, collect, is_experts, passes, sources, spans

MIN_TOKENS = 64
"""Fewest calibration inputs of a weight: with fewer, error feedback would fit chance."""


@dataclass
class QuantizedWeight:
    """Result of one weight.

    Attributes:
        packed: int32 [rows, columns / 8], in host memory.
        scale: of the stored dtype, [rows, columns / group].
        calibrated: whether inputs reached it.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    calibrated: bool = True
    _sums: dict[str, float] = field(default_factory=lambda: {"error": 0.0, "free": 0.0, "norm": 0.0})

    def add(self, error: float, free: float, norm: float) -> None:
        """Add squared errors and norms of outputs: calibrated, data-free, unquantized."""
        for name, value in (("error", error), ("free", free), ("norm", norm)):
            self._sums[name] += value

    def output_error(self, kind: str = "error") -> float:
        """Return |(w - w') x| / |w x| over the calibration inputs; of the data-free result for `free`."""
        return float((self._sums[kind] / (self._sums["norm"] or 1.0)) ** 0.5)


def quantize_layer(layer: torch.nn.Module, names: Iterable[str], group: int, scale_dtype: torch.dtype, budget: Budget,
                   run_once: Forward, forward: Forward, count: Callable[[float], None]) -> dict[str, QuantizedWeight]:
    """Quantize the weights of a loaded layer and put the values that the engine will use into it.

    Args:
        names: parameters to quantize, those of experts as in checkpoints.
        run_once: runs the layer with one sequence.
        forward: runs it with all.
        count: called with the finished share of the layer's work, in parts that sum to 1.

    Raises:
        ValueError: a weight is not finite.
    """
    results: dict[str, QuantizedWeight] = {}
    every_span = spans(sources(layer, names, run_once), budget.columns, group)
    plan = list(passes(every_span, budget.pass_bytes))
    cost = {id(span): (span.end - span.begin) ** 2 * sum(weight_of(layer, name).shape[0] for name in span.source.names)
            for span in every_span}
    total = sum(cost.values()) or 1
    for members in plan:
        collect(layer, members, forward)
        count(0.5 / len(plan))
        for span in members:
            _quantize_span(layer, span, group, scale_dtype, budget, results)
            span.hessian = None
            count(0.5 * cost[id(span)] / total)
    for name, result in results.items():
        weight = weight_of(layer, name)
        for row in range(0, len(weight), budget.rows):
            rows = slice(row, row + budget.rows)
            weight[rows] = quantizer.dequantize(result.packed[rows].to(weight.device),
                                                result.scale[rows].to(weight.device), 4).to(weight.dtype)
    return results


def weight_of(layer: torch.nn.Module, name: str) -> torch.Tensor:
    """Return a weight by its name in checkpoints; of an expert a view of its part of the module's tensor."""
    owner, _, kind = name.removesuffix(".weight").rpartition(".")
    prefix, _, number = owner.rpartition(".")
    if number.isdigit() and is_experts(experts := layer.get_submodule(prefix)):
        if kind == "down_proj":
            return experts.get_parameter("down_proj").data[int(number)]
        both = experts.get_parameter("gate_up_proj").data[int(number)]
        half = both.shape[0] // 2
        return both[:half] if kind == "gate_proj" else both[half:]
    return layer.get_parameter(name).data


def output_errors(results: Mapping[str, QuantizedWeight]) -> dict[str, list[float]]:
    """Return for each calibrated weight its output error, calibrated and data-free, with five digits."""
    return {name: [float(f"{each.output_error(kind):.5g}") for kind in ("error", "free")]
            for name, each in results.items() if each.calibrated}


def _quantize_span(layer: torch.nn.Module, span: Span, group: int, scale_dtype: torch.dtype, budget: Budget,
                   results: dict[str, QuantizedWeight]) -> None:
    hessian, span.hessian = span.hessian, None
    factor = None
    if hessian is not None and span.tokens >= MIN_TOKENS and bool(hessian.diagonal().sum() > 0):
        factor = gptq.Factor(hessian, group)
    del hessian
    weights = [weight_of(layer, name) for name in span.source.names]
    for name, weight in zip(span.source.names, weights, strict=True):
        result = results.setdefault(name, _empty(weight, group, scale_dtype))
        result.calibrated = result.calibrated and factor is not None
    stacked = torch.cat([weight[:, span.begin:span.end] for weight in weights])  # one walk over the columns for all
    edges = [0, *accumulate(len(weight) for weight in weights)]
    for row in range(0, len(stacked), budget.rows):
        part = stacked[row:row + budget.rows]
        free = quantizer.quantize(part, 4, group, scale_dtype)
        restored = quantizer.dequantize(free.packed, free.scale, 4)
        if factor is None:
            scale = free.scale.float().repeat_interleave(group, 1)
            codes = gptq.Codes((restored / scale).round().to(torch.int8), free.scale, torch.zeros(len(part)),
                               torch.zeros(len(part)))
        else:
            codes = gptq.quantize(part, factor, 4, scale_dtype)
            free_error = gptq.squared_error(part.float() - restored, factor)
        for name, (begin, end) in zip(span.source.names, pairwise(edges), strict=True):
            own = slice(max(begin, row) - row, min(end, row + len(part)) - row)
            if own.start >= own.stop:
                continue
            result, rows = results[name], slice(max(begin, row) - begin, min(end, row + len(part)) - begin)
            result.packed[rows, span.begin // 8:span.end // 8] = quantizer.pack(codes.codes[own], 4)
            result.scale[rows, span.begin // group:span.end // group] = codes.scale[own]
            if factor is not None:
                result.add(*(float(each[own].sum(dtype=torch.float64))
                             for each in (codes.squared_error, free_error, codes.squared_norm)))


def _empty(weight: torch.Tensor, group: int, scale_dtype: torch.dtype) -> QuantizedWeight:
    rows, columns = weight.shape
    return QuantizedWeight(torch.empty(rows, columns // 8, dtype=torch.int32),
                           torch.empty(rows, columns // group, dtype=scale_dtype))
