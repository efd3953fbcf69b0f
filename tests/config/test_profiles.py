"""Profiles: the shipped files, a user's own, and which one a machine gets."""

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
    """A machine with cards of these sizes, as CUDA reports them."""
    gpus = tuple(Gpu(index, f"GPU-{index}", "made up", round(size * GIB), round(size * GIB), (8, 9), 4, 16, False)
                 for index, size in enumerate(gib))
    return Hardware(gpus, "580", 64 * GIB, 64 * GIB, 8.0, notes)


def test_the_shipped_profiles_are_there_and_each_says_whom_it_serves() -> None:
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
def test_the_proven_starting_points_stand(name: str, options: dict[str, object]) -> None:
    engine = profiles.load(name).engine
    assert {option: engine.get(option) for option in options} == options


def test_two_cards_get_what_one_gets_and_share_it() -> None:
    one, two = profiles.load("32gb").engine, profiles.load("2x20gb").engine
    assert two == {**one, "tensor-parallel-size": 2}


def test_auto_leaves_everything_to_the_plan() -> None:
    profile = inputs.select(settings.load({}), machine(24.0))
    assert (profile.name, profile.is_auto, profile.engine) == ("auto", True, {})


def test_a_named_profile_is_used_on_any_machine() -> None:
    assert inputs.select(settings.load({"VRAM_PROFILE": "cpu"}), machine()).name == "cpu"


def test_without_a_gpu_nothing_is_chosen_and_the_remedy_says_what_to_type() -> None:
    with pytest.raises(SettingsError, match="driver library not found") as caught:
        inputs.select(settings.load({}), machine(notes=("NVML: driver library not found",)))
    for words in ("--gpus all", "NVIDIA Container Toolkit", "VRAM_PROFILE=cpu"):
        assert words in caught.value.remedy
    assert caught.value.exit_code == 2


def test_too_few_gpus_are_counted() -> None:
    with pytest.raises(SettingsError, match="needs 2 GPUs, and this container sees only 1"):
        requirements.require_gpus(machine(20.0), "2x20gb", 2)


def test_a_users_own_file_is_read_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("engine:\n  max-model-len: 8k\nenvironment:\n  VLLM_LOGGING_LEVEL: DEBUG\n  OMP_NUM_THREADS: 4\n")
    profile = profiles.load(str(path))
    assert (profile.name, profile.engine) == ("mine", {"max-model-len": 8000})
    assert profile.environment == {"VLLM_LOGGING_LEVEL": "DEBUG", "OMP_NUM_THREADS": "4"}
    assert profile.match.device == "cuda"


@pytest.mark.parametrize(("text", "said"), [
    ("engine:\n  max-modle-len: 3\n", "did you mean --max-model-len"),
    ("engine:\n  swap-space: 4\n", "swap-space is gone"),
    ("engine:\n  host: 0.0.0.0\n", "host is fixed by Shoehorn"),
    ("engine:\n  enforce-eager: 'no'\n", "enforce-eager is a switch"),
    ("vram: 7GB\n", "unknown key 'vram'"),
    ("engine: [a]\n", "engine is not a mapping"),
    ("- a\n", "holds no mapping"),
    ("", "holds no mapping"),
    ("match: {device: tpu}\n", "neither cuda nor cpu"),
    ("match: {device: cpu, vram: 7GB}\n", "neither gpus nor vram"),
    ("match: {gpus: 0, vram: 7GB}\n", "gpus 0 is not"),
    ("match: {gpus: 2}\n", "vram is missing"),
    ("match: {vram: lots}\n", "'lots' is not a size"),
    ("match: {vram: 7GB, cards: 1}\n", "cards is unknown"),
    ("environment: {lower: 1}\n", "environment: 'lower'"),
    ("environment: {X: [1]}\n", "environment: 'X'"),
    ("a: b: c\n", "is no YAML"),
])
def test_a_mistake_in_a_file_is_named_with_the_file(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        profiles.load(str(path))
    assert said in caught.value.cause
    assert "mine.yaml" in caught.value.cause


def test_all_mistakes_of_a_file_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"engine": {"swap-space": 1, "device": "cuda"}, "match": {"vram": "x"},
                                    "environment": {"a": 1}}))
    with pytest.raises(SettingsError) as caught:
        profiles.load(str(path))
    assert len(caught.value.cause.splitlines()) == 4


def test_an_unknown_name_lists_the_known_ones_and_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="VRAM_PROFILE=9gb is no profile") as caught:
        profiles.load("9gb")
    assert "32gb" in caught.value.remedy
    with pytest.raises(SettingsError, match="cannot be read"):
        profiles.load(str(tmp_path / "none.yaml"))
