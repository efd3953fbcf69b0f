"""Pinned host memory of the engine plugin, with a stand-in for CUDA's driver: allocation, reuse and release."""

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
    """Pins every range, or refuses."""

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
    stand_in = Driver()
    monkeypatch.setattr(pinned_memory, "_driver", lambda: stand_in)
    monkeypatch.setattr(pinned_memory, "should_pin_memory", lambda: True)
    return stand_in


def mapping_of(address: int) -> dict[str, str]:
    """Read the kernel's description of the mapping around an address."""
    values: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside:
            name, _, value = line.partition(":")
            values[name] = value.strip()
    return values


def test_pinned_memory_has_exact_size_and_is_populated(driver: Driver) -> None:
    before = pinned_memory.pinned_bytes()
    data = torch.empty(33 * MIB + 2, dtype=torch.uint8).view(torch.bfloat16)
    pinned = pinned_memory.allocate_like(data)
    assert (pinned.shape, pinned.stride(), pinned.dtype) == (data.shape, data.stride(), data.dtype)
    assert driver.pinned == {pinned.data_ptr(): data.nbytes}, "torch's own would round 33 MiB up to 64"
    assert pinned_memory.pinned_bytes() - before == data.nbytes
    assert pinned.data_ptr() % (2 * MIB) == 0, "or no huge page fits"
    about = mapping_of(pinned.data_ptr())
    assert int(about["Rss"].split()[0]) << 10 >= data.nbytes, "the pages are populated before the first write"
    flags = set(about["VmFlags"].split())
    assert "dc" in flags, "no copy for child processes"
    assert "hg" in flags or not Path("/sys/kernel/mm/transparent_hugepage").exists()


def test_unused_memory_is_freed(driver: Driver) -> None:
    before = pinned_memory.pinned_bytes()
    pinned = pinned_memory.allocate_like(torch.empty(MIB, dtype=torch.float32))
    address, part = pinned.data_ptr(), pinned[7:9]
    del pinned
    gc.collect()
    assert address in driver.pinned, "a view of it is still used"
    del part
    gc.collect()
    assert not driver.pinned
    assert pinned_memory.pinned_bytes() == before


def test_child_process_does_not_inherit_it(driver: Driver) -> None:
    pinned = pinned_memory.allocate_like(torch.empty(4 * MIB, dtype=torch.uint8)).fill_(7)
    child = os.fork()
    if not child:
        os._exit(bool(mapping_of(pinned.data_ptr())))
    assert os.waitpid(child, 0)[1] == 0
    assert int(pinned.sum()) == 7 * pinned.numel()


@pytest.mark.parametrize("data", [
    torch.arange(1 << 20).view(1024, 1024), torch.arange(1 << 20).view(1024, 1024).t(),
    torch.arange(1 << 20, dtype=torch.float32).view(64, 128, 128).permute(2, 0, 1)])
def test_weight_is_copied_in_place(driver: Driver, data: torch.Tensor) -> None:
    place = pinned_memory.allocate_like(torch.empty(data.nbytes, dtype=torch.uint8))
    copy = pinned_memory.copy_to_host(data, place)
    assert copy.data_ptr() == place.data_ptr()
    assert copy.stride() == data.stride()
    assert torch.equal(copy, data)
    assert len(driver.pinned) == 1


def test_larger_weight_gets_new_memory(driver: Driver) -> None:
    place = pinned_memory.allocate_like(torch.zeros(MIB, dtype=torch.uint8))
    copy = pinned_memory.copy_to_host(torch.ones(MIB + 1, dtype=torch.uint8), place)
    assert int(copy.sum()) == MIB + 1
    assert not int(place.sum())
    assert len(driver.pinned) == 2


def test_torch_allocates_if_cuda_refuses(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_small_pages_are_used_without_huge_pages(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999)  # EINVAL, as from a kernel without support
    pinned = pinned_memory.allocate_like(torch.empty(4 * MIB, dtype=torch.uint8))
    assert list(driver.pinned) == [pinned.data_ptr()]
    assert "hg" not in mapping_of(pinned.data_ptr())["VmFlags"].split()


def test_torch_allocates_without_address_space(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    torchs = torch.ones(4 * MIB)
    monkeypatch.setattr(torch, "empty_strided", lambda *arguments, **named: torchs)
    assert pinned_memory.allocate_like(torch.empty(4 * MIB)) is torchs
    assert not torchs.any(), "not zeros, which it promises"


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_torch_allocates_small_tensors(driver: Driver, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(torch, "empty_strided", lambda *arguments, **named: "torch's")
    assert pinned_memory.allocate_like(torch.empty(size)) == "torch's"
    assert not driver.pinned


def test_memory_is_not_pinned_if_the_engine_does_not(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_memory, "should_pin_memory", lambda: False)
    assert pinned_memory.allocate_like(torch.empty(2 * MIB)).shape == (2 * MIB,)
    assert not driver.pinned
