"""The largest images and videos are those of vLLM's own processing information."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from contract.oracle import items, store
from shoehorn.model.encoders import read_encoders
from shoehorn.planner.memory.items import largest_item
from shoehorn.planner.serving_config import ItemOptions, Limits, ServingConfig

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.contract


def test_largest_items_are_those_of_vllm() -> None:
    program = subprocess.run([sys.executable, "-m", "contract.oracle.items"], check=True, capture_output=True,
                             text=True, cwd=TESTS, env={"PYTHONPATH": str(TESTS)})
    expected = json.loads(program.stdout.splitlines()[-1])
    assert expected.keys() == items.MODELS.keys()
    assert {name: planned(name, tuple(tokens)) for name, tokens in expected.items()} == expected


def planned(name: str, modalities: tuple[str, ...]) -> dict[str, int]:
    encoder = next(read_encoders(store.load(name)["config"], 4096, items.MODELS[name][1]))
    config = ServingConfig(1 << 40, Limits(items.CONTEXT, 8, 2048))
    without_video = ServingConfig(1 << 40, config.limits, items=ItemOptions((("video", 0),)))
    tokens = {"image": largest_item(encoder, without_video), "video": largest_item(encoder, config)}
    return {modality: tokens[modality] for modality in modalities}
