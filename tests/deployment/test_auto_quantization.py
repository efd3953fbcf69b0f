"""QUANTIZATION=auto: which models are converted to INT4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fakes import captured
from shoehorn.common import disk as disk_module
from shoehorn.config import settings as settings_module
from shoehorn.config.settings import Settings
from shoehorn.deployment import auto_quantization, inputs
from shoehorn.deployment.served_model import ShapeReader
from shoehorn.hardware.types import Hardware
from shoehorn.int4 import artifact
from shoehorn.model.reference import ModelRef
from shoehorn.store import pull
from support.plans import LARGE, MIDDLE, SMALL, machine

GIB = 1 << 30
TINY = ("made up", 2.0)


def resolve(settings: Settings, here: Hardware) -> str:
    return auto_quantization.resolve_quantization(
        settings, here, inputs.select_profile(settings, here), ShapeReader(settings), volume=True).quantization


@pytest.fixture
def resolution(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """(model, GPU, free disk, settings) -> the resolved QUANTIZATION."""
    def run(model: str, gpu: tuple[str, float], disk: int = 1000 * GIB, **environment: str) -> str:
        monkeypatch.setattr(pull, "hub_files", lambda _, ref: captured.files(model))
        monkeypatch.setattr(disk_module, "disk_free", lambda path: disk)
        loaded = settings_module.load({"MODEL_ID": "a/b", "MODELS_DIR": str(tmp_path), **environment})
        return resolve(loaded, machine(gpu) if gpu else machine())

    return run


@pytest.mark.parametrize(("model", "gpu", "environment", "expected"), [
    ("llama-3.1-8b-instruct", MIDDLE, {}, "auto"),
    ("llama-3.1-8b-instruct", SMALL, {}, "int4"),
    ("deepseek-r1-distill-llama-70b", MIDDLE, {}, "int4"),
    ("deepseek-r1-distill-llama-70b", LARGE, {"QUANTIZATION": "bitsandbytes"}, "bitsandbytes"),
    ("deepseek-r1-distill-llama-70b", LARGE, {"QUANTIZATION": "none"}, "none"),
    ("deepseek-r1-distill-llama-70b", LARGE, {"VLLM_EXTRA_ARGS": "--quantization bitsandbytes"}, "auto"),
    ("deepseek-r1-distill-llama-70b", LARGE, {"VRAM_PROFILE": "32gb"}, "auto"),
    ("deepseek-r1-distill-llama-70b", TINY, {}, "int4"),
    ("llama-3.1-8b-instruct-w4a16", SMALL, {}, "auto"),
    ("gpt-oss-20b", SMALL, {}, "auto"),
    ("llama-3.1-8b-instruct", (), {"VRAM_PROFILE": "cpu"}, "auto"),
])
def test_model_that_does_not_fit_unquantized_is_converted(resolution: Callable[..., str], model: str,
                                                          gpu: tuple[str, float], environment: dict[str, str],
                                                          expected: str) -> None:
    assert resolution(model, gpu, **environment) == expected


def test_volume_too_small_for_the_conversion_means_nf4(resolution: Callable[..., str],
                                                       caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = "deepseek-r1-distill-llama-70b"
    assert resolution(model, MIDDLE, 150 * GIB) == "auto"
    assert "Not converting to INT4" in caplog.text
    assert resolution(model, MIDDLE, 150 * GIB, KEEP_ORIGINAL="no") == "int4"


def test_existing_conversion_is_used_without_a_request_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(settings: Settings, ref: ModelRef) -> None:
        raise AssertionError("request to the hub")

    monkeypatch.setattr(pull, "hub_files", unreachable)
    monkeypatch.setattr(artifact, "locate", lambda models_dir, ref: Path("/there"))
    assert resolve(settings_module.load({"MODEL_ID": "a/b"}), machine(MIDDLE)) == "int4"
