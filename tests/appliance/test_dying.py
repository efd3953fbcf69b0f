"""Parts of the engine killed while it loads and serves, a disk that fills under it all, and supervisord itself killed.

One appliance lives through all of it, in this order. Its engine has a worker process of its own, as with several GPUs,
and its run directory is a small disk.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import httpx
import psutil
import pytest

from shoehorn.runtime.state import Phase, StateFile
from support.clients import ERROR_ENDS, HELLO, Asking
from support.running import TEST_KEY, Appliance, Filling
from support.waiting import wait_until

pytestmark = pytest.mark.engine

PARTS = ("api_server.entry", "VLLM::EngineCor", "VLLM::Worker")


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    home = tmp_path_factory.mktemp("dying")
    (home / "run").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", home / "run"], check=True)
    running = Appliance(home, ENGINE_LOG="file", VLLM_EXTRA_ARGS="--distributed-executor-backend mp")
    try:
        yield running
        assert TEST_KEY not in running.output
    finally:
        running.discard()
        subprocess.run(["umount", home / "run"], check=True)


def chat(appliance: Appliance) -> httpx.Response:
    """One short request."""
    return httpx.post(f"{appliance.url}/v1/chat/completions", headers=appliance.headers(), timeout=60,
                      json={"model": "shoehorn-demo", "messages": HELLO})


@pytest.mark.fault("`kill -9` of the API server, the engine core or a worker while the engine loads",
                   "Started again by itself with growing pauses; nothing of the dead one is left.")
def test_parts_of_the_engine_die_while_it_loads(appliance: Appliance) -> None:
    for number, part in enumerate(PARTS, start=1):
        wait_until(lambda part=part: appliance.phase is Phase.LOADING and appliance.runs(part), 60, part)
        parts = [appliance.find(each) for each in PARTS if appliance.runs(each)]
        appliance.find(part).kill()
        wait_until(lambda number=number: StateFile(appliance.run_dir).read().restarts == number, 60, "it is noticed")
        assert psutil.wait_procs(parts, timeout=30)[1] == []
    appliance.wait_for(Phase.READY)
    assert chat(appliance).status_code == 200


@pytest.mark.fault("The disk under RUN_DIR fills while the model is served (ENGINE_LOG=file writes there)",
                   "Requests are served on; the engine's lines go on in the log; said once.")
@pytest.mark.fault("A worker of the engine dies while the disk under RUN_DIR is full",
                   "Streams end with an error event, 503 meanwhile; it says so, waits, and loads again by itself once "
                   "there is room.")
def test_a_full_disk_is_waited_for(appliance: Appliance) -> None:
    filling = Filling(appliance.run_dir / "filling")
    wait_until(filling.full.is_set, 10, "the disk is full")
    assert chat(appliance).status_code == 200
    stream = Asking(appliance, n=64)
    wait_until(lambda: stream.text, 30, "a stream has begun")
    appliance.find("VLLM::Worker").kill()
    stream.finish()
    assert stream.last.startswith(ERROR_ENDS[stream.path]), stream.text[-500:]
    wait_until(lambda: f"No space left on {appliance.run_dir}" in appliance.output, 60,
               lambda: f"it says so\n{appliance.output[-3000:]}")
    answer = chat(appliance)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_not_ready")
    assert appliance.output.count("the engine's lines come here instead") == 1
    assert appliance.output.count("No space left on") == 1
    assert not appliance.runs("VLLM::")
    filling.end()
    appliance.wait_for(Phase.LOADING, 20)
    assert "Traceback" not in "\n".join(line for line in appliance.lines if " vllm INFO " not in line)


@pytest.mark.fault("`kill -9` of supervisord while the engine loads",
                   "All its programs end by themselves: no orphan.")
def test_without_supervisord_nothing_is_left(appliance: Appliance) -> None:
    wait_until(lambda: appliance.runs("VLLM::EngineCor"), 60, "the engine loads")
    left = appliance.descendants()
    assert appliance.runs("nginx: master")
    appliance.process.kill()
    assert psutil.wait_procs(left, timeout=90)[1] == []
