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
from shoehorn_vllm.hybrid.kernel.products import ExpertWeights, PackedWeights
from support.kernel_reference import Matrix, activations, matrix

TESTS = Path(__file__).resolve().parents[2]
SHAPES = ((256, 512, 128), (96, 256, 32), (640, 128, 64))
TOKENS, TOP_K, EXPERTS = 8, 3, 5


def blob(sources: list[Matrix]) -> list[PackedWeights]:
    """Experts with all their tensors one after the other in memory, as a GPU's experts in host memory are."""
    experts = sources[0].codes.shape[0]
    parts = [part for source in sources for part in (source.codes, source.scales)]
    memory = torch.cat([part.flatten(1).view(torch.uint8) for part in parts], 1).contiguous()
    views, first = [], 0
    for part in parts:
        size = part[0].numel() * part.element_size()
        views.append(memory[:, first:first + size].view(part.dtype).view(experts, *part.shape[1:]))
        first += size
    return [PackedWeights(views[2 * number], views[2 * number + 1]) for number in range(len(sources))]


class Box:
    """A mailbox with its buffers: three matrices, and experts as number 3."""

    def __init__(self, timeout_s: float = 20.0) -> None:
        self.sources = [matrix((rows, k), group, number) for number, (rows, k, group) in enumerate(SHAPES)]
        self.weights = [PackedWeights(source.codes, source.scales) for source in self.sources]
        self.plain = [matrix((EXPERTS, *shape), 32, 7 + number) for number, shape in enumerate(((192, 128), (128, 96)))]
        self.experts = ExpertWeights(*blob(self.plain))
        memory = ctypes.create_string_buffer(256)
        self._memory = memory
        self.address = ctypes.addressof(memory) + -ctypes.addressof(memory) % 64
        self.request = ctypes.c_uint32.from_address(self.address)
        self.done = ctypes.c_uint32.from_address(self.address + 64)
        self.x = torch.zeros(TOKENS * 512, dtype=torch.bfloat16)
        self.y = torch.zeros(TOKENS * 640, dtype=torch.bfloat16)
        self.ids = torch.zeros(TOKENS * TOP_K, dtype=torch.int32)
        self.router = torch.zeros(TOKENS * TOP_K)
        self.table = library.tasks([*(each.struct() for each in self.weights), self.experts.struct()], TOP_K)
        self.places = library.Buffers(*(part.data_ptr() for part in (self.x, self.y, self.ids, self.router)))
        library.check(library.load().mailbox_start(self.address, self.table, len(self.table), ctypes.byref(self.places),
                                                   -1, library.default_isa(), timeout_s), timeout_s)

    def multiply(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Request a product and wait, as the stream of a GPU does."""
        rows = (*(each.rows for each in self.weights), self.experts.down.rows)[number]
        tokens = x.shape[0]
        self.x[:x.numel()] = x.flatten()
        self.request.value = tokens << 16 | number + 1
        limit = time.monotonic() + 60
        while not self.done.value:
            assert time.monotonic() < limit
        self.done.value = 0
        return self.y[:tokens * rows].view(tokens, rows).clone()


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


def test_experts_in_one_piece_each_are_multiplied_without_those_of_the_gpu(box: Box) -> None:
    plain = ExpertWeights(*(PackedWeights(source.codes, source.scales) for source in box.plain))
    for tokens in (1, 8, 3):
        x, router = activations(tokens, 128, tokens), torch.rand(tokens, TOP_K)
        ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]).int()
        ids[:, 1] = -1  # the GPU has it
        box.ids[:ids.numel()], box.router[:ids.numel()] = ids.flatten(), router.flatten()
        box.y.fill_(float("nan"))
        answer = box.multiply(3, x)
        assert torch.equal(answer, products.experts(plain, x, router, ids))
        assert answer.any()
    box.ids.fill_(-1)
    assert not box.multiply(3, x).any(), "nothing is left to the CPU"


def test_request_after_an_idle_time_is_served(box: Box) -> None:
    x = activations(1, 512, 0)
    right = products.linear(box.weights[0], x)
    time.sleep(1.2)  # it naps longest after a second
    assert torch.equal(box.multiply(0, x), right)


def test_invalid_tables_are_refused(box: Box) -> None:
    load = library.load()
    arguments = [box.address, box.table, 4, ctypes.byref(box.places), -1, library.default_isa(), 1.0]
    assert load.mailbox_start(*arguments) == -16, "one thread in a process"
    load.mailbox_stop()
    assert load.mailbox_start(box.address + 4, *arguments[1:]) == -22
    assert load.mailbox_start(*arguments[:2], 0, *arguments[3:]) == -22
    box.places.ids = None
    assert load.mailbox_start(*arguments) == -22, "experts without a place for the choices"
    assert load.mailbox_start(*arguments[:2], 3, *arguments[3:]) == 0, "matrices need none"
    load.mailbox_stop()
    box.table[0].matrix.contents.group = 48
    assert load.mailbox_start(*arguments[:2], 3, *arguments[3:]) == -22
    box.table[1].experts = box.table[3].experts
    assert load.mailbox_start(*arguments[:1], ctypes.byref(box.table, ctypes.sizeof(library.Task)), 1,
                              *arguments[3:]) == -22, "either a matrix or experts"


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
