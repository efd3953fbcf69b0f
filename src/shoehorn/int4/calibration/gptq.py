"""GPTQ with group-aware activation order, weighted scale search and coordinate descent.

For the rows w of a weight and H = sum of x x^T over the calibration inputs x, it searches codes q and scales s for
which (w - w') H (w - w')^T, the squared error of the layer's outputs, is small. w' = s q for each group of columns.

1. Order: groups of columns by their largest diagonal entry of H, and within a group its columns, both descending.
   Groups stay whole, so the stored format needs no permutation (`g_idx`).
2. Each group gets its scale when its turn comes: the best of several clipped ranges, with errors weighted by the
   diagonal.
3. Column by column, the rounding error is compensated by the columns that follow (GPTQ).
4. Sweeps of coordinate descent over codes and scales. No step increases the error.

Sources: Frantar et al., arXiv 2210.17323 (3); Gafni et al., arXiv 2505.14638, as in gptqmodel 7.7.0
quantization/gar.py (1); llmcompressor 0.14.0 modifiers/gptq/gptq_quantize.py (damping, dead columns); Behdin et al.,
arXiv 2309.01885 (4). Both libraries run their arithmetic inside pipelines that hold a whole model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DAMPING = 0.01
"""Share of the mean diagonal that is added to the diagonal, so that H can be inverted."""

SWEEPS = 2
"""Sweeps of coordinate descent."""

_CLIPPED = tuple(share / 20 for share in range(10, 21))
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Codes:
    """Result for some rows.

    Attributes:
        codes: int8 [rows, columns], from -2^(bits - 1) to 2^(bits - 1) - 1.
        scale: of the requested dtype, [rows, columns / group].
        squared_error: |(w - w') x|^2, summed over the calibration inputs, [rows].
        squared_norm: |w x|^2, likewise.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    squared_error: torch.Tensor
    squared_norm: torch.Tensor

    def restored(self) -> torch.Tensor:
        """Return the float32 [rows, columns] that the engine will use."""
        rows, columns = self.codes.shape
        groups = self.codes.view(rows, self.scale.shape[1], -1).float()
        return (groups * self.scale.float().unsqueeze(-1)).view(rows, columns)


class Factor:
    """H of some columns in their order, and the factor of its inverse. Shared by the rows of all weights of one input.

    Args:
        hessian: float32 [columns, columns], sum of x x^T; overwritten.
        group: weights that share a scale; divides columns.
    """

    def __init__(self, hessian: torch.Tensor, group: int, damping: float = DAMPING) -> None:
        self.group = group
        diagonal = hessian.diagonal()
        mean = diagonal.mean()
        if not mean > 0:
            raise ValueError("no calibration input")
        diagonal.add_(damping * mean)  # also for inputs that are always zero
        self.order = _order(diagonal, group)
        self.hessian = hessian[self.order][:, self.order]
        self.upper = _inverse_factor(self.hessian)


def quantize(weight: torch.Tensor, factor: Factor, bits: int, scale_dtype: torch.dtype, sweeps: int = SWEEPS) -> Codes:
    """Quantize rows on the device of `factor`.

    Args:
        weight: floating point, [rows, columns].

    Raises:
        ValueError: a weight is not finite.
    """
    exact = weight.float()[:, factor.order]
    if not bool(exact.isfinite().all()):
        raise ValueError("contains a value that is not finite")
    half = float(1 << bits - 1)
    codes, scale = _with_feedback(exact, factor, half, scale_dtype)
    missing = exact - _restored(codes, scale)
    for _ in range(sweeps):
        _sweep(codes, scale, missing, factor, half, scale_dtype)
    position = factor.order.argsort()
    first = factor.order.view(-1, factor.group)[:, 0] // factor.group
    return Codes(codes.to(torch.int8)[:, position], scale.to(scale_dtype)[:, first.argsort()],
                 _squares(missing, factor), _squares(exact, factor))


def squared_error(missing: torch.Tensor, factor: Factor) -> torch.Tensor:
    """Return |missing x|^2 over the calibration inputs, [rows].

    Args:
        missing: float32 [rows, columns] in the model's order.
    """
    return _squares(missing[:, factor.order], factor)


def _squares(ordered: torch.Tensor, factor: Factor) -> torch.Tensor:
    return (ordered @ factor.hessian).mul_(ordered).sum(1).clamp_min_(0.0)


def _order(diagonal: torch.Tensor, group: int) -> torch.Tensor:
    values, inner = diagonal.view(-1, group).sort(dim=1, descending=True, stable=True)
    outer = values[:, 0].sort(descending=True, stable=True).indices
    start = torch.arange(len(values), device=diagonal.device).unsqueeze(1) * group
    return (inner + start)[outer].reshape(-1)


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Return upper triangular U with U^T U = H^-1, with more damping if H is close to singular."""
    lower: torch.Tensor
    upper: torch.Tensor
    lower, failed = torch.linalg.cholesky_ex(hessian)
    while int(failed):
        hessian.diagonal().mul_(1.1)
        lower, failed = torch.linalg.cholesky_ex(hessian)
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    if int(failed):  # the inverse lost its definiteness to rounding
        hessian.diagonal().mul_(1.1)
        return _inverse_factor(hessian)
    return upper


def _with_feedback(exact: torch.Tensor, factor: Factor, half: float, scale_dtype: torch.dtype,
                   ) -> tuple[torch.Tensor, torch.Tensor]:
    """Run steps 2 and 3. Returns codes [rows, columns] and stored scales [rows, groups], both as float32."""
    rows, columns = exact.shape
    group, upper, weights = factor.group, factor.upper, factor.hessian.diagonal()
    work, codes = exact.clone(), torch.empty_like(exact)
    scales = exact.new_empty(rows, columns // group)
    for begin in range(0, columns, group):
        end = begin + group
        scale = _scale(work[:, begin:end], weights[begin:end], half, scale_dtype)
        scales[:, begin // group] = scale
        block = work[:, begin:end].T.contiguous()  # [columns, rows]: a column is contiguous
        own = torch.empty_like(block)
        for column in range(group):
            code = torch.div(block[column], scale, out=own[column]).round_().clamp_(-half, half - 1)
            error = block[column].addcmul_(code, scale, value=-1).div_(upper[begin + column, begin + column])
            block[column + 1:].addr_(upper[begin + column, begin + column + 1:end], error, alpha=-1)
        codes[:, begin:end] = own.T
        work[:, end:].addmm_(block.T, upper[begin:end, end:], alpha=-1)  # the block has become its errors
    return codes, scales


def _scale(values: torch.Tensor, weights: torch.Tensor, half: float, dtype: torch.dtype) -> torch.Tensor:
    """Search the best scale of one group in each row, [rows]; its sign gives the largest weight the code -half."""
    low, high = values.amin(1), values.amax(1)
    widest = torch.where(-low >= high, low, high) / -half
    widest[widest == 0] = 1.0
    best, best_gain = widest, torch.full_like(widest, -1.0)
    for share in _CLIPPED:
        codes = (values / (widest * share).unsqueeze(1)).round_().clamp_(-half, half - 1)
        fit = (values * codes) @ weights
        size = (codes * codes @ weights).clamp_min_(1e-20)
        gain = fit * fit / size  # weighted |w|^2 minus the weighted error
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best = torch.where(better, fit / size, best)
    return _stored(best, dtype)


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to the stored dtype, as float32; 1 for scales too small to divide by."""
    scale = scale.to(dtype).float()
    return torch.where(scale.abs() < _TINY, torch.ones_like(scale), scale)


def _restored(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (codes.view(len(codes), scale.shape[1], -1) * scale.unsqueeze(-1)).view(codes.shape)


def _sweep(codes: torch.Tensor, scale: torch.Tensor, missing: torch.Tensor, factor: Factor, half: float,
           scale_dtype: torch.dtype) -> None:
    """Improve each code, then the scale of its group, given all others. Updates the first three arguments.

    The slope of column j is what `missing` lacks along it: the best change of w'_j alone is slope / H[j, j].
    """
    group, hessian = factor.group, factor.hessian
    diagonal = hessian.diagonal().tolist()
    for begin in range(0, codes.shape[1], group):
        end = begin + group
        own = hessian[begin:end, begin:end]
        slope = (missing @ hessian[:, begin:end]).T.contiguous()  # [columns, rows]: a column is contiguous
        current, step = codes[:, begin:end].T.contiguous(), scale[:, begin // group].contiguous()
        before, reciprocal = current * step, step.reciprocal()
        for column in range(group):
            code = torch.addcmul(current[column], slope[column], reciprocal, value=1 / diagonal[begin + column])
            code.round_().clamp_(-half, half - 1)
            slope.addr_(own[column], (code - current[column]).mul_(step), alpha=-1)
            current[column] = code
        fit = (current * slope).sum(0)
        size = (own @ current).mul_(current).sum(0).clamp_min_(1e-20)
        better = _stored(step + fit / size, scale_dtype)
        change = better - step
        lowers = change * (change * size - 2 * fit) < 0  # after rounding to the stored dtype
        step = torch.where(lowers, better, step)
        codes[:, begin:end], scale[:, begin // group] = current.T, step
        missing[:, begin:end] += (before - current * step).T
