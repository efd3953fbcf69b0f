"""Faults of hub, volume and pull: each pull is a separate process, as in production.

After each fault: documented exit code and error, no token in any output, no process left, and no incomplete model is
served.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fakes.hf_hub import HuggingFaceHub
from fakes.hub import Hub
from shoehorn.store import pull as pull_module
from support.pulling import (
    MODEL,
    PAUSED_AT_VERIFICATION,
    WEIGHTS,
    WEIGHTS_BYTES,
    Volume,
    stop_when_arrived,
    write_model,
)

pytestmark = pytest.mark.process

TOKEN = "ms-canary-5c1e77a0b2d94f36"
NOBODY = 65534
CHUNK_BYTES = {Hub: 1 << 20, HuggingFaceHub: 256 << 10}  # size of each write of the library
BOTH = pytest.mark.parametrize("kind", [Hub, HuggingFaceHub])
TIMEOUTS = {"HF_HUB_DOWNLOAD_TIMEOUT": "4", "MODELSCOPE_DOWNLOAD_TIMEOUT": "4", "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "1"}

Mount = Callable[..., Volume]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Return volumes whose user has a token; no process with the token may outlive the test."""
    volumes: list[Volume] = []

    def create(hub: Hub, **more: str) -> Volume:
        volumes.append(Volume(tmp_path, hub, HF_TOKEN=TOKEN, MODELSCOPE_API_TOKEN=TOKEN, **more))
        return volumes[-1]

    yield create
    for volume in volumes:
        assert processes_of(volume) == []


def processes_of(volume: Volume) -> list[psutil.Process]:
    """Return the processes that pull to this volume."""
    processes = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MODELS_DIR") == str(volume.models):
                processes.append(process)
        except psutil.Error:  # it has exited
            continue
    return processes


def nothing_is_served(volume: Volume) -> None:
    assert pull_module.locate(volume.models, volume.ref) is None


def assert_error(volume: Volume, result: tuple[int, str, str], *words: str) -> None:
    """Assert exit code 4, these words, no secret in the output, and that nothing is served."""
    code, out, err = result
    assert code == 4, err
    for word in words:
        assert word in err
    assert "Traceback" not in err
    assert TOKEN not in out + err
    nothing_is_served(volume)


@pytest.mark.fault("The hub sends a file that is too short, with a matching length",
                   "Exit code 4 with the name of the file, which is not kept.")
@BOTH
def test_short_file_is_rejected(mount: Mount, model: Path, kind: type[Hub]) -> None:
    with kind({MODEL: model}, fault="short", token=TOKEN) as hub:
        volume = mount(hub)
        assert_error(volume, volume.pull(), WEIGHTS)
    assert not (volume.folder / WEIGHTS).exists()


@pytest.mark.fault("The hub returns 429 or 503 then 200, or resets a connection",
                   "The same pull resumes without downloading received bytes again.")
@pytest.mark.parametrize("fault", ["busy", "down", "reset"])
def test_transient_errors_are_retried(mount: Mount, model: Path, fault: str) -> None:
    with Hub({MODEL: model}, fault=fault, token=TOKEN) as hub:
        volume = mount(hub)
        code, out, err = volume.pull()
        assert (code, err) == (0, ""), out
        assert TOKEN not in out
        first, second = hub.downloads(WEIGHTS)
    assert (first, second[:6]) == ("", "bytes=" if fault == "reset" else "")
    assert volume.complete()


@pytest.mark.fault("The hub ignores Range when a pull resumes a file",
                   "Downloaded from the start; the result is the same.")
