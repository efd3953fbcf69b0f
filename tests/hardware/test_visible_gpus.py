"""CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER: the GPUs that CUDA shows, compared with torch's reading of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fakes.nvml import FakeNvml, example, example_gpu
from shoehorn.hardware import detect, visible_gpus
from shoehorn.hardware.types import Gpu

GIB = 1 << 30
SLOW = Gpu(0, "GPU-a0000000-0000-0000-0000-000000000000", "RTX 3060", 12 * GIB, 12 * GIB, (8, 6), 4, 16, False)
FAST = replace(SLOW, index=1, uuid="GPU-a1000000-0000-0000-0000-000000000000", name="RTX 4090", total_bytes=24 * GIB,
               compute_capability=(8, 9))
THIRD = replace(SLOW, index=2, uuid="GPU-b2000000-0000-0000-0000-000000000000")
GPUS = (SLOW, FAST, THIRD)


def _indices(value: str | None, order: str = "PCI_BUS_ID", gpus: tuple[Gpu, ...] = GPUS) -> list[int]:
    environment = {"CUDA_DEVICE_ORDER": order} | ({} if value is None else {"CUDA_VISIBLE_DEVICES": value})
    visible, _ = visible_gpus.select(gpus, environment)
    assert [gpu.ordinal for gpu in visible] == list(range(len(visible)))
    return [gpu.index for gpu in visible]


@pytest.mark.parametrize(("value", "expected"), [
    (None, [0, 1, 2]), ("", []), ("-1", []), ("0", [0]), ("2,0", [2, 0]), (" 1 , 2", [1, 2]), ("0,-1,1", [0]),
    ("0,7,1", [0]), ("7", []), ("0,0", []), ("0,1,0", []), ("1x,2y", [1, 2]), ("x", []), ("1,,2", [1]), ("+1", [1]),
    ("none", []), ("NoDevFiles", []), ("GPU-a1", [1]), ("GPU-b,GPU-a0", [2, 0]), ("GPU-a", []), ("GPU-b,GPU-a", [2]),
    (FAST.uuid, [1]), (f"{FAST.uuid},GPU-a1", []), ("GPU-b,0", [2]), ("0,GPU-b", [0]), ("GPU-ffff", []),
    ("MIG-a1000000-0000-0000-0000-000000000000", []), ("MIG-GPU-a1000000/1/0", [])])
def test_value_selects_the_gpus_that_torch_sees(monkeypatch: pytest.MonkeyPatch, value: str | None,
                                                expected: list[int]) -> None:
    assert _indices(value) == expected
    if value is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    words = torch.cuda._parse_visible_devices()
    if words and isinstance(words[0], str):
        words = torch.cuda._transform_uuid_to_ordinals(words, [gpu.uuid for gpu in GPUS])
    seen = [word for position, word in enumerate(words) if all(int(each) < 3 for each in words[:position + 1])]
    assert [int(word) for word in seen] == expected


@pytest.mark.parametrize(("order", "expected"), [
    ("", [1]), ("FASTEST_FIRST", [1]), ("PCI_BUS_ID", [0])])
def test_numbers_count_in_the_order_of_cuda(order: str, expected: list[int]) -> None:
    assert _indices("0", order) == expected
    known = tuple(replace(gpu, core_hertz=speed) for gpu, speed in zip(GPUS, (3.0, 2.0, 4.0), strict=True))
    assert _indices("0,1,2", "", known) == [2, 0, 1]


def test_equal_gpus_keep_the_order_of_nvml() -> None:
    twins = (SLOW, replace(SLOW, index=1, uuid="GPU-x"))
    assert _indices("1", "", twins) == [1]


@pytest.mark.parametrize(("value", "remark"), [
    ("0", "CUDA_VISIBLE_DEVICES=0 selects GPU 0 of 3"), ("", "CUDA_VISIBLE_DEVICES= selects none of 3, which hides"),
    ("0,9", "CUDA_VISIBLE_DEVICES=0,9 selects GPU 0 of 3; CUDA ignores '9'"), ("1,1", "repeats a GPU"),
    ("MIG-1", "MIG slices are unsupported"), ("0,1,2", ""), (None, "")])
def test_hidden_gpus_are_remarked(value: str | None, remark: str) -> None:
    environment = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} | ({} if value is None else {"CUDA_VISIBLE_DEVICES": value})
    text = visible_gpus.select(GPUS, environment)[1]
    assert remark in text
    assert bool(text) == bool(remark)


def test_engine_gets_uuids_in_the_order_of_the_plan() -> None:
    assert visible_gpus.environment_of((FAST, SLOW)) == {
        "CUDA_VISIBLE_DEVICES": f"{FAST.uuid},{SLOW.uuid}", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert visible_gpus.environment_of((replace(FAST, uuid=""),)) == {}
    again = visible_gpus.select(GPUS, visible_gpus.environment_of((FAST, SLOW)))[0]
    assert [gpu.index for gpu in again] == [1, 0]


def test_detection_applies_the_variables_and_reads_the_speed(tmp_path: Path) -> None:
    fast = {**example_gpu(1), "nvmlDeviceGetNumGpuCores": 16384, "nvmlDeviceGetMaxClockInfo": 2520}
    slow = {**example_gpu(0), "nvmlDeviceGetNumGpuCores": 3584, "nvmlDeviceGetMaxClockInfo": 1777}
    machine = detect.detect(FakeNvml(example(slow, fast)), tmp_path, {"CUDA_VISIBLE_DEVICES": "0"})
    assert [(gpu.index, gpu.core_hertz) for gpu in machine.gpus] == [(1, 16384 * 2520e6)]
    assert machine.gpu_remarks == ("CUDA_VISIBLE_DEVICES=0 selects GPU 1 of 2",)
    assert detect.detect(FakeNvml(example()), tmp_path, {"CUDA_VISIBLE_DEVICES": ""}).gpu_remarks == ()
