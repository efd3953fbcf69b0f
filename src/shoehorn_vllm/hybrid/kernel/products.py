"""Products of bf16 activations with INT4 or MXFP4 weights, as torch tensors on the CPU.

Rules:
- weights stay as the checkpoint has them and are read in place; nothing here keeps a copy;
- activations are quantized to int8 in groups of 32: the error of a product is some 0.5 %;
- a call blocks until its threads are done, without the interpreter's lock.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from shoehorn_vllm.hybrid.kernel import library
from shoehorn_vllm.hybrid.kernel.library import Isa, KernelError

TIMEOUT_S = 20.0
GROUPS = (32, 64, 128)
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "swigluoai": 3}
_OUTPUTS = {torch.float32: 0, torch.bfloat16: 1}


@dataclass(frozen=True)
class PackedWeights:
    """Weights of one matrix, or of the same matrix of all experts.

    Attributes:
        codes: int32 [..., rows, k / 8] or uint8 [..., rows, k / 2]; low half of a byte first. An expert is contiguous.
        scales: bf16 [..., rows, k / group] for INT4; uint8 (E8M0, groups of 32) for MXFP4.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def __post_init__(self) -> None:
        if self.codes.dtype not in (torch.int32, torch.uint8) or self.scales.dtype not in (torch.bfloat16, torch.uint8):
            raise KernelError(f"Weights: unsupported dtypes {self.codes.dtype} and {self.scales.dtype}.")
        if not all(part[0].is_contiguous() if part.dim() == 3 else part.is_contiguous() for part in (
                self.codes, self.scales)):
            raise KernelError("Weights: not contiguous.")
        if self.codes.shape[:-1] != self.scales.shape[:-1] or self.group not in GROUPS or self.k % self.group:
            raise KernelError(f"Weights: unsupported shapes {tuple(self.codes.shape)} and {tuple(self.scales.shape)}.")

    @property
    def rows(self) -> int:
        """Output values."""
        return self.codes.shape[-2]

    @property
    def k(self) -> int:
        """Input values."""
        return self.codes.shape[-1] * self.codes.element_size() * 2

    @property
    def group(self) -> int:
        """Input values per scale."""
        return self.k // self.scales.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads; of all experts together."""
        return self.codes.nbytes + self.scales.nbytes

    def struct(self) -> library.Weights:
        """The C view of it; valid as long as the tensors."""
        steps = [part.stride(0) * part.element_size() for part in (self.codes, self.scales)]
        return library.Weights(self.codes.data_ptr(), self.scales.data_ptr(), self.rows, self.k, *steps, self.group,
                               int(self.scales.dtype == torch.uint8))


@dataclass(frozen=True)
class ExpertWeights:
    """A mixture: `up` holds the gate's rows, then those of up ([experts, 2 * inner, k]; in turns for swigluoai)."""

    up: PackedWeights
    down: PackedWeights
    activation: str = "silu"
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        experts = self.up.codes.shape[0]
        _check_bias(self.up_bias, (experts, self.up.rows))
        _check_bias(self.down_bias, (experts, self.down.rows))

    def struct(self) -> library.Experts:
        """The C view of it; valid as long as the tensors."""
        steps = [0 if bias is None else bias.stride(0) for bias in (self.up_bias, self.down_bias)]
        return library.Experts(self.up.struct(), self.down.struct(), _address(self.up_bias), _address(self.down_bias),
                               *steps, self.up.codes.shape[0], ACTIVATIONS[self.activation], self.alpha, self.limit)


