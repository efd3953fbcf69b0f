"""Kills of every part in every phase before the model is served. The stand-in takes the place of vLLM.

A phase is held by stopping the process that does its work, so that each kill falls into it. The starts of a test share
a volume, as those of one container do.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from fakes.hub import Hub
from shoehorn.runtime import programs
from shoehorn.runtime.state import Phase
from shoehorn.store import inventory
from support.running import DEMO_MODEL, TEST_KEY, Appliance, DiskFiller, is_gone, standin
from support.waiting import wait_until

pytestmark = pytest.mark.process

WORKERS = {Phase.PULLING: "shoehorn.cli pull", Phase.CONVERTING: "shoehorn.cli convert",
           Phase.LOADING: "VLLM::APIServer"}
HELPERS = (programs.EXPORTER, "nginx: master", "nginx: worker", programs.EVENT_LISTENER,
           programs.KEYS)
HUB_TOKEN = "ms-canary-3f9c5b7de1a24680"  # made up
MOST_BYTES = 3 << 20
"""Bytes of the model that have arrived when the hub holds the pull at 4 MiB."""


class Volume:
    """Starts on one volume, of a model that a hub has, to be converted and served."""

    def __init__(self, home: Path) -> None:
        self.hub, self.started = Hub({"shoehorn/demo": DEMO_MODEL}, token=HUB_TOKEN), list[Appliance]()
        self.home, self.hold = home, home / "hold"
        self.hold.touch()  # so that the engine loads until the test ends

    def start(self, home: Path | None = None, **settings: str) -> Appliance:
        """Start the next appliance."""
        self.started.append(Appliance(
            home or self.home, MODEL_ID="shoehorn/demo", MODEL_SOURCE="modelscope", MODELSCOPE_ENDPOINT=self.hub.url,
            MODELSCOPE_API_TOKEN=HUB_TOKEN, QUANTIZATION="int4", CALIBRATION="off", **standin(self.hold), **settings))
        return self.started[-1]

    @property
    def requested_ranges(self) -> list[str]:
        """Ranges of the weights that were requested, without the header that planning reads."""
        return [span for span in self.hub.downloads("model.safetensors") if span != "bytes=0-131071"]


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    volume = Volume(tmp_path)
    with volume.hub:
        yield volume
        for appliance in volume.started:
            appliance.discard()
    for appliance in volume.started:
        assert TEST_KEY not in appliance.output
        assert HUB_TOKEN not in appliance.output
        assert "Traceback (most recent call last)" not in re.sub(r"(?m)^.* vllm INFO .*$", "", appliance.output)


def wait_for_bytes(appliance: Appliance) -> None:
    """Wait until most of the model has arrived."""
    wait_until(lambda: appliance.state.bytes_done >= MOST_BYTES, 30, "bytes of the model")


def suspend_worker(appliance: Appliance, phase: Phase) -> psutil.Process:
    """Stop the process that does the work of a phase, and return it."""
    wait_until(lambda: appliance.phase is phase and appliance.runs(WORKERS[phase]), 60,
               lambda: f"{phase}, is {appliance.phase}\n{appliance.output[-3000:]}")
    worker = appliance.find(WORKERS[phase])
    worker.suspend()
    assert appliance.phase is phase
    return worker


def answers_in(appliance: Appliance, phase: Phase) -> bool:
    """Return True if gateway and exporter report the phase in their forms, and a key is required."""
    url = f"{appliance.url}/v1/models"
    try:
        with_key, without_key = httpx.get(url, headers=appliance.headers(), timeout=30), httpx.get(url, timeout=30)
        metrics = httpx.get(f"http://127.0.0.1:{appliance.metrics_port}/metrics", timeout=30)
    except httpx.TransportError:
        return False
    if (with_key.status_code, without_key.status_code, metrics.status_code) != (503, 401, 200):
        return False
    error = with_key.json()["error"]
    return bool(error["code"] == "model_not_ready" and phase in error["message"]
                and f'phase="{phase}"}} 1' in metrics.text)


def kill_and_wait_for_successor(appliance: Appliance, victim: str) -> None:
    """Send SIGKILL, and wait until the part runs again."""
    old = appliance.find(victim)
    old.kill()
    wait_until(lambda: is_gone(old), 10, f"the exit of {victim}")
    wait_until(lambda: appliance.runs(victim), 20, f"a new {victim}")


@pytest.mark.fault("`kill -9` of exporter, nginx (master or worker), watcher or key service, and then of the engine "
                   "program, while pulling, converting and loading",
                   "Each comes back; meanwhile requests get the phase; the work is resumed.")
def test_any_part_may_be_killed_before_the_model_is_served(volume: Volume) -> None:
    appliance = volume.start()
    for phase in WORKERS:
        worker = suspend_worker(appliance, phase)
        for victim in HELPERS:
            kill_and_wait_for_successor(appliance, victim)
            wait_until(lambda phase=phase: answers_in(appliance, phase), 20, f"503 and metrics in {phase}")
        assert worker.is_running(), "the death of a helper does not concern it"
        before = appliance.state.restarts
        kill_and_wait_for_successor(appliance, programs.ENGINE)
        wait_until(lambda worker=worker: is_gone(worker), 20, f"the exit of the worker of {phase}")
        wait_until(lambda before=before: appliance.state.restarts > before, 20, "a counted restart")
    assert {span[:6] for span in volume.requested_ranges[1:]} <= {"bytes="}, "nothing is downloaded again"
    appliance.wait_for(Phase.LOADING)
    assert appliance.stop() == 0


@pytest.mark.fault("`docker kill` while pulling, converting and loading", "The next start resumes the work.")
@pytest.mark.fault("`kill -9` of the pull or the converter under the running appliance",
                   "Exit code 4 with the cause; the next start resumes the work.")
def test_each_phase_is_resumed_after_a_kill(volume: Volume) -> None:
    volume.hub.hold_at_bytes = 4 << 20
    for phase in (Phase.PULLING, Phase.CONVERTING):
        appliance = volume.start()
        if phase is Phase.PULLING:
            wait_for_bytes(appliance)
        suspend_worker(appliance, phase)
        appliance.kill()
        appliance = volume.start()
        suspend_worker(appliance, phase).kill()
        assert appliance.wait(20) == 4
        assert f"shoehorn {WORKERS[phase].split()[-1]}" in appliance.state.cause
        assert "signal 9" in appliance.state.cause
        assert appliance.state.remedy
        volume.hub.hold_at_bytes = 0
    loading = volume.start()
    suspend_worker(loading, Phase.LOADING)
    loading.kill()
    last = volume.start()
    suspend_worker(last, Phase.LOADING)  # not what the killed one published
    assert last.stop() == 0
    assert "converting" not in last.output
    first, *resumed = volume.requested_ranges
    assert first == ""
    assert all(int(span.removeprefix("bytes=").split("-")[0]) >= MOST_BYTES for span in resumed), resumed
    assert {model.model: model.complete for model in inventory.models(volume.home / "models")} == {
        "shoehorn/demo": True, "shoehorn/demo.int4": True}


@pytest.mark.fault("Two appliances on one volume, and the one that pulls is killed",
                   "The other waits with a message, and resumes where the first one was.")
def test_waiting_appliance_resumes_the_pull_of_a_killed_one(volume: Volume, tmp_path: Path) -> None:
    volume.hub.hold_at_bytes = 4 << 20
    first = volume.start()
    wait_for_bytes(first)
    second = volume.start(tmp_path / "second", MODELS_DIR=str(first.models_dir))
    waiting = "Waiting for another pull model=shoehorn/demo"
    wait_until(lambda: waiting in second.output, 30, "the message of the waiting one")
    volume.hub.hold_at_bytes = 0
    first.kill()
    second.wait_for(Phase.LOADING)
    assert [span[:6] for span in volume.requested_ranges] == ["", "bytes="]
    assert second.stop() == 0


@pytest.mark.fault("The disk under RUN_DIR fills while a model is pulled, and the pull is killed",
                   "It reports this and waits; it resumes once there is free space.")
def test_pull_resumes_after_a_full_run_directory(volume: Volume) -> None:
    run_dir = volume.home / "run"
    message = f"No space left on {run_dir}"
    run_dir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", run_dir], check=True)
    try:
        volume.hub.hold_at_bytes = 4 << 20
        for _ in range(5):
            (run_dir / "state.json").unlink(missing_ok=True)  # of the start before
            appliance = volume.start()
            wait_for_bytes(appliance)
            filler = DiskFiller(run_dir / "filling")
            wait_until(filler.full.is_set, 10, "a full disk")
            appliance.find(WORKERS[Phase.PULLING]).kill()
            wait_until(lambda own=appliance: message in own.output or own.process.poll() is not None, 30,
                       lambda own=appliance: f"the report\n{own.output[-3000:]}")
            if message in appliance.output:
                break
            assert appliance.wait(20) == 4, "a page that became free in time was enough for an orderly exit"
            filler.stop()
        assert httpx.get(f"{appliance.url}/v1/models", headers=appliance.headers(), timeout=30).status_code == 503
        volume.hub.hold_at_bytes = 0
        filler.stop()
        wait_until(lambda: appliance.phase is Phase.CONVERTING, 30,
                   lambda: f"the resumption\n{appliance.output[-3000:]}")
        assert appliance.output.count(message) == 1
        assert {span[:6] for span in volume.requested_ranges[1:]} == {"bytes="}, "nothing is downloaded again"
        assert appliance.stop() == 0
    finally:
        subprocess.run(["umount", "--lazy", run_dir], check=True)


@pytest.mark.fault("`kill -9` of supervisord while pulling", "All its programs exit: no orphan.")
def test_no_process_outlives_a_killed_supervisord(volume: Volume) -> None:
    volume.hub.hold_at_bytes = 4 << 20
    appliance = volume.start()
    wait_until(lambda: appliance.state.bytes_done > 0, 30, "bytes of the model")
    wait_until(lambda: len(appliance.descendants()) >= 7, 20, "five programs, a worker of nginx, the pull")
    remaining = appliance.descendants()
    appliance.process.kill()
    assert psutil.wait_procs(remaining, timeout=60)[1] == []
