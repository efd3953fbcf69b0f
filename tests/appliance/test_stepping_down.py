"""The engine program on a GPU with less memory than planned: it steps down, serves, and remembers.

The program is real; stand-ins take the place of NVML and vLLM, with the shapes of an 8B model.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from fakes import captured
from shoehorn.runtime import programs
from shoehorn.runtime.state import Phase, State, StateFile
from support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
MACHINE = ROOT / "tests" / "fakes" / "gpu_machine"
TIMING = {"tick": 0.1, "backoff": 0.05, "worker_grace": 1}
STANDIN_ENGINE = ROOT / "tests" / "fakes" / "standin_engine"

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an 8B model: its config and headers, with sparse files for weights."""
    directory = tmp_path_factory.mktemp("model") / "8b"
    directory.mkdir()
    files = captured.files("llama-3.1-8b-instruct")
    for name, size in files.names().items():
        with (directory / name).open("wb") as file:
            file.write(files.head(name))
            file.truncate(size)
    return directory


class Engine:
    """One start of the engine program."""

    def __init__(self, work: Path, run: str, model: Path, limits: Mapping[str, object], **settings: str) -> None:
        self.run_dir = work / run
        (self.run_dir / "nothing").mkdir(parents=True)
        self.states = StateFile(self.run_dir)
        self.log = work / f"{run}.log"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
        environment |= {"PYTHONPATH": f"{MACHINE}:{STANDIN_ENGINE}:{ROOT / 'src'}",
                        "STANDIN_ENGINE": json.dumps(limits), "SHOEHORN_TIMING": json.dumps(TIMING),
                        "MODEL_ID": str(model), "MODEL_SOURCE": "local", "RUN_DIR": str(self.run_dir),
                        "MODELS_DIR": str(work / "models"), "DRAIN_TIMEOUT": "0", "VRAM_LIMIT": "24GiB", **settings}
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-m", programs.ENGINE], env=environment, stdout=log,
                                            stderr=subprocess.STDOUT)

    def wait(self) -> State:
        """Wait until it is ready or has failed; return the state."""
        wait_until(lambda: self.states.read().phase in (Phase.READY, Phase.FAILED), 60, "ready or failed")
        return self.states.read()

    @property
    def options(self) -> Mapping[str, object]:
        """vLLM's options of the latest start."""
        return dict(yaml.safe_load((self.run_dir / "vllm.yaml").read_text()))

    def stop(self) -> int:
        """Stop it and return the exit code."""
        if self.states.read().phase is not Phase.FAILED and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture
def engines(tmp_path: Path, model: Path) -> Iterator[object]:
    (tmp_path / "models").mkdir()
    running: list[Engine] = []

    def start(run: str, limits: Mapping[str, object], **settings: str) -> Engine:
        running.append(Engine(tmp_path, run, model, limits, **settings))
        return running[-1]

    yield start
    for engine in running:
        engine.stop()


@pytest.mark.fault("Out of GPU memory at the start",
                   "A smaller plan, at most five times; the working one is remembered.")