def _check_bias(bias: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if bias is not None and (bias.dtype != torch.bfloat16 or bias.shape != shape or bias.stride(-1) != 1):
        raise KernelError(f"Bias: {bias.dtype} {tuple(bias.shape)}; unsupported. Pass bf16 {shape}.")


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def linear(weights: PackedWeights, x: torch.Tensor, bias: torch.Tensor | None = None, *,
           out: torch.Tensor | None = None, isa: Isa | None = None, timeout_s: float = TIMEOUT_S) -> torch.Tensor:
    """Return x @ weights.T + bias.

    Args:
        x: bf16 [tokens, k]; any number of tokens, made for 1 to 16.
        bias: bf16 [rows].
        out: bf16 or fp32 [tokens, rows], every value is written; a new bf16 tensor without.
        isa: another instruction set than the default.
        timeout_s: seconds without progress after which a thread counts as hung.

    Raises:
        ThreadHungError: a thread made no progress.
        KernelError: invalid arguments.
    """
    x, y = _operands(x, weights.k, weights.rows, out)
    _check_bias(bias, (weights.rows,))
    if x.shape[0]:
        library.check(library.load().linear_run(
            ctypes.byref(weights.struct()), x.data_ptr(), x.shape[0], x.stride(0), _address(bias), y.data_ptr(),
            y.stride(0), _OUTPUTS[y.dtype], _isa(isa), timeout_s), timeout_s)
    return y


def experts(weights: ExpertWeights, x: torch.Tensor, router_weights: torch.Tensor, ids: torch.Tensor, *,
            out: torch.Tensor | None = None, isa: Isa | None = None, timeout_s: float = TIMEOUT_S) -> torch.Tensor:
    """Return the sum of the chosen experts' outputs, times their router weights.

    Args:
        x: bf16 [tokens, k].
        router_weights: fp32 [tokens, top_k].
        ids: int32 [tokens, top_k]; invalid ids are left out.
        out: bf16 or fp32 [tokens, k], every value is written; a new bf16 tensor without.
        isa: another instruction set than the default.
        timeout_s: seconds without progress after which a thread counts as hung.

    Raises:
        ThreadHungError: a thread made no progress.
        KernelError: invalid arguments.
    """
    x, y = _operands(x, weights.up.k, weights.down.rows, out)
    ids, router = ids.to(torch.int32).contiguous(), router_weights.to(torch.float32).contiguous()
    if ids.shape != router.shape or ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        raise KernelError(f"Choices: {tuple(ids.shape)} and {tuple(router.shape)}; unsupported for {len(x)} tokens.")
    if x.shape[0]:
        library.check(library.load().experts_run(
            ctypes.byref(weights.struct()), x.data_ptr(), x.shape[0], x.stride(0), ids.data_ptr(), router.data_ptr(),
            ids.shape[1], y.data_ptr(), y.stride(0), _OUTPUTS[y.dtype], _isa(isa), timeout_s), timeout_s)
    return y


def _operands(x: torch.Tensor, k: int, rows: int, out: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Check activations [tokens, k] and results [tokens, rows]; both with contiguous rows."""
    if x.dtype != torch.bfloat16 or x.dim() != 2:
        raise KernelError(f"Activations: {x.dtype} of {x.dim()} dimensions; unsupported. Pass bf16 [tokens, k].")
    y = torch.empty(x.shape[0], rows, dtype=torch.bfloat16) if out is None else out
    if x.shape[1] != k or y.shape != (x.shape[0], rows) or y.stride(1) != 1:
        raise KernelError(f"Shapes: mismatch of x {tuple(x.shape)}, y {tuple(y.shape)} and weights {rows} x {k}.")
    if y.dtype not in _OUTPUTS:
        raise KernelError(f"Results: {y.dtype}; unsupported. Pass bf16 or fp32.")
    return x if x.stride(1) == 1 else x.contiguous(), y


def _isa(isa: Isa | None) -> Isa:
    return library.default_isa() if isa is None else isa


def unpack(weights: PackedWeights, out: torch.Tensor, *, isa: Isa | None = None) -> None:
    """Write the weights to `out`, bf16 [rows, k]."""
    if out.dtype != torch.bfloat16 or out.shape != (weights.rows, weights.k) or not out.is_contiguous():
        raise KernelError(f"Output: {out.dtype} {tuple(out.shape)}; unsupported.")
    library.check(library.load().unpack_run(ctypes.byref(weights.struct()), out.data_ptr(), _isa(isa), TIMEOUT_S),
                  TIMEOUT_S)


def read(data: torch.Tensor) -> int:
    """Read all bytes of `data` with the team's threads; the sum is returned so that nothing is left out."""
    total = ctypes.c_uint64()
    library.check(library.load().read_run(data.data_ptr(), data.nbytes, library.default_isa(), ctypes.byref(total),
                                          TIMEOUT_S), TIMEOUT_S)
    return total.value
