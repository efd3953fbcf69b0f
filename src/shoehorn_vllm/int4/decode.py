"""Product of few rows with INT4 weights at the GPU's memory bandwidth (decode.cu).

Rules:
- the weights keep the layout of vLLM's Machete or Marlin kernel: no second copy; larger batches take that kernel;
- compiled by NVRTC for the GPU in about a second, once in a process for each variant;
- each layer has counters of its own, since layers may run in several streams at a time.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.cuda import _utils

SOURCE = Path(__file__).with_name("decode.cu")
GROUPS = (32, 64, 128)

_MOST_IDLE = 0.95
"""Share of the multiprocessors' blocks that work is divided over at least."""


class Layout(Enum):
    """Order of weights and scales in memory."""

    MACHETE = "machete"
    MARLIN = "marlin"



@dataclass(frozen=True)
class Variant:
    """A compiled form of the kernel.

    Attributes:
        tiles: of 8 rows.
        quarters: of a chunk, of 64 of k each.
        warps: of a block.
        min_blocks: that run on a multiprocessor at a time.
    """

    tiles: int
    quarters: int
    warps: int
    min_blocks: int

    @property
    def chunk(self) -> int:
        """The product's k is a multiple of this."""
        return 64 * self.quarters


DECODE = Variant(tiles=1, quarters=1, warps=8, min_blocks=2)
"""Up to 8 rows."""


class Kernel:
    """One variant on one GPU."""

    def __init__(self, variant: Variant, layout: Layout, group: int, dtype: torch.dtype, device: torch.device) -> None:
        self.variant = variant
        properties = torch.cuda.get_device_properties(device)
        self._blocks = properties.multi_processor_count * variant.min_blocks
        definitions = {"TILES": variant.tiles, "QUARTERS": variant.quarters, "WARPS": variant.warps,
                       "MIN_BLOCKS": variant.min_blocks, "GROUP": group, "IS_BF16": int(dtype == torch.bfloat16),
                       "IS_MACHETE": int(layout is Layout.MACHETE)}
        architecture = f"sm_{properties.major}{properties.minor}"
        cubin = compile_cubin(SOURCE.read_text(encoding="utf-8"), architecture, definitions)
        with torch.cuda.device(device):
            loaded: Any = _utils._cuda_load_module(cubin, ["int4_decode"])
        self._function = loaded["int4_decode"]

    def multiply(self, x: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, arrivals: torch.Tensor, n: int,
                 bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x @ W + bias, [m, n], for x [m, k] and weights, scales and bias of W [k, n] in the kernel's layout.

        Args:
            arrivals: `counters(n)` of the layer.
        """
        m, k = x.shape
        y = torch.empty((m, n), dtype=x.dtype, device=x.device)
        grid = blocks_of(self._blocks, n // 64, k // self.variant.chunk)
        partial = torch.empty(grid * 2 * 512 * self.variant.tiles, dtype=torch.float32, device=x.device)
        self._function(grid=(grid, 1, 1), block=(self.variant.warps * 32, 1, 1),
                       args=[weights, scales, x, y, y if bias is None else bias, partial, arrivals,
                             m, n, k, int(bias is not None)])
        return y


def counters(n: int, device: torch.device) -> torch.Tensor:
    """Return the counters of a layer of n columns, which are zero between its calls."""
    return torch.zeros(n // 64, dtype=torch.int32, device=device)


def blocks_of(most: int, tiles: int, chunks: int) -> int:
    """Return the number of blocks: whole ones for each 64 columns, where that leaves few multiprocessors idle."""
    whole = most // tiles * tiles
    return min(whole if whole >= _MOST_IDLE * most else most, tiles * chunks)


@functools.cache
def kernel(layout: Layout, group: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    """Return the kernel of these properties, compiled at the first call."""
    return Kernel(DECODE, layout, group, dtype, device)


def compile_cubin(source: str, architecture: str, definitions: dict[str, int]) -> bytes:
    """Compile CUDA source by NVRTC.

    Raises:
        RuntimeError: the source cannot be compiled for the GPU; the text is the compiler's.
        OSError: no NVRTC is installed.
    """
    library = _nvrtc()
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


def _nvrtc() -> ctypes.CDLL:
    """Return the library, from where the loader searches, or from NVIDIA's package in this environment."""
    try:
        return _utils._get_nvrtc_library()
    except OSError:
        package = importlib.util.find_spec("nvidia")
        folders = package.submodule_search_locations if package else None
        for file in (file for folder in folders or () for file in Path(folder).glob("*/lib/libnvrtc.so.*")):
            return ctypes.CDLL(str(file))
        raise
