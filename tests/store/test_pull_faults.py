"""Faults of the hub, of the volume and of the pull itself: each pull is a process of its own, as in production.

After each: exit code and words as documented, the hub's token in no output, no process left, and nothing that is not
whole is ever served.
"""

from __future__ import annotations

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
from support.pulling import HELD_AT_THE_CHECK, MODEL, WEIGHTS, WEIGHTS_BYTES, Volume, stop_when_arrived, write_model

pytestmark = pytest.mark.process

TOKEN = "ms-canary-5c1e77a0b2d94f36"
NOBODY = 65534
CHUNK_BYTES = {Hub: 1 << 20, HuggingFaceHub: 256 << 10}  # what each hub's library writes at once
BOTH = pytest.mark.parametrize("kind", [Hub, HuggingFaceHub])
IMPATIENT = {"HF_HUB_DOWNLOAD_TIMEOUT": "4", "MODELSCOPE_DOWNLOAD_TIMEOUT": "4", "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "1"}

Mount = Callable[..., Volume]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Volumes whose user has a token; no process that knows one may outlive the test."""
    volumes: list[Volume] = []

    def made(hub: Hub, **more: str) -> Volume:
        volumes.append(Volume(tmp_path, hub, HF_TOKEN=TOKEN, MODELSCOPE_API_TOKEN=TOKEN, **more))
        return volumes[-1]

    yield made
    for volume in volumes:
        assert left(volume) == []


def left(volume: Volume) -> list[psutil.Process]:
    """The processes that pull into this volume."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MODELS_DIR") == str(volume.models):
                found.append(process)
        except psutil.Error:  # it ended meanwhile
            continue
    return found


def nothing_is_served(volume: Volume) -> None:
    assert pull_module.locate(volume.models, volume.ref) is None


def refused(volume: Volume, outcome: tuple[int, str, str], *words: str) -> None:
    """It ended with code 4 and these words, told no secret, and left nothing to be served."""
    code, out, err = outcome
    assert code == 4, err
    for word in words:
        assert word in err
    assert "Traceback" not in err
    assert TOKEN not in out + err
    nothing_is_served(volume)


@pytest.mark.fault("The hub sends a file that is too short, and says that this is all",
                   "Exit code 4, and the file's name; it is not kept as whole.")
@BOTH
def test_a_file_of_the_wrong_length_is_refused(mount: Mount, model: Path, kind: type[Hub]) -> None:
    with kind({MODEL: model}, fault="short", token=TOKEN) as hub:
        volume = mount(hub)
        refused(volume, volume.pull(), WEIGHTS)
    assert not (volume.folder / WEIGHTS).exists()


@pytest.mark.fault("The hub answers 429 or 503 then 200, or resets a connection",
                   "The same pull goes on, and nothing that arrived is fetched again.")
@pytest.mark.parametrize("fault", ["busy", "down", "reset"])
def test_what_passes_is_got_over(mount: Mount, model: Path, fault: str) -> None:
    with Hub({MODEL: model}, fault=fault, token=TOKEN) as hub:
        volume = mount(hub)
        code, out, err = volume.pull()
        assert (code, err) == (0, ""), out
        assert TOKEN not in out
        first, second = hub.downloads(WEIGHTS)
    assert (first, second[:6]) == ("", "bytes=" if fault == "reset" else "")
    assert volume.complete()


@pytest.mark.fault("The hub ignores Range when a pull goes on with a file",
                   "Fetched from the start; the result is the same.")
