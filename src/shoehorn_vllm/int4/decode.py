"""Product of few rows with INT4 weights at the GPU's memory bandwidth (decode.cu).

Rules:
- the weights keep the layout of vLLM's Marlin kernel: no second copy; larger batches take Marlin;
- compiled by NVRTC for the GPU in about a second, once in a process for each variant;
- calls on one GPU run in one stream: they share the memory for parts of sums.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.cuda import _utils

SOURCE = Path(__file__).with_name("decode.cu")
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Variant:
    """A compiled form of the kernel.

    Attributes:
        tiles: of 8 rows.
        steps: of 16 of k, in a chunk.
        warps: of a block.
        min_blocks: that run on a multiprocessor at a time.
    """

    tiles: int
    steps: int
    warps: int
    min_blocks: int

    @property
    def chunk(self) -> int:
        """The product's k is a multiple of this."""
        return 16 * self.steps


BY_TILES = {1: Variant(1, 8, 8, 2), 2: Variant(2, 4, 8, 2), 4: Variant(4, 4, 4, 2)}


class Kernel:
    """One variant on one GPU, with the memory that its calls share."""

    def __init__(self, variant: Variant, group: int, dtype: torch.dtype, device: torch.device) -> None:
        self.variant = variant
        properties = torch.cuda.get_device_properties(device)
        self._blocks = properties.multi_processor_count * variant.min_blocks
        definitions = {"TILES": variant.tiles, "STEPS": variant.steps, "WARPS": variant.warps,
                       "MIN_BLOCKS": variant.min_blocks, "GROUP": group, "IS_BF16": int(dtype == torch.bfloat16)}
        architecture = f"sm_{properties.major}{properties.minor}"
        cubin = compile_cubin(SOURCE.read_text(encoding="utf-8"), architecture, definitions)
        with torch.cuda.device(device):
            loaded: Any = _utils._cuda_load_module(cubin, ["int4_decode"])
        self._function = loaded["int4_decode"]
        self._partial = torch.empty(self._blocks * 2 * 512 * variant.tiles, dtype=torch.float32, device=device)
        self._arrivals = torch.zeros(1 << 14, dtype=torch.int32, device=device)  # up to 2^20 columns

    def multiply(self, x: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, n: int,
                 bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x @ W + bias, [m, n], for x [m, k] and weights, scales and bias of W [k, n] in Marlin's layout."""
        m, k = x.shape
        y = torch.empty((m, n), dtype=x.dtype, device=x.device)
        grid = min(self._blocks, n // 64 * (k // self.variant.chunk))
        self._function(grid=(grid, 1, 1), block=(self.variant.warps * 32, 1, 1),
                       args=[weights, scales, x, y, y if bias is None else bias, self._partial, self._arrivals,
                             m, n, k, int(bias is not None)])
        return y


@functools.cache
def kernel(tiles: int, group: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    """Return the kernel of these properties, compiled at the first call."""
    return Kernel(BY_TILES[tiles], group, dtype, device)


def compile_cubin(source: str, architecture: str, definitions: dict[str, int]) -> bytes:
    """Compile CUDA source by NVRTC; raises RuntimeError with the compiler's text."""
    library = _utils._get_nvrtc_library()
    program = ctypes.c_void_p()
    if library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"decode.cu", 0, None, None):
        raise RuntimeError("NVRTC: no program.")
    options = [f"--gpu-architecture={architecture}", *(f"-D{name}={value}" for name, value in definitions.items())]
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = library.nvrtcCompileProgram(program, len(options), encoded)
    size = ctypes.c_size_t()
    if failed:
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC: compilation failed: {log.value.decode(errors='replace')}")
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, cubin)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw
