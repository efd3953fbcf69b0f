"""CPU kernels of the quantizer, compiled by numba: several times faster per core than tensor operations.

Rules: a group stays in registers or the L1 cache during the search for its scale; the kernels release the GIL, so
threads run in parallel; they are compiled at the first call, in some seconds, and not cached.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]

_ORDER_IS_FREE = {"reassoc", "contract", "nsz", "arcp"}  # permits vectorized sums; NaN remains NaN


def _search(words: Words, shift: np.uint32, shares: Floats, half: np.float32, scales: Floats) -> bool:
    """Search the best scale of each group; return False if a weight is not finite.

    Args:
        words: the bits of the weights, group by group; shifted left by `shift` they are those of a float32.
        shares: clipped ranges as shares of the largest weight.
        half: 2^(bits - 1).
        scales: float32 [groups], the result; 1 for a group of zeros.
    """
    group = len(words) // len(scales)
    raw = np.empty(group, np.uint32)
    values = raw.view(np.float32)
    largest = np.empty(1, np.uint32)
    for number in range(len(scales)):
        top = np.uint32(0)
        for position in range(group):
            bits = np.uint32(words[number * group + position]) << shift
            raw[position] = bits
            top = max(top, np.uint32(bits << np.uint32(1) | bits >> np.uint32(31)))  # size first, sign last
        if top >= np.uint32(0xFF000000):
            return False
        if top <= np.uint32(1):
            scales[number] = np.float32(1.0)
            continue
        largest[0] = top >> np.uint32(1)
        widest = largest.view(np.float32)[0] / half
        if not top & np.uint32(1):
            widest = -widest
        best, best_gain = np.float32(1.0), np.float32(-1.0)
        for share in shares:
            inverse = np.float32(1.0) / (widest * share)
            fit, size = np.float32(0.0), np.float32(0.0)
            for position in range(group):
                code = min(max(np.rint(values[position] * inverse), -half), half - np.float32(1.0))
                fit += values[position] * code
                size += code * code
            gain = fit * fit / size  # |w|^2 minus the error
            if gain > best_gain:
                best, best_gain = fit / size, gain
        scales[number] = best
    return True


def _encode(words: Words, shift: np.uint32, half: np.float32, scales: Floats, packed: npt.NDArray[np.uint8],
            ) -> tuple[float, float]:
    """Fill `packed` with codes, two in a byte if half is 8; return |w - s q|^2 and |w|^2."""
    group = len(words) // len(scales)
    raw = np.empty(group, np.uint32)
    values = raw.view(np.float32)
    codes = np.empty(group, np.uint8)
    squared_error, squared_norm = 0.0, 0.0
    for number in range(len(scales)):
        scale = scales[number]
        inverse = np.float32(1.0) / scale
        group_error, group_norm = np.float32(0.0), np.float32(0.0)
        for position in range(group):
            raw[position] = np.uint32(words[number * group + position]) << shift
        for position in range(group):
            code = min(max(np.rint(values[position] * inverse), -half), half - np.float32(1.0))
            error = values[position] - code * scale
            group_error += error * error
            group_norm += values[position] * values[position]
            codes[position] = np.uint8(np.int32(code + half))
        squared_error += float(group_error)
        squared_norm += float(group_norm)
        if half == np.float32(8.0):
            for position in range(group // 2):
                packed[number * group // 2 + position] = codes[2 * position] | codes[2 * position + 1] << np.uint8(4)
        else:
            for position in range(group):
                packed[number * group + position] = codes[position]
    return squared_error, squared_norm


_compiled: Any = numba.njit(nogil=True, error_model="numpy", fastmath=_ORDER_IS_FREE)
search, encode = _compiled(_search), _compiled(_encode)