@BOTH
def test_a_hub_that_ignores_ranges_costs_bytes_only(mount: Mount, model: Path, kind: type[Hub]) -> None:
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
        assert hub.downloads(WEIGHTS)[-1].startswith("bytes="), "it was asked for what is missing"
    assert (volume.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert volume.complete()


@pytest.mark.fault("The hub falls silent in the middle of a file", "Given up after its time limit, and gone on with.")
@BOTH
def test_a_hub_that_falls_silent_is_left_and_asked_again(mount: Mount, model: Path, kind: type[Hub]) -> None:
    with kind({MODEL: model}, fault="stall", token=TOKEN) as hub:
        volume = mount(hub, **IMPATIENT)
        code, _, err = volume.pull()
        assert code == 0, err
        assert hub.downloads(WEIGHTS)[-1].startswith("bytes=")
    assert (volume.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


@pytest.mark.fault("The hub falls silent in the middle of a file, every time",
                   "Exit code 4, and the file's name; what arrived is kept and gone on with.")
@pytest.mark.parametrize("kind", [Hub])  # the other hub's library tries for a minute first
def test_a_hub_that_stays_silent_ends_in_words(mount: Mount, tmp_path: Path, kind: type[Hub],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "hub")
    with kind({MODEL: model}, fault="hang", token=TOKEN) as hub:
        volume = mount(hub, **IMPATIENT)
        refused(volume, volume.pull(), WEIGHTS, "stopped")
        there = (volume.folder / f"{WEIGHTS}.incomplete").stat().st_size
        assert there >= WEIGHTS_BYTES // 2 - CHUNK_BYTES[kind]
        hub.faults.clear()
        assert volume.pull()[0] == 0
        assert hub.downloads(WEIGHTS)[-1].startswith(f"bytes={there}-")
    assert volume.complete()


@pytest.mark.fault("Ten kills of one pull, wherever it is",
                   "Each costs less than 1 MiB beside what was under way: under 2 % in all of a model of 512 MiB.")
@BOTH
def test_ten_kills_cost_next_to_nothing(mount: Mount, tmp_path: Path, kind: type[Hub],
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.pulling.WEIGHTS_BYTES", 33 << 20)
    model = write_model(tmp_path / "hub")
    points = [number * (3 << 20) + number * 700_001 % (1 << 20) for number in range(1, 11)]
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
        begun = [int(span.removeprefix("bytes=").split("-")[0]) for span in hub.downloads(WEIGHTS) if span][-10:]
    again = [point - start for point, start in zip(points, begun, strict=True)]
    assert all(0 <= count < CHUNK_BYTES[kind] for count in again), again
    assert sum(again) <= 0.02 * (512 << 20)
    assert volume.complete()


@pytest.mark.fault("`kill -9` of a pull while it checks what it fetched",
                   "Nothing is served; the next one checks again, and fetches nothing again.")
def test_a_pull_that_is_killed_while_it_verifies_verifies_again(mount: Mount, model: Path) -> None:
    with Hub({MODEL: model}) as hub:
        volume = mount(hub)
        with volume.start("--json", program=HELD_AT_THE_CHECK) as process:
            kill_while_it_verifies(process)
        nothing_is_served(volume)
        assert volume.pull()[0] == 0
        assert len(hub.downloads(WEIGHTS)) == 1
        assert volume.complete()
        asked = len(hub.requests)
        with volume.start("--json", "--verify", program=HELD_AT_THE_CHECK) as process:
            kill_while_it_verifies(process)
        assert volume.pull()[0] == 0
        assert len(hub.requests) == asked
    assert volume.complete()


def kill_while_it_verifies(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    assert any('"verifying"' in line for line in process.stdout)
    process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.fault("The disk fills while a model is pulled",
                   "Exit code 4 in words; goes on where it stopped once there is room.")
def test_a_disk_that_fills_is_told_and_gone_on_with(mount: Mount, tmp_path: Path, model: Path) -> None:
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
        done = in_namespace("--mount", ["bash", "-c", script], volume)
        assert done.stdout.split("\n")[:2] == ["full: 4", "whole"], done.stdout + done.stderr
        err = (tmp_path / "err").read_text()
        assert "disk full" in err or "too little free space" in err, "by the write or a check before it"
        assert TOKEN not in err
        assert [span for span in hub.downloads(WEIGHTS) if span], "it went on"


@pytest.mark.fault("The volume is mounted read-only",
                   "A pull finds a complete model in it; for another, exit code 4 and what to type.")
def test_a_volume_that_is_read_only_is_told_in_words(mount: Mount, model: Path) -> None:
    with Hub({MODEL: model}) as hub:
        volume = mount(hub)
        pull = textwrap.dedent(f"""
            mount --bind {volume.models} {volume.models} && mount -o remount,bind,ro {volume.models} &&
            exec {sys.executable} -m shoehorn.cli pull
            """)
        done = in_namespace("--mount", ["bash", "-c", pull], volume)
        refused(volume, (done.returncode, done.stdout, done.stderr), "read-only", "without :ro")
        assert volume.pull()[0] == 0
        asked = len(hub.requests)
        done = in_namespace("--mount", ["bash", "-c", pull], volume)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(hub.requests) == asked


@pytest.mark.fault("The volume belongs to another user", "Exit code 4, with the `chown` to type.")
def test_a_volume_of_another_user_is_told_with_the_command(mount: Mount, tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}) as hub:
        volume = mount(hub)
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_mode & 0o5 != 0o5 and folder.is_relative_to("/tmp"):
                folder.chmod(folder.stat().st_mode | 0o5)
        (tmp_path / "run").mkdir(mode=0o777)
        os.chown(tmp_path / "run", NOBODY, NOBODY)
        done = subprocess.run(["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", sys.executable,
                               "-m", "shoehorn.cli", "pull"], capture_output=True, text=True, timeout=60,
                              env=environment(volume))
    refused(volume, (done.returncode, done.stdout, done.stderr), f"sudo chown -R {NOBODY}")


@pytest.mark.fault("No network at all, with OFFLINE",
                   "A complete model is served; nobody is asked, not even for a name.")
def test_offline_asks_nobody(mount: Mount, model: Path) -> None:
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
        done = in_namespace("--net", [sys.executable, "-c", script, *command], volume)
        assert done.returncode == 0 or command == ["plan"], done.stderr
        assert "ASKED" not in done.stdout
    for name in (WEIGHTS, "config.json"):
        (volume.folder / name).unlink()
    done = in_namespace("--net", [sys.executable, "-c", script, "pull"], volume)
    assert "ASKED" not in done.stdout
    refused(volume, (done.returncode, done.stdout, done.stderr), "OFFLINE")


@pytest.mark.fault("`docker stop` or Ctrl-C while pulling, at any moment",
                   "It ends within seconds; no process is left.")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_pull_leaves_no_process(mount: Mount, model: Path, number: signal.Signals) -> None:
    with Hub({MODEL: model}, bytes_per_second=500_000) as hub:
        volume = mount(hub)
        with volume.start("--json") as process:
            stop_when_arrived(process, 1, number)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert TOKEN not in err
        assert left(volume) == []
    nothing_is_served(volume)


def environment(volume: Volume) -> dict[str, str]:
    """That of a pull in production."""
    return {**volume.environment, "PATH": os.environ["PATH"], "HOME": str(volume.models.parent),
            "PYTHONPATH": str(Path(pull_module.__file__).parents[2])}


def in_namespace(kind: str, command: list[str], volume: Volume) -> subprocess.CompletedProcess[str]:
    """A command with mounts or a network of its own: `kind` is an option of `unshare`."""
    return subprocess.run(["unshare", kind, *command], capture_output=True, text=True, timeout=100,
                          env=environment(volume), check=False)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
