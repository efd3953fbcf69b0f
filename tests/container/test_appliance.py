"""The appliance that `docker compose up` starts. The tests share it; the last ones stop it."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable

import httpx
import pytest

from shoehorn.runtime import programs
from support.tracked import INTERRUPTED, Container, docker
from support.waiting import wait_until

pytestmark = pytest.mark.container

PARTS = ("tini", programs.SUPERVISORD, programs.EVENT_LISTENER, programs.ENGINE, programs.EXPORTER, programs.KEYS,
         "nginx: master", "nginx: worker", "shoehorn: fork server", "VLLM::APIServer", "VLLM::EngineCore")

_QUESTION = [{"role": "user", "content": "What is your name?"}]


@pytest.fixture(scope="module")
def key(appliance: Container, composed: Callable[..., str]) -> str:
    """Return the generated key from the log of the first start."""
    match = re.search(r"sk-[\w-]{43}", appliance.logs)
    assert match
    return match[0]


def _chat(appliance: Container, key: str, **more: object) -> httpx.Response:
    return httpx.post(f"{appliance.url(6333)}/v1/chat/completions", timeout=60,
                      headers={"Authorization": f"Bearer {key}"},
                      json={"model": "shoehorn-demo", "messages": _QUESTION, "max_tokens": 40, **more})


def _kills(appliance: Container) -> float:
    """Return how often the engine failed because one of its processes was killed."""
    text = httpx.get(f"{appliance.url(6334)}/metrics", timeout=60).text
    match = re.search(r'^shoehorn_engine_failures_total\{[^}]*"killed"[^}]*\} (\S+)$', text, re.MULTILINE)
    return float(match[1]) if match else 0.0


def test_completion_needs_the_key(appliance: Container, key: str) -> None:
    answer = _chat(appliance, key)
    assert answer.status_code == 200
    assert "Shoehorn" in answer.json()["choices"][0]["message"]["content"]
    assert _chat(appliance, "wrong-key").status_code == 401


def test_one_scrape_has_metrics_of_appliance_and_engine(appliance: Container) -> None:
    text = httpx.get(f"{appliance.url(6334)}/metrics", timeout=60).text
    assert re.search(r"^shoehorn_", text, re.MULTILINE)
    assert re.search(r"^vllm:", text, re.MULTILINE)


def test_docker_reports_it_healthy(appliance: Container) -> None:
    wait_until(lambda: appliance.inspect()["State"]["Health"]["Status"] == "healthy", 40, "healthy")


def test_every_part_runs_and_none_as_root(appliance: Container) -> None:
    processes = appliance.processes()
    assert {uid for _, uid, _ in processes} == {10001}
    lines = [arguments for *_, arguments in processes]
    assert [part for part in PARTS if not any(part in line for line in lines)] == []


def test_only_gateway_and_exporter_listen_beyond_loopback(appliance: Container) -> None:
    table = appliance.execute("sh", "-c", "cat /proc/net/tcp /proc/net/tcp6")
    listening = re.findall(r"^ *[0-9]+: ([0-9A-F]+):([0-9A-F]{4}) [0-9A-F:]+ 0A ", table, re.MULTILINE)
    assert len(listening) > 2  # the parts of the engine communicate over loopback
    loopback = re.compile("(0{16}0000FFFF0000)?[0-9A-F]{6}7F|0{24}01000000")
    assert {int(port, 16) for address, port in listening if not loopback.fullmatch(address)} == {6333, 6334}


@pytest.mark.fault("`docker pause` and `docker unpause` while serving",
                   "It continues to serve, with the same processes.")
def test_appliance_serves_after_a_pause(appliance: Container, key: str) -> None:
    def parts() -> set[int]:  # without the processes of a health check
        return {pid for pid, _, arguments in appliance.processes() if any(part in arguments for part in PARTS)}

    before = parts()
    docker("pause", appliance.id)
    time.sleep(5)
    docker("unpause", appliance.id)
    assert _chat(appliance, key).status_code == 200
    assert httpx.get(f"{appliance.url(6334)}/metrics", timeout=60).status_code == 200
    assert parts() == before


def test_key_is_printed_once_and_stored_only_as_a_hash(appliance: Container, key: str) -> None:
    assert len(key) >= 20
    assert appliance.logs.count(key) == 2  # when it was generated, and in the welcome text
    assert key not in json.dumps(appliance.inspect())
    assert key not in "\n".join(arguments for *_, arguments in appliance.processes())
    assert key not in appliance.execute("sh", "-c", "cat /proc/[0-9]*/environ")
    for place in (f"{appliance.url(6333)}/status", f"{appliance.url(6333)}/", f"{appliance.url(6334)}/metrics"):
        assert key not in httpx.get(place, timeout=60).text
    assert appliance.execute("stat", "-c", "%a %u", "/models/.shoehorn/keys.json").split() == ["600", "10001"]


def test_processes_have_no_privilege_and_can_write_only_where_needed(appliance: Container) -> None:
    status = dict(re.findall(r"^(\w+):\s+(\S+)", appliance.execute("cat", "/proc/1/status"), re.MULTILINE))
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    places = "/ /opt/shoehorn /opt/venv /etc /var/lib /home /usr"
    script = f'for d in {places}; do touch "$d/probe" 2>/dev/null && echo "$d"; done; true'
    assert appliance.execute("sh", "-c", script) == ""
    assert status["Seccomp"] == "2"
    statuses = appliance.execute("sh", "-c", "cat /proc/[0-9]*/status /proc/[0-9]*/limits 2>/dev/null; true")
    assert set(re.findall(r"^(?:CapEff|CapPrm|CapBnd|CapInh|CapAmb):\s+(\S+)", statuses, re.MULTILINE)) == {"0" * 16}
    assert set(re.findall(r"^NoNewPrivs:\s+(\S+)", statuses, re.MULTILINE)) == {"1"}
    assert set(re.findall(r"^Max core file size\s+(\S+)\s+(\S+)", statuses, re.MULTILINE)) == {("1", "1")}
    host = appliance.inspect()["HostConfig"]
    assert host["ReadonlyRootfs"] is True
    assert (host["CapDrop"], host["CapAdd"], host["Privileged"]) == (["ALL"], None, False)
    assert set(host["Tmpfs"]) == {"/tmp", "/run/shoehorn", "/home/shoehorn"}
    mounts = appliance.execute("cat", "/proc/mounts")
    assert re.findall(r"^\S+ (/tmp|/run/shoehorn|/home/shoehorn) tmpfs (?!\S*nosuid,nodev)", mounts, re.MULTILINE) == []


@pytest.mark.fault("`kill -9` of the engine core, in the container", "Ready again in the same container.")
def test_engine_restarts_in_the_same_container_after_a_kill(appliance: Container, key: str) -> None:
    appliance.announce("engine WARNING", *INTERRUPTED)
    appliance.execute("sh", "-c", "kill -9 $(grep -l VLLM::EngineCor /proc/[0-9]*/comm | cut -d/ -f3)")
    begin = time.monotonic()
    wait_until(lambda: appliance.phase() != "ready", 20, "the next start")
    assert _chat(appliance, key).status_code == 503
    appliance.wait_for("ready", 150)
    print(f"ready again after {time.monotonic() - begin:.1f} s")
    assert _chat(appliance, key).status_code == 200
    assert appliance.inspect()["RestartCount"] == 0


@pytest.mark.fault("The container runs out of memory, and the kernel kills its engine",
                   "Reported with the cause; restarted in the same container, and ready once there is memory.")
def test_engine_restarts_after_an_out_of_memory_kill(appliance: Container, key: str) -> None:
    appliance.announce("engine WARNING", r"ERROR .* \[(?:multiproc_executor|core)\.py:\d+\]", *INTERRUPTED)
    before = _kills(appliance)
    used = int(appliance.execute("sh", "-c", "cd /sys/fs/cgroup && cat memory.current 2>/dev/null || "
                                 "cat memory/memory.usage_in_bytes"))  # control groups of version 2, or 1
    limit = str(used + (100 << 20))  # runc accepts none below the used memory
    docker("update", f"--memory={limit}", f"--memory-swap={limit}", appliance.id)
    try:
        appliance.execute("python", "-c", "block = b'x' * (1 << 30)", accept=(0, 1, 137))
        wait_until(lambda: appliance.phase() != "ready", 60, "the kill by the kernel")
    finally:
        docker("update", "--memory=16g", "--memory-swap=16g", appliance.id)
    appliance.wait_for("ready", 150)
    assert _kills(appliance) > before, appliance.logs[-9000:]
    assert _chat(appliance, key).status_code == 200
    assert appliance.inspect()["RestartCount"] == 0


@pytest.mark.fault("`docker stop` while a stream runs",
                   "It ends completely or with an error event, within the grace period.")
def test_stop_ends_a_stream_within_the_grace_period(appliance: Container, key: str) -> None:
    started, ended = threading.Event(), threading.Event()
    url = f"{appliance.url(6333)}/v1/chat/completions"
    body = {"model": "shoehorn-demo", "messages": _QUESTION, "stream": True, "ignore_eos": True, "max_tokens": 900}

    def stream() -> None:
        try:
            with httpx.stream("POST", url, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60) as answer:
                for _ in answer.iter_lines():
                    started.set()
        except httpx.TransportError:
            pass  # cut off after DRAIN_TIMEOUT
        ended.set()

    thread = threading.Thread(target=stream)
    thread.start()
    assert started.wait(30)
    appliance.announce(*INTERRUPTED)
    code, seconds = appliance.stop()
    assert code == 0
    assert seconds < 30
    assert ended.wait(60)
    thread.join()


def test_second_start_uses_the_same_key_and_model(appliance: Container, composed: Callable[..., str], key: str) -> None:
    composed("up", "--detach", "--no-build")
    wait_until(lambda: appliance.phase() == "loading", 30, "loading")
    assert "default" in composed("exec", "-T", "shoehorn", "shoehorn", "keys", "list")
    time.sleep(1)
    code, _ = appliance.stop()
    assert code == 0
    assert appliance.logs.count(key) == 2  # the key is printed by the first start only
