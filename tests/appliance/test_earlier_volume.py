"""The current code on a volume of commit e17d384: models, conversion, keys, and what it remembered.

tests/captures/volume_e17d384/README.md describes the volume. No hub is reachable unless a test starts one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from fakes.hub import Hub
from fakes.nvml import FakeNvml
from shoehorn.common.paths import HOME
from shoehorn.common.units import GIB
from shoehorn.config import settings
from shoehorn.config.settings import Settings
from shoehorn.deployment import inputs, known_good
from shoehorn.hardware import bandwidth_probe, detect
from shoehorn.hardware.types import Hardware
from shoehorn.model import checkpoint
from shoehorn.model.files import LocalFiles
from shoehorn.runtime import programs
from shoehorn.runtime.state import Phase, StateFile
from support.clients import chat
from support.running import Appliance, standin
from support.waiting import wait_until

pytestmark = pytest.mark.process

CAPTURES = HOME / "tests" / "captures"
KEYS = dict(re.findall(r"`(default|limited|revoked)` (?:is|was) `(sk-[\w-]+)`",
                       (CAPTURES / "volume_e17d384" / "README.md").read_text(encoding="utf-8")))
NOWHERE = "http://127.0.0.1:9"


class Earlier:
    """A copy of the volume, and what a user of it does."""

    def __init__(self, home: Path) -> None:
        subprocess.run(["tar", "--extract", "--file", CAPTURES / "volume_e17d384" / "volume.tar.gz", "--directory",
                        home], check=True)
        self.home, self.models = home, home / "models"

    def environment(self, model: str = "owner/little", hub: str = NOWHERE, **more: str) -> dict[str, str]:
        """Return the settings of one model."""
        return {"PATH": os.environ["PATH"], "HOME": str(self.home), "MODEL_ID": model, "VRAM_PROFILE": "cpu",
                "MODELS_DIR": str(self.models), "RUN_DIR": str(self.home / "run"), "MODELSCOPE_ENDPOINT": hub,
                "HF_ENDPOINT": hub, **more}

    def run(self, *arguments: str, model: str = "owner/little", hub: str = NOWHERE, **more: str) -> str:
        """Run a command that succeeds, and return its output."""
        done = subprocess.run([sys.executable, "-m", programs.CLI, *arguments], text=True, capture_output=True,
                              env=self.environment(model, hub, **more), timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def settings(self) -> Settings:
        """Return the parsed settings of the GPU machine for which it remembers options."""
        return settings.load({"MODEL_ID": "owner/little", "MODELS_DIR": str(self.models),
                              "RUN_DIR": str(self.home / "run")})


@pytest.fixture
def earlier(tmp_path: Path) -> Earlier:
    return Earlier(tmp_path)


@pytest.fixture
def machine() -> Hardware:
    """Return the recorded GPU machine."""
    capture = json.loads((CAPTURES / "nvml-h200.json").read_text(encoding="utf-8"))
    return replace(detect.detect(FakeNvml(capture)), host_memory_bytes=64 * GIB, host_available_bytes=64 * GIB)


def test_models_are_listed_as_complete_or_incomplete(earlier: Earlier) -> None:
    listing = {each["model"]: each["complete"] for each in json.loads(earlier.run("models", "--json"))}
    assert listing == {"owner/little": True, "owner/little.int4": True, "owner/partial": False}


def test_complete_model_is_not_pulled_again(earlier: Earlier) -> None:
    assert earlier.run("pull").splitlines()[-1] == str(earlier.models / "owner" / "little")


def test_changed_model_is_detected(earlier: Earlier) -> None:
    weights = earlier.models / "owner" / "little" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(AssertionError, match=r"127\.0\.0\.1:9"):
        earlier.run("pull")


def test_killed_pull_is_resumed(earlier: Earlier) -> None:
    with Hub({"owner/partial": earlier.models / "owner" / "little"}) as hub:
        assert "owner/partial" in earlier.run("pull", model="owner/partial", hub=hub.url)
        assert hub.downloads("model.safetensors") == [f"bytes={256 << 10}-"]
    folders = [earlier.models / "owner" / name / "model.safetensors" for name in ("partial", "little")]
    assert folders[0].read_bytes() == folders[1].read_bytes()


def test_conversion_is_reused(earlier: Earlier) -> None:
    converted = earlier.models / "owner" / "little.int4" / "model.safetensors"
    before = converted.stat()
    output = earlier.run("convert", QUANTIZATION="int4")
    assert output.splitlines()[-1] == str(converted.parent)
    assert converted.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("quantization", ["auto", "int4"])
def test_plan_needs_no_network(earlier: Earlier, quantization: str) -> None:
    plan = json.loads(earlier.run("plan", "--json", QUANTIZATION=quantization, OFFLINE="yes"))
    assert plan["engine_args"]["max-model-len"] <= 512


def test_known_good_options_are_found(earlier: Earlier, machine: Hardware) -> None:
    loaded = earlier.settings()
    shape = checkpoint.read(LocalFiles(earlier.models / "owner" / "little"))
    path = known_good.location(loaded, machine, inputs.select_profile(loaded, machine), shape)
    assert known_good.read(path) == {"max-num-batched-tokens": 1024, "max-num-seqs": 64, "max-model-len": 512,
                                       "enforce-eager": False}


def test_measured_bandwidths_are_used(earlier: Earlier, machine: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())  # as if CUDA's bindings were installed
    [gpu] = bandwidth_probe.with_measured_bandwidths(machine, earlier.models / ".shoehorn" / "speed.json").gpus
    assert (gpu.link_bytes_per_second, gpu.device_bytes_per_second) == (12345678901, 3210987654321)


def test_state_is_read(earlier: Earlier) -> None:
    state = StateFile(earlier.home / "run").read()
    assert (state.phase, state.model, state.restarts, state.failures) == (Phase.LOADING, "little", 2, {"killed": 1})


def test_appliance_serves_the_conversion_with_the_earlier_keys(earlier: Earlier) -> None:
    appliance = Appliance(earlier.home, **earlier.environment(
        MODEL_SOURCE="modelscope", API_KEY="", QUANTIZATION="int4", OFFLINE="yes", SERVED_MODEL_NAME="shoehorn-demo",
        **standin()))
    appliance.key = KEYS["default"]
    try:
        appliance.wait_for(Phase.READY)
        wait_until(lambda: chat(appliance).status_code == 200, 20, "an answer")
        assert "converting" not in appliance.output
        statuses = {name: httpx.get(f"{appliance.url}/v1/models", headers={"Authorization": f"Bearer {key}"},
                                    timeout=30).status_code for name, key in KEYS.items()}
        assert statuses == {"default": 200, "limited": 200, "revoked": 401}
        assert appliance.state.restarts == 0, "the earlier state belongs to an earlier start"
        assert appliance.stop() == 0
    finally:
        appliance.discard()
