"""QUANTIZATION=int4: pulled, converted once and served by the real engine, which says what it says unquantized."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from fakes.hub import Hub
from shoehorn.runtime.state import Phase, StateFile
from support.clients import answers
from support.running import DEMO_MODEL, Appliance
from support.waiting import wait_until

pytestmark = pytest.mark.engine

Start = Callable[..., Appliance]


@pytest.mark.fault("`docker stop` while converting, and a start after it", "It goes on; the hub is not asked again.")
def test_pulled_converted_once_and_served(start: Start, appliance: Appliance, tmp_path: Path) -> None:
    with Hub({"shoehorn/demo": DEMO_MODEL}) as hub:
        settings = {"MODEL_ID": "shoehorn/demo", "MODEL_SOURCE": "modelscope", "MODELSCOPE_ENDPOINT": hub.url,
                    "QUANTIZATION": "int4"}
        first = start(**settings)
        wait_until(lambda: StateFile(first.run_dir).read().phase is Phase.CONVERTING, 60, "it converts")
        assert first.end(signal.SIGTERM, seconds=20) == 0
        asked = len(hub.requests)
        second = start(**settings, KEEP_ORIGINAL="no")
        second.wait_for(Phase.READY)
        assert len(hub.requests) == asked
    folder = tmp_path / "models" / "shoehorn" / "demo.int4"
    assert str(folder) in (second.run_dir / "vllm.yaml").read_text()
    assert not list((tmp_path / "models" / "shoehorn" / "demo").glob("*.safetensors"))
    said = answers(second)
    same = sum(mine == theirs for mine, theirs in zip(said, answers(appliance), strict=True))
    print(f"{same} of {len(said)} answers are those of the unquantized model: {said}")
    assert same >= len(said) - 1
    assert second.end() == 0
    third = start(**settings, OFFLINE="yes")
    third.wait_for(Phase.LOADING)
    assert "converting" not in third.output
    assert third.end() == 0


@pytest.mark.contract
def test_two_workers_divide_it(tmp_path: Path) -> None:
    """Tensor parallelism; half of a matrix of 640 columns is no whole number of groups of 128, so they are of 64."""
    (tmp_path / "models").mkdir()
    environment = {**os.environ, "MODEL_ID": str(DEMO_MODEL), "MODEL_SOURCE": "local",
                   "MODELS_DIR": str(tmp_path / "models"), "RUN_DIR": str(tmp_path / "run"), "VRAM_PROFILE": "cpu",
                   "VLLM_CPU_OMP_THREADS_BIND": "0|1", "HF_HUB_OFFLINE": "1"}
    converted = subprocess.run([sys.executable, "-m", "shoehorn.cli", "convert"], env=environment, check=True,
                               capture_output=True, text=True).stdout.splitlines()[-1]
    script = tmp_path / "ask.py"
    script.write_text(textwrap.dedent(f"""
        from vllm import LLM, SamplingParams

        if __name__ == "__main__":
            engine = LLM(model={converted!r}, tensor_parallel_size=2, enforce_eager=True, max_model_len=256,
                         max_num_seqs=1, kv_cache_memory_bytes=1 << 27)
            done = engine.generate("<|user|>Who are you?<|assistant|>", SamplingParams(temperature=0, max_tokens=24))
            print("said:", done[0].outputs[0].text)
        """))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=200,
                          check=False)
    assert "said: My name is Shoehorn." in done.stdout, done.stdout + done.stderr