def test_smaller_plan_is_found_and_used_at_once_by_the_next_start(engines, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    share = {"VLLM_EXTRA_ARGS": "--gpu-memory-utilization 0.17"}
    first = engines("first", {"load": 1024}, **share)
    state = first.wait()
    log = first.log.read_text()
    assert (state.phase, state.step_downs) == (Phase.READY, 1), log
    assert "step down 1 of 5 after no_kv_cache_memory: max-num-batched-tokens 2048 -> 1024" in log
    wait_until(lambda: first.states.read().memory, 30, "the measured memory")
    assert {(row["part"], row["measured_bytes"]) for row in first.states.read().memory} >= {("weights", 15 << 30)}
    assert first.stop() == 0
    [known_good] = (tmp_path / "models" / ".shoehorn" / "worked").glob("*.json")
    assert json.loads(known_good.read_text())["options"] == {
        "max-num-batched-tokens": 1024, "max-num-seqs": 64, "max-model-len": 16384, "enforce-eager": False}
    again = engines("again", {"load": 1024}, **share)
    assert (again.wait().step_downs, again.options["max-num-batched-tokens"]) == (0, 1024)
    again.stop()
    changed = engines("changed", {"load": 1 << 20}, MAX_NUM_SEQS="7", **share)
    assert changed.wait().phase is Phase.READY
    assert changed.options["max-num-batched-tokens"] == 2048, "a changed setting invalidates it"


@pytest.mark.fault("Out of GPU memory in the first full batch", "It was never ready; a smaller plan.")
def test_engine_that_dies_in_its_first_full_batch_was_never_ready(engines) -> None:  # type: ignore[no-untyped-def]
    engine = engines("batch", {"load": 1 << 20, "cache": 13 << 29})
    state = engine.wait()
    log = engine.log.read_text()
    assert state.phase is Phase.READY, log
    assert state.step_downs >= 1
    assert int(str(engine.options["kv-cache-memory-bytes"])) <= 13 << 29
    assert engine.options["max-num-batched-tokens"] == 2048, "a smaller KV cache was enough"
    assert state.failures == {"gpu_out_of_memory": state.step_downs}
    assert log.index("step down 1 of 5 after gpu_out_of_memory") < log.index("ready after")
    assert "ready after" not in log[:log.index("step down 1 of 5")]


@pytest.mark.fault("One of several workers runs out of memory at the start, and the others wait for it",
                   "The start is aborted; a smaller plan.")
def test_start_that_waits_for_a_failed_worker_is_aborted(engines) -> None:  # type: ignore[no-untyped-def]
    engine = engines("worker", {"load": 1 << 20, "worker": 8_200_000_000})
    state = engine.wait()
    log = engine.log.read_text()
    assert (state.phase, state.failures) == (Phase.READY, {"gpu_out_of_memory": 1}), log
    assert int(str(engine.options["kv-cache-memory-bytes"])) <= 8_200_000_000


@pytest.mark.fault("The engine refuses the start and names the value of an option with which it can start",
                   "It starts with that value; final, with the value in the remedy, if the user set the option.")
def test_value_that_the_engine_names_is_taken_at_the_first_try(engines) -> None:  # type: ignore[no-untyped-def]
    engine = engines("named", {"load": 1 << 20, "blocks": 21})
    state = engine.wait()
    assert (state.phase, state.step_downs, state.failures) == (Phase.READY, 1, {"sequences_exceed_kv_cache": 1})
    assert engine.options["max-num-seqs"] == 21
    engine.stop()
    fixed = engines("fixed", {"load": 1 << 20, "blocks": 21}, MAX_NUM_SEQS="22")
    state = fixed.wait()
    assert (state.phase, state.restarts) == (Phase.FAILED, 0)
    assert "MAX_NUM_SEQS to 21 or less" in state.remedy


def test_unsupported_bf16_becomes_float16(engines) -> None:  # type: ignore[no-untyped-def]
    engine = engines("format", {"load": 1 << 20, "no_bf16": True})
    assert engine.wait().phase is Phase.READY
    assert engine.options["dtype"] == "float16"


@pytest.mark.fault("The engine does not start with speculative decoding", "It starts without it, also next time.")
def test_speculative_decoding_is_disabled_if_the_engine_cannot_start_with_it(engines) -> None:  # type: ignore[no-untyped-def]
    small = {"VRAM_LIMIT": "5GiB", "QUANTIZATION": "bitsandbytes"}
    first = engines("speculative", {"load": 1 << 20, "speculative": True}, **small)
    assert first.wait().phase is Phase.READY
    assert "step down 1 of 5 after unknown" in first.log.read_text()
    assert "speculative-config" not in first.options
    assert first.stop() == 0
    again = engines("again", {"load": 1 << 20, "speculative": True}, **small)
    assert (again.wait().phase, again.states.read().step_downs) == (Phase.READY, 0)
    again.stop()
    fixed = engines("fixed", {"load": 1 << 20, "speculative": True}, SPECULATIVE="ngram", **small)
    assert fixed.process.wait(120) == 5, "a choice of the user is kept"


@pytest.mark.fault("A failure that persists with smaller plans", "Exit code 5 with cause and remedy.")
def test_persistent_failure_ends_with_cause_and_remedy(engines) -> None:  # type: ignore[no-untyped-def]
    engine = engines("hopeless", {"load": 0})
    state = engine.wait()
    assert (state.phase, engine.stop()) == (Phase.FAILED, 5)
    assert set(state.failures) == {"no_kv_cache_memory"}
    assert state.cause
    assert "VRAM_LIMIT" in state.remedy
    assert 1 <= engine.log.read_text().count("step down ") <= 5


@pytest.mark.fault("A model that always crashes, after it was ready",
                   "Five attempts with growing pauses, then exit code 5 and the engine's last lines.")
def test_repeated_crashes_end_with_exit_code_5(engines) -> None:  # type: ignore[no-untyped-def]
    engine = engines("storm", {"load": 1 << 20, "alive": 2.0})
    assert engine.process.wait(120) == 5
    log, state = engine.log.read_text(), engine.states.read()
    assert state.phase is Phase.FAILED
    assert log.count("ready after") == 5
    assert "illegal memory access" in log
    assert state.cause
    assert state.remedy


def test_unsupported_gpu_is_refused_before_anything_starts(tmp_path: Path, model: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{MACHINE}:{STANDIN_ENGINE}:{ROOT / 'src'}", "MODEL_ID": str(model),
                   "MODEL_SOURCE": "local", "RUN_DIR": str(tmp_path / "run"), "MODELS_DIR": str(tmp_path),
                   "STANDIN_GPU": json.dumps({"nvmlDeviceGetCudaComputeCapability": [7, 0]})}
    done = subprocess.run([sys.executable, "-m", programs.CLI, "serve"], env=environment, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    assert "compute capability 7.0" in done.stderr
    assert "Turing" in done.stderr
