"""A power cut, simulated on a real file system: what was not synced is not there any more.

An ext4 lies in a file of its own, without the mercy that it has for programs that do not sync, and commits nothing by
itself meanwhile. A copy of that file, made while a write is under way, holds what a disk would hold if the power went
at that moment; mounted, it shows what the next start finds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fakes.hub import Hub
from shoehorn.common.progress import Report
from shoehorn.config import settings
from shoehorn.config.settings import Settings
from shoehorn.gateway.keys.api_key import Key
from shoehorn.gateway.keys.store import KeyStore
from shoehorn.hub.files import ModelFile
from shoehorn.hub.repository import RemoteRepository
from shoehorn.model.reference import ModelRef
from shoehorn.runtime.state import Phase, StateFile
from shoehorn.store import manifest, pull
from shoehorn.store.manifest import Manifest
from support.pulling import MODEL, write_model

pytestmark = pytest.mark.process

SIZE_BYTES = 12 << 20
REF = ModelRef(MODEL, "modelscope", "master")
OLD = Manifest(MODEL, "master", "https://hub", False, (ModelFile("config.json", 7, "ab" * 32),))


class Disk:
    """The file system; `cut` notes what would be left of it now."""

    def __init__(self, home: Path) -> None:
        self._image, self._shown, self.root = home / "disk", home / "shown", home / "mounted"
        self.cuts: list[tuple[str, Path]] = []
        self._number = 0
        self.root.mkdir()
        self._shown.mkdir()
        self._image.touch()
        os.truncate(self._image, SIZE_BYTES)
        subprocess.run(["mkfs.ext4", "-q", self._image], check=True)
        done = subprocess.run(["mount", "-o", "loop,commit=300,noauto_da_alloc,data=writeback", self._image, self.root],
                              stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted from a file here: {done.stderr.strip()}")

    def cut(self, moment: str) -> None:
        """The power goes here, in one of the worlds."""
        self._number += 1
        assert self._number <= 100, "each takes room"
        self.cuts.append((moment, self._image.with_name(f"cut-{self._number}")))
        subprocess.run(["cp", "--sparse=always", self._image, self.cuts[-1][1]], check=True)

    def left(self) -> Iterator[tuple[str, Path]]:
        """For each cut, what is there afterwards, in a folder of its own meanwhile."""
        cuts, self.cuts = self.cuts, []  # whoever looks may sync
        for moment, image in cuts:
            subprocess.run(["mount", "-o", "loop", image, self._shown], check=True)
            try:
                yield moment, self._shown
            finally:
                subprocess.run(["umount", self._shown], check=True)
                image.unlink()

    def close(self) -> None:
        """Take it away, and what a test that failed was looking at."""
        subprocess.run(["umount", self._shown], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["umount", self.root], check=True)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """A disk whose power goes before and after every sync and every rename."""
    made = Disk(tmp_path)

    def around(name: str, real: Callable[..., None]) -> Callable[..., None]:
        def step(*arguments: object) -> None:
            made.cut(f"before {name}")
            real(*arguments)
            made.cut(f"after {name}")

        return step

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, around(name, getattr(os, name)))
    yield made
    made.close()


def write_state(root: Path, number: int) -> Path:
    StateFile(root).update(phase=Phase.PULLING if number == 1 else Phase.LOADING)
    return root / "state.json"


def write_keys(root: Path, number: int) -> Path:
    KeyStore(root).add(Key.make(f"key-{number}", f"sk-{number}" * 10, 0.0))
    return root / ".shoehorn" / "keys.json"


def write_manifest(root: Path, number: int) -> Path:
    manifest.write(root, REF, replace(OLD, complete=number > 1))
    return manifest.location(root, REF)


@pytest.mark.fault("The power goes at any moment of a write of state, keys or manifest, on a real ext4",
                   "The file is whole, as before or as after; once the write has returned it is the new one.")
@pytest.mark.parametrize("write", [write_state, write_keys, write_manifest])
def test_whenever_the_power_goes_the_file_is_whole(disk: Disk, write: Callable[[Path, int], Path]) -> None:
    old = write(disk.root, 1).read_bytes()
    os.sync()
    disk.cuts.clear()
    path = write(disk.root, 2)
    disk.cut("after it returned")
    new = path.read_bytes()
    assert old != new
    name = path.relative_to(disk.root)
    found = [(moment, {old: "old", new: "new"}.get((root / name).read_bytes(), "neither"))
             for moment, root in disk.left()]
    assert len(found) >= 5
    assert {state for _, state in found} == {"old", "new"}, found
    assert found[-1] == ("after it returned", "new")


def test_what_was_not_synced_is_lost_here(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else this disk would show nothing."""
    old = write_state(disk.root, 1).read_bytes()
    os.sync()
    disk.cuts.clear()
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    write_state(disk.root, 2)
    disk.cut("after it returned")
    assert [(root / "state.json").read_bytes() for _, root in disk.left()][-1] == old


@pytest.mark.fault("The power goes at any moment of a pull, on a real ext4",
                   "What counts as complete afterwards is whole, by every SHA-256.")
def test_whenever_the_power_goes_a_model_is_whole_or_incomplete(disk: Disk, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    def download(_settings: Settings, _hub: RemoteRepository, directory: Path, _wanted: Sequence[ModelFile],
                 needed: Sequence[ModelFile], _report: Report) -> None:
        for file in needed:  # as the libraries leave them: not synced
            shutil.copyfile(model / file.path, directory / file.path)

    monkeypatch.setattr("support.pulling.WEIGHTS_BYTES", 1 << 20)
    monkeypatch.setattr(pull, "download", download)
    model = write_model(tmp_path / "hub")
    with Hub({MODEL: model}) as hub:
        here = settings.load({"MODEL_ID": MODEL, "MODELS_DIR": str(disk.root), "MODELSCOPE_ENDPOINT": hub.url})
        pull.pull(here, lambda _progress: None)
    disk.cut("after it returned")
    complete, moments = list[str](), len(disk.cuts)
    monkeypatch.undo()
    for moment, root in disk.left():
        if pull.locate(root, REF):
            complete.append(moment)
            pull.verify(replace(here, models_dir=root), lambda _progress: None)
    assert complete
    assert complete[-1] == "after it returned"
    assert len(complete) < moments // 2, "most cuts came before"
