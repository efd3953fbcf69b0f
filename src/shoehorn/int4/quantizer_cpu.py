"""The numbers of `int4`, compiled for the processors: one core does several times what tensor operations do there.

Rules: a group is read once and stays in registers or the first cache while its scale is searched for; nothing holds
the interpreter's lock, so threads work side by side; compiled at the first call, in some seconds, and kept nowhere.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]

_ORDER_IS_FREE = {"reassoc", "contract", "nsz", "arcp"}  # sums by several lanes; what is no number stays that


def _search(words: Words, shift: np.uint32, shares: Floats, half: np.float32, scales: Floats) -> bool:
    """The best scale of each group found; False where a weight is not a finite number.

    Args:
        words: the weights' bits, the groups one after the other; shifted left by `shift` they are those of a float32.
        shares: what share of the largest weight the codes reach to.
        half: 2^(bits - 1).
        scales: float32 [groups], to be filled; 1 for a group of zeros.
    """
    group = len(words) // len(scales)
    raw = np.empty(group, np.uint32)
    values = raw.view(np.float32)
    largest = np.empty(1, np.uint32)
    for number in range(len(scales)):
        top = np.uint32(0)
        for place in range(group):
            bits = np.uint32(words[number * group + place]) << shift
            raw[place] = bits
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
        best, gained = np.float32(1.0), np.float32(-1.0)
        for share in shares:
            inverse = np.float32(1.0) / (widest * share)
            fit, size = np.float32(0.0), np.float32(0.0)
            for place in range(group):
                code = min(max(np.rint(values[place] * inverse), -half), half - np.float32(1.0))
                fit += values[place] * code
                size += code * code
            gain = fit * fit / size  # |w|^2 less the error
            if gain > gained:
                best, gained = fit / size, gain
        scales[number] = best
    return True


def _encode(words: Words, shift: np.uint32, half: np.float32, scales: Floats, packed: npt.NDArray[np.uint8],
            ) -> tuple[float, float]:
    """Fill `packed` with the codes, two in a byte where half is 8; returns |w - s q|^2 and |w|^2."""
    group = len(words) // len(scales)
    raw = np.empty(group, np.uint32)
    values = raw.view(np.float32)
    codes = np.empty(group, np.uint8)
    lost, whole = 0.0, 0.0
    for number in range(len(scales)):
        scale = scales[number]
        inverse = np.float32(1.0) / scale
        lost_here, whole_here = np.float32(0.0), np.float32(0.0)
        for place in range(group):
            raw[place] = np.uint32(words[number * group + place]) << shift
        for place in range(group):
            code = min(max(np.rint(values[place] * inverse), -half), half - np.float32(1.0))
            error = values[place] - code * scale
            lost_here += error * error
            whole_here += values[place] * values[place]
            codes[place] = np.uint8(np.int32(code + half))
        lost += float(lost_here)
        whole += float(whole_here)
        if half == np.float32(8.0):
            for place in range(group // 2):
                packed[number * group // 2 + place] = codes[2 * place] | codes[2 * place + 1] << np.uint8(4)
        else:
            for place in range(group):
                packed[number * group + place] = codes[place]
    return lost, whole


_compiled: Any = numba.njit(nogil=True, error_model="numpy", fastmath=_ORDER_IS_FREE)
search, encode = _compiled(_search), _compiled(_encode)
