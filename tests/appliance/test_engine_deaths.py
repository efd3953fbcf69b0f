"""Deaths of the engine's parts, of its program and of everything at once. The stand-in takes the place of vLLM.

It has vLLM's processes: an API server with the appliance's middleware, an engine core and a worker.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from shoehorn.gateway.keys.api_key import Key
from shoehorn.gateway.keys.store import KeyStore
from shoehorn.runtime import programs
from shoehorn.runtime.state import Phase
from shoehorn_vllm.protocol import KeyLimits
from support.clients import BackgroundRequest, chat
from support.running import Appliance, DiskFiller, standin
from support.waiting import wait_until

pytestmark = pytest.mark.process

Start = Callable[..., Appliance]
FORK_SERVER = "shoehorn: fork server"
PARTS = ("VLLM::APIServer", "VLLM::EngineCor", "VLLM::Worker")


@pytest.fixture
def hold(tmp_path: Path) -> Path:
    """Return a file that keeps the engine loading as long as it exists."""
    path = tmp_path / "hold"
    path.touch()
    return path


@pytest.fixture
def small_run_dir(tmp_path: Path) -> Iterator[Path]:
    """Mount a small disk as the run directory."""
    path = tmp_path / "run"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", path], check=True)
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


@pytest.mark.fault("`kill -9` of the API server, the engine core or a worker while the engine loads",
                   "Restarted with growing pauses; nothing of the dead engine remains.")
def test_engine_restarts_after_a_part_dies_while_it_loads(start: Start, hold: Path) -> None:
    appliance = start(**standin(hold))
    for number, part in enumerate(PARTS, start=1):
        wait_until(lambda: appliance.phase is Phase.LOADING and all(map(appliance.runs, PARTS)), 60, "a loading engine")
        parts = [appliance.find(each) for each in PARTS]
        appliance.find(part).kill()
        wait_until(lambda number=number: appliance.state.restarts == number, 60, "a counted restart")
        assert psutil.wait_procs(parts, timeout=30)[1] == []
    hold.unlink()
    appliance.wait_for(Phase.READY)
    assert chat(appliance).status_code == 200


@pytest.mark.fault("`kill -9` of the API server, the engine core, a worker or the engine program while the model is "
                   "served", "503 meanwhile, ready again, no orphan.")
def test_engine_restarts_after_a_part_dies_while_it_serves(start: Start) -> None:
    appliance = start(**standin())
    template = Key("limited", b"", b"", 0.0, limits=KeyLimits(requests_per_minute=1))
    limited = KeyStore(appliance.models_dir).add(template).token
    appliance.wait_for(Phase.READY)
    assert chat(appliance, key=limited).status_code == 200
    for number, part in enumerate((*PARTS, programs.ENGINE), start=1):
        appliance.wait_for(Phase.READY)
        if number == 2:
            assert chat(appliance, key=limited).status_code == 429, "the limit survives a restart of the engine"
        parts = [appliance.find(each) for each in PARTS]
        stream = BackgroundRequest(appliance)
        wait_until(lambda stream=stream: stream.text, 30, "a stream")
        appliance.find(part).kill()
        wait_until(lambda number=number: appliance.state.restarts == number, 30, "a counted restart")
        assert psutil.wait_procs(parts, timeout=30)[1] == []
        if part in PARTS[1:]:  # without the API server no event can be sent
            stream.assert_ended_with_error()
    appliance.wait_for(Phase.READY)
    assert chat(appliance).status_code == 200


@pytest.mark.fault("`kill -9` of the fork server while the engine loads or the model is served",
                   "The engine continues; after its death the next one is ready.")
def test_engine_outlives_its_fork_server(start: Start, hold: Path) -> None:
    appliance = start(**standin(hold))
    wait_until(lambda: all(map(appliance.runs, PARTS)), 60, "a loading engine")
    parts = [appliance.find(each) for each in PARTS]
    appliance.find(FORK_SERVER).kill()
    hold.unlink()
    appliance.wait_for(Phase.READY)
    wait_until(lambda: appliance.runs(FORK_SERVER), 30, "a spare")
    appliance.find(FORK_SERVER).kill()
    assert chat(appliance).status_code == 200
    assert appliance.state.restarts == 0
    parts[0].kill()
    wait_until(lambda: appliance.state.restarts == 1, 30, "a counted restart")
    assert psutil.wait_procs(parts, timeout=30)[1] == []
    appliance.wait_for(Phase.READY)
    assert chat(appliance).status_code == 200
    assert appliance.stop() == 0


@pytest.mark.fault("The disk under RUN_DIR fills while the model is served (ENGINE_LOG=file writes there)",
                   "Requests are served; the engine's lines go to the log instead, which is reported once.")
@pytest.mark.fault("A worker of the engine dies while the disk under RUN_DIR is full",
                   "Streams end with an error event, 503 meanwhile; it reports the full disk, waits, and loads again "
                   "once there is free space.")
def test_engine_waits_for_space_on_a_full_disk(start: Start, small_run_dir: Path) -> None:
    appliance = start(ENGINE_LOG="file", **standin())
    appliance.wait_for(Phase.READY)
    filler = DiskFiller(small_run_dir / "filling")
    wait_until(filler.full.is_set, 10, "a full disk")
    log = str(small_run_dir / "engine.log")
    wait_until(lambda: chat(appliance).status_code == 200 and log in appliance.output, 20, "the report of the log")
    stream = BackgroundRequest(appliance)
    wait_until(lambda: stream.text, 30, "a stream")
    appliance.find("VLLM::Worker").kill()
    stream.assert_ended_with_error()
    wait_until(lambda: f"No space left on {small_run_dir}" in appliance.output, 60,
               lambda: f"the report\n{appliance.output[-3000:]}")
    refusal = chat(appliance)
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "model_not_ready")
    assert appliance.output.count(log) == 1
    assert appliance.output.count(f"No space left on {small_run_dir}") == 1
    assert not appliance.runs("VLLM::")
    filler.stop()
    appliance.wait_for(Phase.READY, 20)
    assert "Traceback" not in "\n".join(line for line in appliance.lines if " vllm INFO " not in line)


@pytest.mark.fault("`kill -9` of supervisord while the engine loads",
                   "All its programs exit: no orphan.")
def test_no_process_outlives_a_killed_supervisord(start: Start, hold: Path) -> None:
    appliance = start(**standin(hold))
    wait_until(lambda: appliance.runs("VLLM::Worker") and appliance.runs("nginx: master"), 60, "all processes")
    remaining = appliance.descendants()
    appliance.process.kill()
    assert psutil.wait_procs(remaining, timeout=90)[1] == []


@pytest.mark.fault("`docker kill`, or the power cut, while loading and while serving",
                   "Nothing that remains hinders the next start; key and state are intact.")
def test_next_start_serves_after_everything_was_killed(start: Start, hold: Path) -> None:
    loading = start(API_KEY="", **standin(hold))
    loading.wait_for(Phase.LOADING)
    key = loading.key
    loading.kill()
    hold.unlink()
    serving = start(API_KEY="", **standin())
    serving.key = key
    wait_until(lambda: "ready after" in serving.output, 60, "readiness")
    stream = BackgroundRequest(serving)
    wait_until(lambda: stream.text, 30, "a stream")
    serving.kill()
    last = start(API_KEY="", **standin())
    last.key = key
    wait_until(lambda: "ready after" in last.output, 60, "readiness, not by a mark of the killed one")
    last.wait_for(Phase.READY)
    assert chat(last).status_code == 200, "the key of the first start is still valid"
    assert last.stop() == 0
