"""QUANTIZATION=auto: what is converted to INT4, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes import captured
from shoehorn.common import disk as disk_module
from shoehorn.config import settings as settings_module
from shoehorn.config.settings import Settings
from shoehorn.deployment import auto_quantization, inputs
from shoehorn.int4 import artifact
from shoehorn.model.reference import ModelRef
from shoehorn.store import pull
from support.plans import LARGE, MIDDLE, SMALL, machine

GIB = 1 << 30
LITTLE = ("made up", 2.0)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    """(model, card, free disk, settings) -> what becomes of QUANTIZATION."""
    def settle(model: str, card: tuple[str, float], disk: int = 1000 * GIB, **environment: str) -> str:
        monkeypatch.setattr(pull, "hub_files", lambda _, ref: captured.files(model))
        monkeypatch.setattr(disk_module, "disk_free", lambda path: disk)
        loaded = settings_module.load({"MODEL_ID": "a/b", "MODELS_DIR": str(tmp_path), **environment})
        here = machine(card) if card else machine()
        return auto_quantization.resolve_quantization(loaded, here, inputs.select(loaded, here)).quantization

    return settle


@pytest.mark.parametrize(("model", "card", "environment", "expected"), [
    ("llama-3.1-8b-instruct", MIDDLE, {}, "auto"),
    ("llama-3.1-8b-instruct", SMALL, {}, "int4"),
    ("deepseek-r1-distill-llama-70b", MIDDLE, {}, "int4"),
    ("deepseek-r1-distill-llama-70b", LARGE, {"QUANTIZATION": "bitsandbytes"}, "bitsandbytes"),
    ("deepseek-r1-distill-llama-70b", LARGE, {"QUANTIZATION": "none"}, "none"),
    ("deepseek-r1-distill-llama-70b", LARGE, {"VLLM_EXTRA_ARGS": "--quantization bitsandbytes"}, "auto"),
    ("deepseek-r1-distill-llama-70b", LARGE, {"VRAM_PROFILE": "32gb"}, "auto"),
    ("deepseek-r1-distill-llama-70b", LITTLE, {}, "int4"),
    ("llama-3.1-8b-instruct-w4a16", SMALL, {}, "auto"),
    ("gpt-oss-20b", SMALL, {}, "auto"),
    ("llama-3.1-8b-instruct", (), {"VRAM_PROFILE": "cpu"}, "auto"),
])
def test_what_does_not_fit_as_it_is_is_converted(settled: object, model: str, card: tuple[str, float],
                                                 environment: dict[str, str], expected: str) -> None:
    assert settled(model, card, **environment) == expected  # type: ignore[operator]  # a fixture that is a function


def test_a_volume_without_room_for_the_conversion_means_nf4(settled: object,
                                                            caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = "deepseek-r1-distill-llama-70b"
    assert settled(model, MIDDLE, 150 * GIB) == "auto"  # type: ignore[operator]  # as above
    assert "not converted to INT4: The model's files take" in caplog.text
    assert settled(model, MIDDLE, 150 * GIB, KEEP_ORIGINAL="no") == "int4"  # type: ignore[operator]  # as above


def test_what_was_converted_is_used_without_a_look_at_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(settings: Settings, ref: ModelRef) -> None:
        raise AssertionError("the hub is asked")

    monkeypatch.setattr(pull, "hub_files", unreachable)
    monkeypatch.setattr(artifact, "locate", lambda models_dir, ref: Path("/there"))
    loaded, here = settings_module.load({"MODEL_ID": "a/b"}), machine(MIDDLE)
    assert auto_quantization.resolve_quantization(loaded, here, inputs.select(loaded, here)).quantization == "int4"
