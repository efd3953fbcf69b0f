"""Power cuts, simulated on a real file system: data that was not synced is lost.

An ext4 image is mounted without the options that protect programs that do not sync, and without periodic commits. A
copy of the image during a write contains what a disk would contain after a power cut; mounted, it shows the state of
the next start.
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
    """The file system; `cut` records its content after a power cut now."""

    def __init__(self, home: Path) -> None:
        self._image, self._shown, self.root = home / "disk", home / "shown", home / "mounted"
        self.cuts: list[tuple[str, Path]] = []
        self._number = 0
        self.root.mkdir()
        self._shown.mkdir()
        self._image.touch()
        os.truncate(self._image, SIZE_BYTES)
        subprocess.run(["mkfs.ext4", "-q", self._image], check=True)
        options = "loop,commit=300,noauto_da_alloc,data=writeback"
        mounted = subprocess.run(["mount", "-o", options, self._image, self.root], stderr=subprocess.PIPE, text=True,
                                 check=False)
        if mounted.returncode:
            pytest.skip(f"loop mounts unavailable: {mounted.stderr.strip()}")

    def cut(self, moment: str) -> None:
        """Record a power cut at this moment."""
        self._number += 1
        assert self._number <= 100, "each copy needs disk space"
        self.cuts.append((moment, self._image.with_name(f"cut-{self._number}")))
        subprocess.run(["cp", "--sparse=always", self._image, self.cuts[-1][1]], check=True)

    def contents_after_cuts(self) -> Iterator[tuple[str, Path]]:
        """Mount the content after each cut; yield its moment and folder."""
        cuts, self.cuts = self.cuts, []  # reading may sync
        for moment, image in cuts:
            subprocess.run(["mount", "-o", "loop", image, self._shown], check=True)
            try:
                yield moment, self._shown
            finally:
                subprocess.run(["umount", self._shown], check=True)
                image.unlink()

    def close(self) -> None:
        """Unmount everything, also after a failed test."""
        subprocess.run(["umount", self._shown], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["umount", self.root], check=True)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """Return a disk with a power cut before and after every sync and rename."""
    disk = Disk(tmp_path)

    def around(name: str, real: Callable[..., None]) -> Callable[..., None]:
        def step(*arguments: object) -> None:
            disk.cut(f"before {name}")
            real(*arguments)
            disk.cut(f"after {name}")

        return step

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, around(name, getattr(os, name)))
    yield disk
    disk.close()


def write_state(root: Path, number: int) -> Path:
    StateFile(root).update(phase=Phase.PULLING if number == 1 else Phase.LOADING)
    return root / "state.json"


def write_keys(root: Path, number: int) -> Path:
    KeyStore(root).add(Key.make(f"key-{number}", f"sk-{number}" * 10, 0.0))
    return root / ".shoehorn" / "keys.json"


def write_manifest(root: Path, number: int) -> Path:
    manifest.write(root, REF, replace(OLD, complete=number > 1))
    return manifest.location(root, REF)


@pytest.mark.fault("Power cut at any moment while state, keys or manifest are written, on a real ext4",
                   "The file is complete: old or new; after the write returned it is the new one.")
@pytest.mark.parametrize("write", [write_state, write_keys, write_manifest])
def test_power_cut_leaves_the_old_or_the_new_file(disk: Disk, write: Callable[[Path, int], Path]) -> None:
    old = write(disk.root, 1).read_bytes()
    os.sync()
    disk.cuts.clear()
    path = write(disk.root, 2)
    disk.cut("after it returned")
    new = path.read_bytes()
    assert old != new
    name = path.relative_to(disk.root)
    contents = [(moment, {old: "old", new: "new"}.get((root / name).read_bytes(), "neither"))
                for moment, root in disk.contents_after_cuts()]
    assert len(contents) >= 5
    assert {state for _, state in contents} == {"old", "new"}, contents
    assert contents[-1] == ("after it returned", "new")


def test_unsynced_data_is_lost_on_this_disk(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the test disk itself."""
    old = write_state(disk.root, 1).read_bytes()
    os.sync()
    disk.cuts.clear()
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    write_state(disk.root, 2)
    disk.cut("after it returned")
    assert [(root / "state.json").read_bytes() for _, root in disk.contents_after_cuts()][-1] == old


@pytest.mark.fault("Power cut at any moment of a pull, on a real ext4",
                   "A model that counts as complete afterwards matches every SHA-256.")
def test_power_cut_leaves_a_complete_or_an_incomplete_model(disk: Disk, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    def download(_settings: Settings, _hub: RemoteRepository, directory: Path, _selected: Sequence[ModelFile],
                 needed: Sequence[ModelFile], _report: Report) -> None:
        for file in needed:  # not synced, as by the libraries
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
    for moment, root in disk.contents_after_cuts():
        if pull.locate(root, REF):
            complete.append(moment)
            pull.verify(replace(here, models_dir=root), lambda _progress: None)
    assert complete
    assert complete[-1] == "after it returned"
    assert len(complete) < moments // 2, "most cuts happen before completion"
