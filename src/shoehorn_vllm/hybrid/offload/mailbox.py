"""Products on the CPU in the order of the GPU's stream: neither the interpreter nor the launching thread waits.

The stream copies the activations to host memory, writes a request into the mailbox and waits for its answer by the
driver's memory operations; a thread of the library polls the requests (`kernel/source/mailbox.c`). So the launching
thread runs ahead, and a forward pass can be captured in a CUDA graph. Where the driver has no such operations, each
product waits for the stream.

Source: CUDA driver API, cuStreamWriteValue32 and cuStreamWaitValue32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from shoehorn_vllm.hybrid.kernel import library, products, team
from shoehorn_vllm.hybrid.kernel.products import PackedWeights
from shoehorn_vllm.patches import pinned_memory

RESERVED_CORES = 2
"""Physical cores that are left to the API server and to the engine's own threads."""

SPIN_US = 2000
"""Time that threads spin between two products: as long as the GPU takes for the layers between them. A thread that
sleeps is woken in 50 us and more, in a virtual machine."""

_BOX_BYTES = 1 << 16
_DONE = 64  # offset of the answer
_WAIT_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
_SHIFT = 16


class MailboxError(RuntimeError):
    """The driver refused a memory operation of the stream."""


class Mailbox:
    """The CPU's side of the layers.

    Args:
        weights: of all matrices; requests name them by number.
        tokens: of the largest batch.
    """

    def __init__(self, weights: Sequence[PackedWeights], tokens: int, device: torch.device) -> None:
        self._weights = weights
        self._device = device

        def pinned(size: int, dtype: torch.dtype) -> torch.Tensor:
            return pinned_memory.allocate_like(torch.empty(max(size, _BOX_BYTES), dtype=dtype))

        self._x = pinned(tokens * max(each.k for each in weights), torch.bfloat16)
        self._y = pinned(tokens * max(each.rows for each in weights), torch.bfloat16)
        self._box = pinned(_BOX_BYTES, torch.uint8).zero_()
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._write, self._wait = self._driver.cuStreamWriteValue32_v2, self._driver.cuStreamWaitValue32_v2
        for function in (self._write, self._wait):
            function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32]
        started = team.current() or team.start(reserved=RESERVED_CORES, spin_us=SPIN_US)
        table = (library.Weights * len(weights))(*(each.struct() for each in weights))
        library.check(library.load().mailbox_start(
            self._box.data_ptr(), table, len(weights), self._x.data_ptr(), self._y.data_ptr(), started.cpus[0],
            library.default_isa(), products.TIMEOUT_S), products.TIMEOUT_S)

    def multiply(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weights.T, bf16 [tokens, rows] on the GPU; x is bf16 [tokens, k] there.

        Raises:
            MailboxError: the driver refused.
        """
        weights, tokens = self._weights[number], x.shape[0]
        self._x[:x.numel()].view(x.shape).copy_(x, non_blocking=True)
        stream, box = torch.cuda.current_stream().cuda_stream, self._box.data_ptr()
        self._check(self._write(stream, box, tokens << _SHIFT | number + 1, 0))
        self._check(self._wait(stream, box + _DONE, 1, _WAIT_EQUAL))
        self._check(self._write(stream, box + _DONE, 0, 0))
        y = torch.empty(tokens, weights.rows, dtype=torch.bfloat16, device=self._device)
        return y.copy_(self._y[:y.numel()].view(y.shape), non_blocking=True)

    def _check(self, code: int) -> None:
        if code:
            raise MailboxError(f"CUDA driver: memory operation of a stream failed with error {code}.")
