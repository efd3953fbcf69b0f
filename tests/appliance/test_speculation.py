"""SPECULATIVE and `shoehorn bench` with the real engine: guesses change no answer, and speed is measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import yaml

from fakes.hub import Hub
from shoehorn.runtime.state import Phase
from support.clients import answers
from support.running import DEMO_MODEL, Appliance

pytestmark = pytest.mark.engine

Start = Callable[..., Appliance]


def accepted(appliance: Appliance) -> float:
    """Guessed tokens that the engine has accepted since its start."""
    text = httpx.get(f"http://127.0.0.1:{appliance.metrics_port}/metrics", timeout=60).text
    found = re.search(r"^vllm:spec_decode_num_accepted_tokens_total\{[^}]*\} (\S+)$", text, re.MULTILINE)
    assert found, text
    return float(found[1])


def test_the_running_appliance_is_measured(appliance: Appliance) -> None:
    done = subprocess.run([sys.executable, "-m", "shoehorn.cli", "bench", "--requests", "1,4", "--tokens", "16",
                           "--json"],
                          env={**os.environ, "RUN_DIR": str(appliance.run_dir), "VRAM_PROFILE": "cpu"}, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rounds = json.loads(done.stdout)["rounds"]
    assert [(each["requests"], each["tokens"]) for each in rounds] == [(1, 16), (4, 64)]
    assert all(each["tokens_per_second"] > 0 for each in rounds)


def test_a_draft_is_pulled_too_and_guesses(start: Start, appliance: Appliance, tmp_path: Path) -> None:
    with Hub({"shoehorn/demo": DEMO_MODEL, "shoehorn/draft": DEMO_MODEL}) as hub:
        drafted = start(MODEL_ID="shoehorn/demo", MODEL_SOURCE="modelscope", MODELSCOPE_ENDPOINT=hub.url,
                        SPECULATIVE="shoehorn/draft")
        drafted.wait_for(Phase.READY)
    options = yaml.safe_load((drafted.run_dir / "vllm.yaml").read_text())
    assert options["speculative-config"]["model"] == str(tmp_path / "models" / "shoehorn" / "draft")
    assert answers(drafted) == answers(appliance)
    assert accepted(drafted) > 0, "the draft is the model itself, so it guesses well"
    refused = httpx.post(f"{drafted.url}/v1/completions", headers=drafted.headers(), timeout=60,
                         json={"model": "shoehorn-demo", "prompt": "a", "min_p": 0.5})
    assert (refused.status_code, "min_p" in refused.json()["error"]["message"]) == (400, True)
    assert drafted.end() == 0
