"""Faults of the hub, of the volume and of the pull itself: each pull is a process of its own, as in production.

After each: exit code and words as documented, no secret in any output, and nothing that is not whole is ever served.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from fakes import hub as stand_in
from fakes.hf_hub import HuggingFaceHub
from fakes.hub import Hub
from pulling import MODEL, WEIGHTS, WEIGHTS_BYTES, Volume, stop_when_arrived, write_model
from shoehorn import store

TOKEN = "ms-canary-5c1e77a0b2d94f36"
NOBODY = 65534


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hub") / "model")


def nothing_is_served(volume: Volume) -> None:
    assert store.locate(volume.settings) is None


@pytest.mark.fault("The hub sends a file that is too short, and says that this is all",
                   "Exit code 4, and the file's name; it is not kept as whole.")
@pytest.mark.parametrize("kind", [Hub, HuggingFaceHub])
def test_a_file_of_the_wrong_length_is_refused(tmp_path: Path, model: Path, kind: type[Hub]) -> None:
    with kind({MODEL: model}, fault="short", token=TOKEN) as hub:
        name = "HF_TOKEN" if kind is HuggingFaceHub else "MODELSCOPE_API_TOKEN"
        volume = Volume(tmp_path, hub, **{name: TOKEN})
        code, out, err = volume.pull()
    assert code == 4, err
    assert WEIGHTS in err
    assert TOKEN not in out + err
    assert not (volume.folder / WEIGHTS).exists()
    nothing_is_served(volume)


@pytest.mark.fault("The hub falls silent in the middle of a file", "Given up after its time limit, and gone on with.")
def test_a_hub_that_falls_silent_is_left_and_asked_again(tmp_path: Path, model: Path) -> None:
    with HuggingFaceHub({MODEL: model}, fault="stall") as hub:
        volume = Volume(tmp_path, hub, HF_HUB_DOWNLOAD_TIMEOUT="1")
        code, _, err = volume.pull()
        assert code == 0, err
        assert hub.downloads(WEIGHTS)[-1].startswith("bytes=")
    assert (volume.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


@pytest.mark.fault("Ten kills of one pull", "At most 2 % of the bytes are fetched twice.")
def test_ten_kills_cost_next_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pulling.WEIGHTS_BYTES", 100 << 20)
    model = write_model(tmp_path / "hub")
    size = (model / WEIGHTS).stat().st_size
    sent = 0
    lock = threading.Lock()
    written = stand_in._Handler._send

    class Counting:
        def __init__(self, file: object) -> None:
            self._file = file

        def write(self, piece: bytes) -> None:
            nonlocal sent
            self._file.write(piece)  # type: ignore[attr-defined]  # a socket's file
            with lock:
                sent += len(piece)

        def __getattr__(self, name: str) -> object:
            return getattr(self._file, name)

    def count(handler: stand_in._Handler, content: bytes, rate: int, *, cut: bool, stall: bool) -> None:
        if len(content) > 1 << 20:
            handler.wfile = Counting(handler.wfile)  # type: ignore[assignment]  # as above
        written(handler, content, rate, cut=cut, stall=stall)

    monkeypatch.setattr(stand_in._Handler, "_send", count)
    with HuggingFaceHub({MODEL: model}, bytes_per_second=50_000_000) as hub:
        volume = Volume(tmp_path, hub)
        for number in range(1, 11):
            with volume.start("--json") as process:
                stop_when_arrived(process, number * (8 << 20))
            nothing_is_served(volume)
        hub.bytes_per_second = 0
        assert volume.pull()[0] == 0
    assert volume.complete()
    assert 0 <= (sent - size) / size <= 0.02, "what lay in a socket when its reader died counts too"


@pytest.mark.fault("`kill -9` of a pull while it checks what it fetched",
                   "Checked again from the start by the next one.")
def test_a_pull_that_is_killed_while_it_verifies_verifies_again(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}) as hub:
        volume = Volume(tmp_path, hub)
        assert volume.pull()[0] == 0
        os.utime(volume.folder / WEIGHTS, ns=(1, 1))
        with volume.start("--json", "--verify") as process:
            assert process.stdout
            for line in process.stdout:
                if "verif" in line:
                    break
            process.kill()
        asked = len(hub.requests)
        assert volume.pull()[0] == 0
        assert len(hub.requests) == asked, "nothing was missing"
    assert volume.complete()


@pytest.mark.fault("The disk fills while a model is pulled",
                   "Exit code 4 in words; goes on where it stopped once there is room.")
def test_a_disk_that_fills_is_told_and_gone_on_with(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, bytes_per_second=3_000_000) as hub:
        volume = Volume(tmp_path, hub)
        (volume.models / ".mounted").mkdir()
        script = textwrap.dedent(f"""
            set -e
            mount -t tmpfs -o size={WEIGHTS_BYTES + (1 << 20)} none {volume.models}
            {sys.executable} -m shoehorn.cli pull --json > {tmp_path}/out 2> {tmp_path}/err &
            pull=$!
            while ! grep -q '"bytes_done": [1-9]' {tmp_path}/out; do sleep 0.05; done
            head -c $(($(stat -f -c '%a * %S' {volume.models}) - 65536)) /dev/zero > {volume.models}/filling
            code=0; wait $pull || code=$?
            echo "full: $code"
            rm {volume.models}/filling
            {sys.executable} -m shoehorn.cli pull > {tmp_path}/again
            cmp {model}/{WEIGHTS} {volume.folder}/{WEIGHTS}
            echo "whole"
            """)
        done = subprocess.run(["unshare", "--mount", "bash", "-c", script], capture_output=True, text=True, timeout=100,
                              env=environment(volume))
        assert done.stdout.split("\n")[:2] == ["full: 4", "whole"], done.stdout + done.stderr
        assert "is full" in (tmp_path / "err").read_text()
        assert [span for span in hub.downloads(WEIGHTS) if span], "it went on"


@pytest.mark.fault("The volume belongs to another user", "Exit code 4, with the `chown` to type.")
def test_a_volume_of_another_user_is_told_with_the_command(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}) as hub:
        volume = Volume(tmp_path, hub, RUN_DIR=str(tmp_path / "run"))
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_mode & 0o5 != 0o5 and folder.is_relative_to("/tmp"):
                folder.chmod(folder.stat().st_mode | 0o5)
        (tmp_path / "run").mkdir(mode=0o777)
        os.chown(tmp_path / "run", NOBODY, NOBODY)
        done = subprocess.run(["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", sys.executable,
                               "-m", "shoehorn.cli", "pull"], capture_output=True, text=True, timeout=60,
                              env=environment(volume))
    assert done.returncode == 4, done.stderr
    assert f"sudo chown -R {NOBODY}" in done.stderr
    nothing_is_served(volume)


@pytest.mark.fault("No network at all, with OFFLINE",
                   "A complete model is served; nobody is asked, not even for a name.")
def test_offline_asks_nobody(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}) as hub:
        volume = Volume(tmp_path, hub)
        assert volume.pull()[0] == 0
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
        done = subprocess.run(["unshare", "--net", sys.executable, "-c", script, *command], capture_output=True,
                              text=True, timeout=60, env={**environment(volume), "OFFLINE": "1", "VRAM_PROFILE": "cpu"})
        assert done.returncode == 0 or command == ["plan"], done.stderr
        assert "ASKED" not in done.stdout
    for name in (WEIGHTS, "config.json"):
        (volume.folder / name).unlink()
    done = subprocess.run(["unshare", "--net", sys.executable, "-c", script, "pull"], capture_output=True, text=True,
                          timeout=60, env={**environment(volume), "OFFLINE": "1"})
    assert done.returncode == 4
    assert "ASKED" not in done.stdout
    assert "OFFLINE" in done.stderr


@pytest.mark.fault("`docker stop` or Ctrl-C while pulling, at any moment",
                   "It ends within seconds; no process is left.")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_pull_leaves_no_process(tmp_path: Path, model: Path, number: signal.Signals) -> None:
    with Hub({MODEL: model}, bytes_per_second=500_000) as hub:
        volume = Volume(tmp_path, hub)
        with volume.start("--json") as process:
            assert process.stdout
            process.stdout.readline()
            process.send_signal(number)
            process.communicate(timeout=20)
        assert process.returncode not in (0, -signal.SIGKILL)
        left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False).stdout
        assert left == ""
    nothing_is_served(volume)


def environment(volume: Volume) -> dict[str, str]:
    """That of a pull in production."""
    return {**volume.environment, "PATH": os.environ["PATH"], "HOME": str(volume.models.parent),
            "PYTHONPATH": str(Path(store.__file__).parents[1])}
