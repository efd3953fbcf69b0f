"""Every part killed in every phase before a model is served, and all of them at once.

A phase is held where it is by stopping the process that does its work, so that each kill falls into it. The starts of a
test share a volume, as those of one container do.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from fakes.hub import Hub
from shoehorn.runtime.state import Phase, StateFile
from shoehorn.store import inventory
from support.running import DEMO_MODEL, TEST_KEY, Appliance, Filling, gone
from support.waiting import wait_until

pytestmark = pytest.mark.engine

Start = Callable[..., Appliance]
WORKERS = {Phase.PULLING: "shoehorn.cli pull", Phase.CONVERTING: "shoehorn.cli convert",
           Phase.LOADING: "api_server.entry"}
HELPERS = ("shoehorn.observability.exporter", "nginx: master", "nginx: worker", "shoehorn.runtime.event_listener",
           "shoehorn.gateway.keys.service")
HUB_TOKEN = "ms-canary-3f9c5b7de1a24680"  # made up


class Lives:
    """Starts on one volume, of a model that a hub has, to be converted and served; `more` are settings."""

    def __init__(self, home: Path) -> None:
        self.hub, self.started = Hub({"shoehorn/demo": DEMO_MODEL}, token=HUB_TOKEN), list[Appliance]()
        self.home = home

    def start(self, home: Path | None = None, **more: str) -> Appliance:
        """The next one."""
        self.started.append(Appliance(
            home or self.home, MODEL_ID="shoehorn/demo", MODEL_SOURCE="modelscope", MODELSCOPE_ENDPOINT=self.hub.url,
            MODELSCOPE_API_TOKEN=HUB_TOKEN, QUANTIZATION="int4", **more))
        return self.started[-1]

    @property
    def fetched(self) -> list[str]:
        """The ranges by which the weights were asked for; not their header, which planning reads."""
        return [span for span in self.hub.downloads("model.safetensors") if span != "bytes=0-131071"]


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[Lives]:
    made = Lives(tmp_path)
    with made.hub:
        yield made
        for appliance in made.started:
            appliance.discard()
    for appliance in made.started:
        assert TEST_KEY not in appliance.output
        assert HUB_TOKEN not in appliance.output
        assert "Traceback (most recent call last)" not in re.sub(r"(?m)^.* vllm INFO .*$", "", appliance.output)


def held(appliance: Appliance, phase: Phase) -> psutil.Process:
    """The process that does the work of a phase, stopped in it."""
    def there() -> bool:
        return appliance.phase is phase and appliance.runs(WORKERS[phase])

    wait_until(there, 60, lambda: f"{phase}, is {appliance.phase}\n{appliance.output[-3000:]}")
    worker = appliance.find(WORKERS[phase])
    worker.suspend()
    assert appliance.phase is phase
    return worker


def answers_in(appliance: Appliance, phase: Phase) -> bool:
    """Whether the gateway and the exporter answer, each in its form, and nobody without a key gets in."""
    url = f"{appliance.url}/v1/models"
    try:
        told, refused = httpx.get(url, headers=appliance.headers(), timeout=30), httpx.get(url, timeout=30)
        metrics = httpx.get(f"http://127.0.0.1:{appliance.metrics_port}/metrics", timeout=30)
    except httpx.TransportError:
        return False
    if (told.status_code, refused.status_code, metrics.status_code) != (503, 401, 200):
        return False
    error = told.json()["error"]
    return bool(error["code"] == "model_not_ready" and phase in error["message"]
                and f'phase="{phase}"}} 1' in metrics.text)


def killed(appliance: Appliance, victim: str) -> None:
    """`kill -9`, and a successor."""
    old = appliance.find(victim)
    old.kill()
    wait_until(lambda: gone(old), 10, f"{victim} is gone")
    wait_until(lambda: appliance.runs(victim), 20, f"a new {victim}")


@pytest.mark.fault("`kill -9` of exporter, nginx (master or worker), watcher or key service, and then of the engine "
                   "program, while pulling, converting and loading",
                   "Each comes back; meanwhile requests are told the phase; the work goes on.")
def test_any_part_may_die_while_nothing_is_served_yet(lives: Lives) -> None:
    appliance = lives.start()
    for phase in WORKERS:
        worker = held(appliance, phase)
        for victim in HELPERS:
            killed(appliance, victim)
            wait_until(lambda phase=phase: answers_in(appliance, phase), 20, f"503 and metrics in {phase}")
        assert worker.is_running(), "it is none of the helpers' business"
        before = StateFile(appliance.run_dir).read().restarts
        killed(appliance, "shoehorn.engine.main")
        wait_until(lambda worker=worker: gone(worker), 20, f"what the dead one left in {phase} is ended")
        wait_until(lambda before=before: StateFile(appliance.run_dir).read().restarts > before, 20, "counted")
    assert {span[:6] for span in lives.fetched[1:]} <= {"bytes="}, "nothing is fetched anew for a helper's sake"
    appliance.wait_for(Phase.LOADING)
    assert appliance.end() == 0


@pytest.mark.fault("`docker kill` while pulling, converting and loading", "The next start goes on where it was.")
@pytest.mark.fault("`kill -9` of the pull or the converter under the running appliance",
                   "Exit code 4 in words; the next start goes on where it was.")
def test_each_phase_is_killed_and_gone_on_with(lives: Lives) -> None:
    lives.hub.hold_at_bytes = 4 << 20
    for phase in (Phase.PULLING, Phase.CONVERTING):
        appliance = lives.start()
        if phase is Phase.PULLING:
            wait_until(lambda at=appliance: StateFile(at.run_dir).read().bytes_done >= 3 << 20, 30, "bytes arrive")
        held(appliance, phase)
        appliance.kill()
        appliance = lives.start()
        held(appliance, phase).kill()
        assert appliance.wait(20) == 4
        assert f"`shoehorn {WORKERS[phase].split()[-1]}` was ended by signal 9" in appliance.output
        assert "Start again" in StateFile(appliance.run_dir).read().remedy
        lives.hub.hold_at_bytes = 0
    loading = lives.start()
    held(loading, Phase.LOADING)
    loading.kill()
    last = lives.start()
    held(last, Phase.LOADING)  # and not what the dead one published
    assert last.end() == 0
    assert "converting" not in last.output
    assert lives.fetched[0] == ""
    assert all(int(span.removeprefix("bytes=").split("-")[0]) >= 3 << 20 for span in lives.fetched[1:]), lives.fetched
    assert {model.model: model.complete for model in inventory.models(lives.home / "models")} == {
        "shoehorn/demo": True, "shoehorn/demo.int4": True}


@pytest.mark.fault("Two appliances on one volume, and the one that pulls is killed",
                   "The other waits with a message, and goes on where the first one was.")
def test_whoever_waits_for_a_pull_goes_on_with_it(lives: Lives, tmp_path: Path) -> None:
    lives.hub.hold_at_bytes = 4 << 20
    first = lives.start()
    wait_until(lambda: StateFile(first.run_dir).read().bytes_done >= 3 << 20, 30, "bytes arrive")
    second = lives.start(tmp_path / "second", MODELS_DIR=str(first.models_dir))
    wait_until(lambda: "another process pulls shoehorn/demo; waiting for it" in second.output, 30, "it waits")
    lives.hub.hold_at_bytes = 0
    first.kill()
    second.wait_for(Phase.LOADING)
    assert [span[:6] for span in lives.fetched] == ["", "bytes="]
    assert second.end() == 0


@pytest.mark.fault("The disk under RUN_DIR fills while a model is pulled, and the pull is killed",
                   "It says so and waits; once there is room it goes on by itself.")
def test_a_full_run_directory_is_waited_for(lives: Lives) -> None:
    run_dir = lives.home / "run"
    said = f"No space left on {run_dir}"
    run_dir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", run_dir], check=True)
    try:
        lives.hub.hold_at_bytes = 4 << 20
        for _ in range(5):
            (run_dir / "state.json").unlink(missing_ok=True)  # of the life before
            appliance = lives.start()
            wait_until(lambda: StateFile(run_dir).read().bytes_done >= 3 << 20, 30, "bytes arrive")
            filling = Filling(run_dir / "filling")
            wait_until(filling.full.is_set, 10, "the disk is full")
            appliance.find(WORKERS[Phase.PULLING]).kill()
            wait_until(lambda own=appliance: said in own.output or own.process.poll() is not None, 30,
                       lambda own=appliance: f"it says so\n{own.output[-3000:]}")
            if said in appliance.output:
                break
            assert appliance.wait(20) == 4, "a page that became free in time was enough to end in words"
            filling.end()
        assert httpx.get(f"{appliance.url}/v1/models", headers=appliance.headers(), timeout=30).status_code == 503
        lives.hub.hold_at_bytes = 0
        filling.end()
        wait_until(lambda: appliance.phase is Phase.CONVERTING, 30, lambda: f"it goes on\n{appliance.output[-3000:]}")
        assert appliance.output.count("No space left on") == 1
        assert {span[:6] for span in lives.fetched[1:]} == {"bytes="}, "what had arrived is not fetched again"
        assert appliance.end() == 0
    finally:
        subprocess.run(["umount", "--lazy", run_dir], check=True)


@pytest.mark.fault("`kill -9` of supervisord while pulling", "All its programs end by themselves: no orphan.")
def test_without_supervisord_nothing_is_left(lives: Lives) -> None:
    lives.hub.hold_at_bytes = 4 << 20
    appliance = lives.start()
    wait_until(lambda: StateFile(appliance.run_dir).read().bytes_done > 0, 30, "bytes arrive")
    wait_until(lambda: len(appliance.descendants()) >= 7, 20, "five programs, a worker of nginx, the pull")
    left = appliance.descendants()
    appliance.process.kill()
    assert psutil.wait_procs(left, timeout=60)[1] == []
