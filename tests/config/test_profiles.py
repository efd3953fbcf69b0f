"""Profiles: the shipped files, user files, and selection for a machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from shoehorn.common.errors import SettingsError
from shoehorn.common.paths import PROFILES
from shoehorn.config import profiles, settings
from shoehorn.deployment import inputs
from shoehorn.hardware import requirements
from shoehorn.hardware.types import Gpu, Hardware

GIB = 1 << 30


def machine(*gib: float, notes: tuple[str, ...] = ()) -> Hardware:
    """Return a machine with GPUs of these sizes, as CUDA reports them."""
    gpus = tuple(Gpu(index, f"GPU-{index}", "made up", round(size * GIB), round(size * GIB), (8, 9), 4, 16, False)
                 for index, size in enumerate(gib))
    return Hardware(gpus, "580", 64 * GIB, 64 * GIB, 8.0, notes)


def test_every_shipped_profile_states_its_class_of_machine() -> None:
    assert set(profiles.names()) >= {"7gb", "32gb", "2x20gb", "cpu"}
    for name in profiles.names():
        text = (PROFILES / f"{name}.yaml").read_text()
        assert text.startswith("# For "), name
        profile = profiles.load(name)
        assert profile.name == name
        assert profile.description


@pytest.mark.parametrize(("name", "options"), [
    ("32gb", {"dtype": "bfloat16", "quantization": "bitsandbytes", "gpu-memory-utilization": 0.9, "cpu-offload-gb": 20,
              "max-num-seqs": 256, "max-num-batched-tokens": 8192, "max-model-len": 8192, "enable-prefix-caching": True,
              "block-size": 32, "enforce-eager": False, "disable-custom-all-reduce": True}),
    ("7gb", {"dtype": "bfloat16", "quantization": "bitsandbytes", "cpu-offload-gb": 60, "max-num-seqs": 8,
             "max-num-batched-tokens": 512, "max-model-len": 512, "enable-prefix-caching": True, "block-size": 16,
             "enforce-eager": True}),
])
def test_measured_profiles_keep_their_options(name: str, options: dict[str, object]) -> None:
    engine = profiles.load(name).engine
    assert {option: engine.get(option) for option in options} == options


def test_profile_for_two_gpus_differs_only_in_tensor_parallelism() -> None:
    one, two = profiles.load("32gb").engine, profiles.load("2x20gb").engine
    assert two == {**one, "tensor-parallel-size": 2}


def test_auto_profile_sets_no_option() -> None:
    profile = inputs.select_profile(settings.load({}), machine(24.0))
    assert (profile.name, profile.is_auto, profile.engine) == ("auto", True, {})


def test_named_profile_is_used_on_any_machine() -> None:
    assert inputs.select_profile(settings.load({"VRAM_PROFILE": "cpu"}), machine()).name == "cpu"


def test_auto_without_a_gpu_is_an_error_with_a_remedy() -> None:
    with pytest.raises(SettingsError, match="driver library not found") as caught:
        inputs.select_profile(settings.load({}), machine(notes=("NVML: driver library not found",)))
    for words in ("--gpus all", "NVIDIA Container Toolkit", "VRAM_PROFILE=cpu"):
        assert words in caught.value.remedy
    assert (caught.value.code, caught.value.exit_code) == ("no_gpu", 2)


def test_too_few_gpus_is_an_error() -> None:
    with pytest.raises(SettingsError, match="2x20gb") as caught:
        requirements.require_gpus(machine(20.0), "2x20gb", 2)
    assert caught.value.code == "too_few_gpus"


def test_user_profile_is_read_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("engine:\n  max-model-len: 8k\nenvironment:\n  VLLM_LOGGING_LEVEL: DEBUG\n  OMP_NUM_THREADS: 4\n")
    profile = profiles.load(str(path))
    assert (profile.name, profile.engine) == ("mine", {"max-model-len": 8000})
    assert profile.environment == {"VLLM_LOGGING_LEVEL": "DEBUG", "OMP_NUM_THREADS": "4"}
    assert profile.match.device == "cuda"


@pytest.mark.parametrize(("text", "words"), [
    ("engine:\n  max-modle-len: 3\n", "did you mean --max-model-len"),
    ("engine:\n  swap-space: 4\n", "swap-space"),
    ("engine:\n  host: 0.0.0.0\n", "--host is set by"),
    ("engine:\n  enforce-eager: 'no'\n", "enforce-eager: 'no'"),
    ("vram: 7GB\n", "'vram'"),
    ("engine: [a]\n", "engine: "),
    ("- a\n", "not a mapping"),
    ("", "not a mapping"),
    ("match: {device: tpu}\n", "'tpu'"),
    ("match: {device: cpu, vram: 7GB}\n", "gpus and vram"),
    ("match: {gpus: 0, vram: 7GB}\n", "gpus 0"),
    ("match: {gpus: 2}\n", "vram"),
    ("match: {vram: lots}\n", "'lots'"),
    ("match: {vram: 7GB, cores: 1}\n", "cores"),
    ("environment: {lower: 1}\n", "environment: 'lower'"),
    ("environment: {X: [1]}\n", "environment: 'X'"),
    ("a: b: c\n", "YAML"),
])
def test_mistake_in_a_profile_is_reported_with_the_file(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        profiles.load(str(path))
    assert caught.value.code == "invalid_profile"
    assert words in caught.value.cause
    assert "mine.yaml" in caught.value.cause


def test_all_mistakes_of_a_profile_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"engine": {"swap-space": 1, "device": "cuda"}, "match": {"vram": "x"},
                                    "environment": {"a": 1}}))
    with pytest.raises(SettingsError) as caught:
        profiles.load(str(path))
    assert len(caught.value.cause.splitlines()) == 4


def test_unknown_profile_lists_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="9gb") as caught:
        profiles.load("9gb")
    assert caught.value.code == "unknown_profile"
    assert "32gb" in caught.value.remedy


def test_missing_profile_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml") as caught:
        profiles.load(str(tmp_path / "none.yaml"))
    assert caught.value.code == "unreadable_profile"