@BOTH
def test_hub_that_ignores_ranges_costs_only_bytes(mount: Mount, model: Path, kind: type[Hub]) -> None:
    with kind({MODEL: model}, token=TOKEN) as hub:
        volume = mount(hub)
        hub.hold_at_bytes = 2 << 20
        partial = volume.folder / f"{WEIGHTS}.incomplete"
        with volume.start("--json") as process:
            wait_for(lambda: partial.exists() and partial.stat().st_size >= 1 << 20)
            process.kill()
        nothing_is_served(volume)
        hub.hold_at_bytes = 0
        hub.faults.add("norange")
        code, _, err = volume.pull()
        assert code == 0, err
        assert hub.downloads(WEIGHTS)[-1].startswith("bytes="), "not requested from the received byte on"
    assert (volume.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert volume.complete()


@pytest.mark.fault("The hub stops sending in the middle of a file", "The request times out and is resumed.")
@BOTH
def test_silent_hub_times_out_and_is_retried(mount: Mount, model: Path, kind: type[Hub]) -> None:
    with kind({MODEL: model}, fault="stall", token=TOKEN) as hub:
        volume = mount(hub, **TIMEOUTS)
        code, _, err = volume.pull()
        assert code == 0, err
        assert hub.downloads(WEIGHTS)[-1].startswith("bytes=")
    assert (volume.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


@pytest.mark.fault("The hub stops sending in the middle of a file, every time",
                   "Exit code 4 with the name of the file; received bytes are kept and resumed.")
@pytest.mark.parametrize("kind", [Hub])  # the other library retries for a minute
def test_permanently_silent_hub_is_an_error(mount: Mount, tmp_path: Path, kind: type[Hub],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "hub")
    with kind({MODEL: model}, fault="hang", token=TOKEN) as hub:
        volume = mount(hub, **TIMEOUTS)
        assert_error(volume, volume.pull(), WEIGHTS, "Download of")
        received = (volume.folder / f"{WEIGHTS}.incomplete").stat().st_size
        assert received >= WEIGHTS_BYTES // 2 - CHUNK_BYTES[kind]
        hub.faults.clear()
        assert volume.pull()[0] == 0
        assert hub.downloads(WEIGHTS)[-1].startswith(f"bytes={received}-")
    assert volume.complete()


@pytest.mark.fault("Five kills of one pull at any moment",
                   "Each loses less than 1 MiB: under 2 % of a model of 256 MiB in total.")
@BOTH
def test_five_kills_lose_almost_nothing(mount: Mount, tmp_path: Path, kind: type[Hub],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.pulling.WEIGHTS_BYTES", 18 << 20)
    model = write_model(tmp_path / "hub")
    points = [number * (3 << 20) + number * 700_001 % (1 << 20) for number in range(1, 6)]
    with kind({MODEL: model}) as hub:
        volume = mount(hub)
        partial = volume.folder / f"{WEIGHTS}.incomplete"
        for hub.hold_at_bytes in points:
            with volume.start("--json") as process:
                wait_for(lambda: partial.exists() and partial.stat().st_size > hub.hold_at_bytes - CHUNK_BYTES[kind])
                process.kill()
            assert process.returncode == -signal.SIGKILL
            nothing_is_served(volume)
        hub.hold_at_bytes = 0
        assert volume.pull()[0] == 0
        starts = [int(span.removeprefix("bytes=").split("-")[0]) for span in hub.downloads(WEIGHTS) if span][-5:]
    repeated = [point - start for point, start in zip(points, starts, strict=True)]
    assert all(0 <= count < CHUNK_BYTES[kind] for count in repeated), repeated
    assert sum(repeated) <= 0.02 * (256 << 20)
    assert volume.complete()


@pytest.mark.fault("`kill -9` of a pull during verification",
                   "Nothing is served; the next pull verifies again and downloads nothing again.")
def test_pull_killed_during_verification_verifies_again(mount: Mount, model: Path) -> None:
    with Hub({MODEL: model}) as hub:
        volume = mount(hub)
        with volume.start("--json", program=PAUSED_AT_VERIFICATION) as process:
            kill_while_it_verifies(process)
        nothing_is_served(volume)
        assert volume.pull()[0] == 0
        assert len(hub.downloads(WEIGHTS)) == 1
        assert volume.complete()
        requests = len(hub.requests)
        with volume.start("--json", "--verify", program=PAUSED_AT_VERIFICATION) as process:
            kill_while_it_verifies(process)
        assert volume.pull()[0] == 0
        assert len(hub.requests) == requests
    assert volume.complete()


def kill_while_it_verifies(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    assert any('"verifying"' in line for line in process.stdout)
    process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.fault("The disk fills during a pull",
                   "Exit code 4 with the cause; the next pull resumes when space is free.")
def test_full_disk_is_reported_and_the_pull_resumed(mount: Mount, tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, bytes_per_second=1_000_000) as hub:
        volume = mount(hub)
        script = textwrap.dedent(f"""
            set -e
            mount -t tmpfs -o size={WEIGHTS_BYTES + (1 << 20)} none {volume.models}
            {sys.executable} -m shoehorn.cli pull --json > {tmp_path}/out 2> {tmp_path}/err &
            pull=$!
            while ! grep -q '"bytes_done": [1-9]' {tmp_path}/out; do sleep 0.05; done
            head -c $(($(stat -f -c '%a * %S' {volume.models}) - 65536)) /dev/zero > {volume.models}/filling || true
            code=0; wait $pull || code=$?
            echo "full: $code"
            rm {volume.models}/filling
            {sys.executable} -m shoehorn.cli pull > {tmp_path}/again
            cmp {model}/{WEIGHTS} {volume.folder}/{WEIGHTS}
            echo "whole"
            """)
        completed = in_namespace("--mount", ["bash", "-c", script], volume)
        assert completed.stdout.split("\n")[:2] == ["full: 4", "whole"], completed.stdout + completed.stderr
        failure = (tmp_path / "out").read_text().splitlines()[-1]
        assert json.loads(failure)["code"] in {"disk_full", "volume_too_small"}, "by the write or a check before it"
        assert TOKEN not in failure + (tmp_path / "err").read_text()
        assert [span for span in hub.downloads(WEIGHTS) if span], "not resumed"


@pytest.mark.fault("The volume is mounted read-only",
                   "A complete model is used; for another model exit code 4 with a remedy.")
def test_read_only_volume_is_reported(mount: Mount, model: Path) -> None:
    with Hub({MODEL: model}) as hub:
        volume = mount(hub)
        pull = textwrap.dedent(f"""
            mount --bind {volume.models} {volume.models} && mount -o remount,bind,ro {volume.models} &&
            exec {sys.executable} -m shoehorn.cli pull
            """)
        completed = in_namespace("--mount", ["bash", "-c", pull], volume)
        assert_error(volume, (completed.returncode, completed.stdout, completed.stderr), "read-only", "without :ro")
        assert volume.pull()[0] == 0
        requests = len(hub.requests)
        completed = in_namespace("--mount", ["bash", "-c", pull], volume)
        assert (completed.returncode, completed.stderr) == (0, "")
        assert len(hub.requests) == requests


@pytest.mark.fault("The volume belongs to another user", "Exit code 4 with the `chown` command.")
def test_volume_of_another_user_is_reported_with_a_command(mount: Mount, tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}) as hub:
        volume = mount(hub)
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_mode & 0o5 != 0o5 and folder.is_relative_to("/tmp"):
                folder.chmod(folder.stat().st_mode | 0o5)
        (tmp_path / "run").mkdir(mode=0o777)
        os.chown(tmp_path / "run", NOBODY, NOBODY)
        command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", sys.executable, "-m",
                   "shoehorn.cli", "pull"]
        completed = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(volume))
    assert_error(volume, (completed.returncode, completed.stdout, completed.stderr), f"sudo chown -R {NOBODY}")


@pytest.mark.fault("No network at all, with OFFLINE",
                   "A complete model is served; no connection and no name lookup.")
def test_offline_makes_no_connection(mount: Mount, model: Path) -> None:
    with Hub({MODEL: model}) as hub:
        volume = mount(hub, VRAM_PROFILE="cpu")
        assert volume.pull()[0] == 0
    volume.environment["OFFLINE"] = "1"
    script = """
import socket, sys
def forbid(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print("ASKED", event, arguments[1:], flush=True)
sys.addaudithook(forbid)
from shoehorn.cli import main
sys.argv = ["shoehorn", *sys.argv[1:]]
sys.exit(main())
"""
    for command in (["pull"], ["plan"], ["models"]):
        completed = in_namespace("--net", [sys.executable, "-c", script, *command], volume)
        assert completed.returncode == 0 or command == ["plan"], completed.stderr
        assert "ASKED" not in completed.stdout
    for name in (WEIGHTS, "config.json"):
        (volume.folder / name).unlink()
    completed = in_namespace("--net", [sys.executable, "-c", script, "pull"], volume)
    assert "ASKED" not in completed.stdout
    assert_error(volume, (completed.returncode, completed.stdout, completed.stderr), "OFFLINE")


@pytest.mark.fault("`docker stop` or Ctrl-C at any moment of a pull",
                   "It exits within seconds; no process is left.")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_pull_leaves_no_process(mount: Mount, model: Path, number: signal.Signals) -> None:
    with Hub({MODEL: model}, bytes_per_second=500_000) as hub:
        volume = mount(hub)
        with volume.start("--json") as process:
            stop_when_arrived(process, 1, number)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert TOKEN not in err
        assert processes_of(volume) == []
    nothing_is_served(volume)


def environment(volume: Volume) -> dict[str, str]:
    """Return the environment of a pull in production."""
    return {**volume.environment, "PATH": os.environ["PATH"], "HOME": str(volume.models.parent),
            "PYTHONPATH": str(Path(pull_module.__file__).parents[2])}


def in_namespace(kind: str, command: list[str], volume: Volume) -> subprocess.CompletedProcess[str]:
    """Run a command in a namespace; `kind` is an option of `unshare`."""
    return subprocess.run(["unshare", kind, *command], capture_output=True, text=True, timeout=100,
                          env=environment(volume), check=False)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
