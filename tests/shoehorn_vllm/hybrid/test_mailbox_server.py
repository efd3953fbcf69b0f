"""The thread that serves a GPU's requests, with the memory of this process in the place of the GPU's."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shoehorn_vllm.hybrid.kernel import library, products, team
from shoehorn_vllm.hybrid.kernel.products import PackedWeights
from support.kernel_reference import activations, matrix

TESTS = Path(__file__).resolve().parents[2]
SHAPES = ((256, 512, 128), (96, 256, 32), (640, 128, 64))
TOKENS = 8


class Box:
    """A mailbox with its buffers."""

    def __init__(self, timeout_s: float = 20.0) -> None:
        self.sources = [matrix((rows, k), group, number) for number, (rows, k, group) in enumerate(SHAPES)]
        self.weights = [PackedWeights(source.codes, source.scales) for source in self.sources]
        memory = ctypes.create_string_buffer(256)
        self._memory = memory
        self.address = ctypes.addressof(memory) + -ctypes.addressof(memory) % 64
        self.request = ctypes.c_uint32.from_address(self.address)
        self.done = ctypes.c_uint32.from_address(self.address + 64)
        self.x = torch.zeros(TOKENS * 512, dtype=torch.bfloat16)
        self.y = torch.zeros(TOKENS * 640, dtype=torch.bfloat16)
        table = (library.Weights * len(self.weights))(*(each.struct() for each in self.weights))
        library.check(library.load().mailbox_start(self.address, table, len(self.weights), self.x.data_ptr(),
                                                   self.y.data_ptr(), -1, library.default_isa(), timeout_s), timeout_s)

    def multiply(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Request a product and wait, as the stream of a GPU does."""
        weights, tokens = self.weights[number], x.shape[0]
        self.x[:x.numel()] = x.flatten()
        self.request.value = tokens << 16 | number + 1
        limit = time.monotonic() + 60
        while not self.done.value:
            assert time.monotonic() < limit
        self.done.value = 0
        return self.y[:tokens * weights.rows].view(tokens, weights.rows).clone()


@pytest.fixture
def box() -> Iterator[Box]:
    team.start(reserved=0, threads=2)
    served = Box()
    yield served
    library.load().mailbox_stop()
    team.stop()


def test_requests_are_served_in_any_order_and_size(box: Box) -> None:
    for turn, (number, tokens) in enumerate([(0, 1), (2, 8), (1, 3), (0, 5), (0, 1), (1, 8)]):
        x = activations(tokens, SHAPES[number][1], turn)
        box.y.fill_(float("nan"))
        answer = box.multiply(number, x)
        assert torch.equal(answer, products.linear(box.weights[number], x))
        assert box.request.value == 0


def test_request_after_an_idle_time_is_served(box: Box) -> None:
    x = activations(1, 512, 0)
    right = products.linear(box.weights[0], x)
    time.sleep(1.2)  # it naps longest after a second
    assert torch.equal(box.multiply(0, x), right)


def test_invalid_tables_are_refused(box: Box) -> None:
    load = library.load()
    table = (library.Weights * 1)(box.weights[0].struct())
    arguments = [box.address, table, 1, box.x.data_ptr(), box.y.data_ptr(), -1, library.default_isa(), 1.0]
    assert load.mailbox_start(*arguments) == -16, "one thread in a process"
    load.mailbox_stop()
    assert load.mailbox_start(box.address + 4, *arguments[1:]) == -22
    assert load.mailbox_start(*arguments[:2], 0, *arguments[3:]) == -22
    table[0].group = 48
    assert load.mailbox_start(*arguments) == -22


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from shoehorn_vllm.hybrid.kernel import library, team
from shoehorn_vllm.hybrid.test_mailbox_server import Box
from support.kernel_reference import activations
"""


@pytest.mark.parametrize(("action", "words"), [
    ("box = Box(); box.request.value = 1 << 16 | 99", "request 65635 failed with error 22"),
    ("team.start(reserved=0, threads=3); box = Box(1.0); library.load().pool_inject(2, 60_000); "
     "[box.multiply(0, activations(8, 512, 0)) for _ in range(100_000)]", "thread 2 timed out after 1 s")])
def test_failed_product_ends_the_process_with_a_reason(action: str, words: str) -> None:
    script = SCRIPT.replace("shoehorn_vllm.hybrid.test_mailbox_server", "mailbox_box") + action + \
        "\nimport time; time.sleep(30)"
    source = f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(Path(__file__).parent)!r}]\n" \
        "import test_mailbox_server as mailbox_box; sys.modules['mailbox_box'] = mailbox_box\n" + script
    done = subprocess.run([sys.executable, "-c", source, str(TESTS)], capture_output=True, text=True, timeout=120,
                          check=False)
    assert done.returncode == 70, done.stderr
    assert words in done.stderr
