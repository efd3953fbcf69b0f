"""What a power cut, a clock that jumps or another version may do to state, keys and records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoehorn.common import atomic_file
from shoehorn.common.atomic_file import write_atomic
from shoehorn.engine.restart_budget import Restarts
from shoehorn.gateway.keys.store import KeyStore
from shoehorn.runtime.state import Phase, StateFile


class Disk:
    """Records what is made durable in which order, and what would lie there had the power been cut before each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[str, str]] = []
        replace, fsync = os.replace, os.fsync

        def synced(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self.steps.append(("sync folder" if path.is_dir() else "sync file", path.name))
            fsync(descriptor)

        def replaced(old: str | Path, new: str | Path) -> None:
            self.steps.append(("rename", Path(old).name))
            replace(old, new)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", replaced)


@pytest.mark.fault("Power cut while state, keys or manifests are written",
                   "The old content or the new: synced, renamed, and the folder synced, in this order.")
def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    write_atomic(tmp_path / "manifest.json", "{}")
    [(first, written), (second, renamed), third] = disk.steps
    assert (first, second) == ("sync file", "rename")
    assert written == renamed
    assert written.startswith(".manifest.json.")
    assert third == ("sync folder", tmp_path.name)


@pytest.mark.fault("Power cut before the folder was synced", "The file that was there before is there whole.")
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_until_the_rename_the_old_file_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, "old")

    class PowerCutError(Exception):
        """No cleaning up happens after it."""

    def cut(*_arguments: object) -> None:
        raise PowerCutError

    monkeypatch.setattr(os, step, cut)
    with pytest.raises(PowerCutError):
        write_atomic(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    write_atomic(path, "newer")
    assert path.read_text() == "newer", "what the cut left behind is in nobody's way"


@pytest.mark.fault("Keys and state are written by anything but the durable way", "A test fails.")
def test_keys_and_state_go_through_the_durable_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    KeyStore(tmp_path).first(0.0)
    StateFile(tmp_path).update(phase=Phase.PULLING)
    Restarts(tmp_path / "restarts.json").record()
    renamed = [name for kind, name in disk.steps if kind == "rename"]
    for name in ("keys.json", "state.json", "restarts.json"):
        assert any(name in entry for entry in renamed), (name, disk.steps)
    for index, (kind, name) in enumerate(disk.steps):
        if kind == "rename":
            assert disk.steps[index - 1] == ("sync file", name)
            assert disk.steps[index + 1][0] == "sync folder"


@pytest.mark.fault("The clock jumps back an hour, or a day ahead",
                   "No restart is forgiven or forged: they are counted by the monotonic clock.")
@pytest.mark.parametrize("jump", [-3600.0, 86400.0])
def test_a_jump_of_the_clock_changes_no_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    restarts = Restarts(tmp_path / "restarts.json")
    for number in range(4):
        assert restarts.record() == number + 1
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + jump)
    assert not restarts.exhausted
    assert restarts.record() == 5
    assert restarts.exhausted


@pytest.mark.fault("A state file of a newer version", "Read as far as it is known, and replaced by the next change.")
def test_a_state_of_a_newer_version_is_replaced(tmp_path: Path) -> None:
    states = StateFile(tmp_path)
    states.update(phase=Phase.READY)
    document = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**document, "invented_later": {"a": 1}}))
    assert states.read().phase in (Phase.READY, Phase.STARTING)
    states.update(phase=Phase.LOADING)
    assert states.read().phase is Phase.LOADING
    assert "invented_later" not in (tmp_path / "state.json").read_text()


@pytest.mark.fault("`kill -9` while a file is written, over and over", "A reader never sees a part.")
def test_no_reader_ever_sees_a_part(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, "0" * 100_000)
    script = ("import sys; from pathlib import Path; from shoehorn.common.atomic_file import write_atomic\n"
              "for number in range(100_000): write_atomic(Path(sys.argv[1]), str(number % 10) * 100_000)")
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", script, str(path)],
                              env={**os.environ, "PYTHONPATH": str(Path(atomic_file.__file__).parents[2])}) as writer:
            end = time.monotonic() + 0.4
            while time.monotonic() < end:
                text = path.read_text()
                assert len(text) == 100_000
                assert len(set(text)) == 1
            writer.kill()
        assert len(set(path.read_text())) == 1
