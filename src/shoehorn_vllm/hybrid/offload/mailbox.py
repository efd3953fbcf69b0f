"""Products on the CPU in the order of the GPU's stream: neither the interpreter nor the launching thread waits.

The stream copies the activations to host memory, writes a request into the mailbox and waits for its answer by the
driver's memory operations; a thread of the library polls the requests (`kernel/source/mailbox.c`). So the launching
thread runs ahead, and a forward pass can be captured in a CUDA graph.

Rules:
- one mailbox in a process, one request at a time;
- between `request` and `wait` the stream may compute something else.

Source: CUDA driver API, cuStreamWriteValue32 and cuStreamWaitValue32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from shoehorn_vllm.hybrid.kernel import library, products, team
from shoehorn_vllm.hybrid.kernel.products import ExpertWeights, PackedWeights
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

    Attributes:
        x: bf16 activations of a request, pinned; y: bf16 results, rows without gaps.
        ids, router: int32 and fp32, choices of a request for experts, [tokens, top_k] without gaps.

    Args:
        tasks: matrices and experts of layers; requests name them by number.
        tokens: of the largest batch.
        top_k: experts that a token chooses.
    """

    def __init__(self, tasks: Sequence[PackedWeights | ExpertWeights], tokens: int, device: torch.device,
                 top_k: int = 0) -> None:
        self._device = device
        self.tokens = tokens

        def pinned(size: int, dtype: torch.dtype) -> torch.Tensor:
            return pinned_memory.allocate_like(torch.empty(max(size, _BOX_BYTES), dtype=dtype))

        ends = [(each, each) if isinstance(each, PackedWeights) else (each.up, each.down) for each in tasks]
        self._rows = [last.rows for _, last in ends]
        self.x = pinned(tokens * max(first.k for first, _ in ends), torch.bfloat16)
        self.y = pinned(tokens * max(self._rows), torch.bfloat16)
        self.ids = pinned(tokens * top_k, torch.int32)
        self.router = pinned(tokens * top_k, torch.float32)
        self._box = pinned(_BOX_BYTES, torch.uint8).zero_()
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._write, self._wait = self._driver.cuStreamWriteValue32_v2, self._driver.cuStreamWaitValue32_v2
        for function in (self._write, self._wait):
            function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32]
        started = team.current() or team.start(reserved=RESERVED_CORES, spin_us=SPIN_US)
        team.watch(RESERVED_CORES, started.choice.allowed)
        self._table = library.tasks([each.struct() for each in tasks], top_k)  # it holds the structures
        places = library.Buffers(*(part.data_ptr() for part in (self.x, self.y, self.ids, self.router)))
        library.check(library.load().mailbox_start(
            self._box.data_ptr(), self._table, len(tasks), ctypes.byref(places), started.cpus[0],
            library.default_isa(), products.TIMEOUT_S), products.TIMEOUT_S)

    def multiply(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weights.T, bf16 [tokens, rows] on the GPU; x is bf16 [tokens, k] there.

        Raises:
            MailboxError: the driver refused.
        """
        tokens = x.shape[0]
        self.x[:x.numel()].view(x.shape).copy_(x, non_blocking=True)
        self.request(number, tokens)
        self.wait()
        y = torch.empty(tokens, self._rows[number], dtype=torch.bfloat16, device=self._device)
        return y.copy_(self.y[:y.numel()].view(y.shape), non_blocking=True)

    def request(self, number: int, tokens: int) -> None:
        """Ask for a task, whose activations are in `x` by then, on the current stream.

        Raises:
            MailboxError: the driver refused.
        """
        stream = torch.cuda.current_stream().cuda_stream
        self._check(self._write(stream, self._box.data_ptr(), tokens << _SHIFT | number + 1, 0))

    def wait(self) -> None:
        """Let the current stream wait until `y` is written.

        Raises:
            MailboxError: the driver refused.
        """
        stream, done = torch.cuda.current_stream().cuda_stream, self._box.data_ptr() + _DONE
        self._check(self._wait(stream, done, 1, _WAIT_EQUAL))
        self._check(self._write(stream, done, 0, 0))

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise MailboxError(f"CUDA driver: memory operation of a stream failed with error {code}.")
