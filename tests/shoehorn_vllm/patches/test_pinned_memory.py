"""Pinned host memory of the engine plugin, with a stand-in for CUDA's driver: what is mapped, reused and given back."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import re
import warnings
from pathlib import Path

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the engine imports calls some of it deprecated
    from shoehorn_vllm.patches import pinned_memory

pytestmark = pytest.mark.contract

MIB = 1 << 20


class Driver:
    """Takes what it is asked to pin, or refuses."""

    def __init__(self, answer: int = 0) -> None:
        self.answer, self.pinned = answer, dict[int, int]()

    def cuMemHostRegister_v2(self, address: object, size: object, flags: int) -> int:  # the driver's name
        if not self.answer:
            self.pinned[address.value] = size.value  # type: ignore[attr-defined]  # ctypes' own
        return self.answer

    def cuMemHostUnregister(self, address: object) -> int:  # likewise
        del self.pinned[address.value]  # type: ignore[attr-defined]  # likewise
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(pinned_memory, "_driver", lambda: found)
    monkeypatch.setattr(pinned_memory, "should_pin_memory", lambda: True)
    return found


def mapping_of(address: int) -> dict[str, str]:
    """What the kernel says of the mapping around an address."""
    found: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside:
            name, _, value = line.partition(":")
            found[name] = value.strip()
    return found


def test_it_is_pinned_exact_to_the_byte_and_present(driver: Driver) -> None:
    before = pinned_memory.pinned_bytes()
    data = torch.empty(33 * MIB + 2, dtype=torch.uint8).view(torch.bfloat16)
    held = pinned_memory.allocate_like(data)
    assert (held.shape, held.stride(), held.dtype) == (data.shape, data.stride(), data.dtype)
    assert driver.pinned == {held.data_ptr(): data.nbytes}, "torch's own would round 33 MiB up to 64"
    assert pinned_memory.pinned_bytes() - before == data.nbytes
    assert held.data_ptr() % (2 * MIB) == 0, "or no huge page fits"
    about = mapping_of(held.data_ptr())
    assert int(about["Rss"].split()[0]) << 10 >= data.nbytes, "the pages are there before anything is written"
    flags = set(about["VmFlags"].split())
    assert "dc" in flags, "no copy for child processes"
    assert "hg" in flags or not Path("/sys/kernel/mm/transparent_hugepage").exists()


def test_what_is_no_longer_used_is_given_back(driver: Driver) -> None:
    before = pinned_memory.pinned_bytes()
    held = pinned_memory.allocate_like(torch.empty(MIB, dtype=torch.float32))
    address, part = held.data_ptr(), held[7:9]
    del held
    gc.collect()
    assert address in driver.pinned, "a view of it is still used"
    del part
    gc.collect()
    assert not driver.pinned
    assert pinned_memory.pinned_bytes() == before


def test_a_child_process_does_not_copy_it(driver: Driver) -> None:
    held = pinned_memory.allocate_like(torch.empty(4 * MIB, dtype=torch.uint8)).fill_(7)
    child = os.fork()
    if not child:
        os._exit(bool(mapping_of(held.data_ptr())))
    assert os.waitpid(child, 0)[1] == 0
    assert int(held.sum()) == 7 * held.numel()


@pytest.mark.parametrize("data", [
    torch.arange(1 << 20).view(1024, 1024), torch.arange(1 << 20).view(1024, 1024).t(),
    torch.arange(1 << 20, dtype=torch.float32).view(64, 128, 128).permute(2, 0, 1)])
def test_a_repacked_weight_lies_where_it_lay(driver: Driver, data: torch.Tensor) -> None:
    place = pinned_memory.allocate_like(torch.empty(data.nbytes, dtype=torch.uint8))
    found = pinned_memory.copy_to_host(data, place)
    assert found.data_ptr() == place.data_ptr()
    assert found.stride() == data.stride()
    assert torch.equal(found, data)
    assert len(driver.pinned) == 1


def test_a_weight_that_became_larger_gets_memory_of_its_own(driver: Driver) -> None:
    place = pinned_memory.allocate_like(torch.zeros(MIB, dtype=torch.uint8))
    found = pinned_memory.copy_to_host(torch.ones(MIB + 1, dtype=torch.uint8), place)
    assert int(found.sum()) == MIB + 1
    assert not int(place.sum())
    assert len(driver.pinned) == 2


def test_where_cuda_refuses_torch_is_asked(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.answer = 2  # CUDA_ERROR_OUT_OF_MEMORY
    asked = []

    def empty_strided(*arguments: object, pin_memory: bool, **named: object) -> torch.Tensor:
        asked.append(pin_memory)
        return torch.zeros(2 * MIB, dtype=torch.uint8)

    monkeypatch.setattr(torch, "empty_strided", empty_strided)
    before = pinned_memory.pinned_bytes()
    assert pinned_memory.allocate_like(torch.empty(2 * MIB, dtype=torch.uint8)).numel() == 2 * MIB
    assert asked == [True]
    assert pinned_memory.pinned_bytes() == before


def test_a_kernel_without_huge_pages_gives_small_ones(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999)  # it says EINVAL to that, as to what it was built without
    held = pinned_memory.allocate_like(torch.empty(4 * MIB, dtype=torch.uint8))
    assert list(driver.pinned) == [held.data_ptr()]
    assert "hg" not in mapping_of(held.data_ptr())["VmFlags"].split()


def test_where_there_is_no_address_space_torch_is_asked(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    monkeypatch.setattr(torch, "empty_strided", lambda *arguments, **named: "torch's")
    assert pinned_memory.allocate_like(torch.empty(4 * MIB)) == "torch's"


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_what_is_small_is_torchs(driver: Driver, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(torch, "empty_strided", lambda *arguments, **named: "torch's")
    assert pinned_memory.allocate_like(torch.empty(size)) == "torch's"
    assert not driver.pinned


def test_nothing_is_pinned_where_the_engine_does_not(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_memory, "should_pin_memory", lambda: False)
    assert pinned_memory.allocate_like(torch.empty(2 * MIB)).shape == (2 * MIB,)
    assert not driver.pinned
