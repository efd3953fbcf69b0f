"""QUANTIZATION=int4: pulled, converted once, served by the real engine, drained and stopped; and divided among workers.

The tests of the converted model share one volume and run in their order.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fakes.hub import Hub
from shoehorn.runtime import programs
from shoehorn.runtime.state import Phase
from support import refused_abilities
from support.clients import ERROR_ENDS, UNQUANTIZED, BackgroundRequest, admitted, answers, chat
from support.running import DEMO_MODEL, Appliance, standin
from support.waiting import wait_until

pytestmark = pytest.mark.engine


class Conversion:
    """Starts of one model on one volume; `appliance` is the latest."""

    def __init__(self, home: Path, hub: Hub) -> None:
        self.hub, self.home = hub, home
        self.started: list[Appliance] = []

    def start(self, **settings: str) -> Appliance:
        """Start the next appliance."""
        self.started.append(Appliance(
            self.home, MODEL_ID="shoehorn/demo", MODEL_SOURCE="modelscope", MODELSCOPE_ENDPOINT=self.hub.url,
            QUANTIZATION="int4", **settings))
        return self.started[-1]

    @property
    def appliance(self) -> Appliance:
        """The latest start."""
        return self.started[-1]


@pytest.fixture(scope="module")
def conversion(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Conversion]:
    with Hub({"shoehorn/demo": DEMO_MODEL}) as hub:
        conversion = Conversion(tmp_path_factory.mktemp("int4"), hub)
        yield conversion
        for appliance in conversion.started:
            appliance.discard()


@pytest.mark.fault("`docker stop` while converting, and a start after it",
                   "The conversion is resumed; no request to the hub.")
def test_model_is_pulled_and_converted_once_and_served(conversion: Conversion) -> None:
    first = conversion.start()
    wait_until(lambda: first.phase is Phase.CONVERTING, 60, "the conversion")
    assert first.stop(signal.SIGTERM, seconds=20) == 0
    before = len(conversion.hub.requests)
    second = conversion.start(KEEP_ORIGINAL="no", DRAIN_TIMEOUT="60", MAX_NUM_SEQS="4", MAX_QUEUED_REQUESTS="0",
                              TOOL_CALL_PARSER="off", REASONING_PARSER="off")
    second.wait_for(Phase.READY)
    assert len(conversion.hub.requests) == before
    assert str(second.models_dir / "shoehorn" / "demo.int4") in (second.run_dir / "vllm.yaml").read_text()
    assert not list((second.models_dir / "shoehorn" / "demo").glob("*.safetensors"))
    quantized = answers(second)
    same = [question for question in UNQUANTIZED if quantized[question] == UNQUANTIZED[question]]
    print(f"{len(same)} of {len(UNQUANTIZED)} answers are those of the unquantized model: {quantized}")
    assert len(same) >= len(UNQUANTIZED) - 1


def test_tools_and_thoughts_are_refused_without_parsers(conversion: Conversion) -> None:
    refused_abilities.check_openais_form(conversion.appliance)
    refused_abilities.check_anthropics_form(conversion.appliance)


def test_drain_finishes_streams_and_leaves_the_appliance_running(conversion: Conversion) -> None:
    appliance = conversion.appliance
    core = appliance.find("VLLM::EngineCor")
    core.suspend()
    streams = [BackgroundRequest(appliance, path) for path in ERROR_ENDS]
    wait_until(lambda: admitted(appliance) == 4, 20, "four admitted requests")
    refusal = chat(appliance, "hello")
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (429, "queue_full")
    assert refusal.headers.get_list("retry-after") == ["5"]
    with subprocess.Popen([sys.executable, "-m", programs.CLI, "drain"], stdout=subprocess.PIPE, text=True, env={
            **os.environ, "RUN_DIR": str(appliance.run_dir), "DRAIN_TIMEOUT": "60"}) as drain:
        wait_until(lambda: appliance.phase is Phase.STOPPING, 20, "the drain")
        assert httpx.get(f"{appliance.url}/readyz").status_code == 503
        core.resume()
        output, _ = drain.communicate(timeout=90)
    assert drain.returncode == 0
    assert output.startswith("drained: 4 requests finished, 0 aborted")
    for each in streams:
        text = each.result()
        assert '"error"' not in text
        assert "data: [DONE]" in text or "message_stop" in text or "response.completed" in text
    assert appliance.phase is Phase.STOPPING
    assert appliance.process.poll() is None
    assert appliance.stop(signal.SIGTERM, seconds=30) == 0


def test_next_start_neither_asks_the_hub_nor_converts(conversion: Conversion) -> None:
    before = len(conversion.hub.requests)
    third = conversion.start(OFFLINE="yes", **standin())
    third.wait_for(Phase.READY)
    assert str(third.models_dir / "shoehorn" / "demo.int4") in (third.run_dir / "vllm.yaml").read_text()
    assert len(conversion.hub.requests) == before
    assert "converting" not in third.output
    assert third.stop() == 0


@pytest.mark.contract
def test_two_workers_divide_the_model(tmp_path: Path) -> None:
    """Tensor parallelism; half of a matrix of 640 columns is not a multiple of 128, so groups have 64 columns."""
    (tmp_path / "models").mkdir()
    environment = {**os.environ, "MODEL_ID": str(DEMO_MODEL), "MODEL_SOURCE": "local",
                   "MODELS_DIR": str(tmp_path / "models"), "RUN_DIR": str(tmp_path / "run"), "VRAM_PROFILE": "cpu",
                   "VLLM_CPU_OMP_THREADS_BIND": "0|1", "HF_HUB_OFFLINE": "1"}
    converted = subprocess.run([sys.executable, "-m", programs.CLI, "convert"], env=environment, check=True,
                               capture_output=True, text=True).stdout.splitlines()[-1]
    script = tmp_path / "ask.py"
    script.write_text(textwrap.dedent(f"""
        from vllm import LLM, SamplingParams

        if __name__ == "__main__":
            engine = LLM(model={converted!r}, tensor_parallel_size=2, enforce_eager=True, max_model_len=256,
                         max_num_seqs=1, kv_cache_memory_bytes=1 << 27)
            done = engine.generate("<|user|>Who are you?<|assistant|>", SamplingParams(temperature=0, max_tokens=24))
            print("ANSWER", done[0].outputs[0].text)
        """))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=200,
                          check=False)
    assert "ANSWER My name is Shoehorn." in done.stdout, done.stdout + done.stderr
