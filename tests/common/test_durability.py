"""Power cuts, clock jumps and files of newer versions: effect on state, keys and records."""

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
from shoehorn.engine.restart_budget import RestartBudget
from shoehorn.gateway.keys.store import KeyStore
from shoehorn.runtime.state import Phase, StateFile


class Disk:
    """Recorder of syncs and renames, in order."""

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
                   "Old or new content: the file is synced, renamed, then its folder is synced.")
def test_file_is_synced_before_its_rename_and_the_folder_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    write_atomic(tmp_path / "manifest.json", "{}")
    [(first, written), (second, renamed), third] = disk.steps
    assert (first, second) == ("sync file", "rename")
    assert written == renamed
    assert written.startswith(".manifest.json.")
    assert third == ("sync folder", tmp_path.name)


@pytest.mark.fault("Power cut before the folder was synced", "The previous file is complete.")
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_old_file_is_unchanged_until_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, "old")

    class PowerCutError(Exception):
        """A failure without cleanup."""

    def cut(*_arguments: object) -> None:
        raise PowerCutError

    monkeypatch.setattr(os, step, cut)
    with pytest.raises(PowerCutError):
        write_atomic(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    write_atomic(path, "newer")
    assert path.read_text() == "newer", "leftovers of the power cut do no harm"


@pytest.mark.fault("Keys or state are not written durably", "A test fails.")
def test_keys_and_state_are_written_durably(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    KeyStore(tmp_path).create_first(0.0)
    StateFile(tmp_path).update(phase=Phase.PULLING)
    RestartBudget(tmp_path / "restarts.json").record()
    renamed = [name for kind, name in disk.steps if kind == "rename"]
    for name in ("keys.json", "state.json", "restarts.json"):
        assert any(name in entry for entry in renamed), (name, disk.steps)
    for index, (kind, name) in enumerate(disk.steps):
        if kind == "rename":
            assert disk.steps[index - 1] == ("sync file", name)
            assert disk.steps[index + 1][0] == "sync folder"


@pytest.mark.fault("The clock jumps back an hour, or a day ahead",
                   "RestartBudget are counted by the monotonic clock: none is lost or added.")
@pytest.mark.parametrize("jump", [-3600.0, 86400.0])
def test_clock_jump_changes_no_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    restarts = RestartBudget(tmp_path / "restarts.json")
    for number in range(4):
        assert restarts.record() == number + 1
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + jump)
    assert not restarts.is_exhausted
    assert restarts.record() == 5
    assert restarts.is_exhausted


@pytest.mark.fault("A state file of a newer version", "Known fields are read; the next update replaces the file.")
def test_state_of_a_newer_version_is_replaced(tmp_path: Path) -> None:
    states = StateFile(tmp_path)
    states.update(phase=Phase.READY)
    document = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**document, "invented_later": {"a": 1}}))
    assert states.read().phase in (Phase.READY, Phase.STARTING)
    states.update(phase=Phase.LOADING)
    assert states.read().phase is Phase.LOADING
    assert "invented_later" not in (tmp_path / "state.json").read_text()


@pytest.mark.fault("Repeated `kill -9` while a file is written", "Readers never see a partial file.")
def test_readers_never_see_a_partial_file(tmp_path: Path) -> None:
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
