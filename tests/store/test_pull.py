"""Pulls from a stand-in of ModelScope with the real library: complete and interrupted ones, and verification."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from fakes.hub import Hub
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.common.progress import Report
from shoehorn.config import settings
from shoehorn.config.settings import Settings
from shoehorn.hub.files import ModelFile
from shoehorn.model.files import LocalFiles
from shoehorn.model.reference import ModelRef
from shoehorn.store import pull
from shoehorn.store.reference import model_reference
from support.pulling import MODEL, WEIGHTS, Volume, stop_when_arrived, write_model, write_weights

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Return a home whose volume contains the complete model; to be copied, not changed."""
    home = tmp_path_factory.mktemp("pulled")
    with Hub({MODEL: model}) as hub:
        assert Volume(home, hub).pull()[0] == 0
    return home


@pytest.fixture
def volume(pulled: Path, tmp_path: Path) -> Volume:
    """Return a separate volume with the complete model, without a hub."""
    shutil.copytree(pulled, tmp_path / "home")
    return Volume(tmp_path / "home")


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_pull_downloads_only_the_selected_files(pulled: Path, model: Path) -> None:
    volume = Volume(pulled)
    assert sorted(path.name for path in volume.folder.iterdir()) == ["config.json", WEIGHTS, "tokenizer.json"]
    assert (volume.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert sorted(path.name for path in (volume.models / ".shoehorn").iterdir()) == ["locks", "manifests"]
    manifest = json.loads(volume.manifest.read_text())
    assert manifest["complete"] is True
    assert {file["path"]: file["sha256"] for file in manifest["files"]}[WEIGHTS] == hashlib.sha256(
        (model / WEIGHTS).read_bytes()).hexdigest()


def test_complete_model_needs_no_hub(volume: Volume, tmp_path: Path) -> None:
    (volume.models / ".shoehorn" / "locks").rename(tmp_path / "locks")
    (volume.models / ".shoehorn" / "locks").touch()  # nor a lock: the volume may be read-only
    assert volume.complete()
    assert volume.pull_here() == []
    assert isinstance(pull.hub_files(volume.settings, volume.ref), LocalFiles)


def test_changed_times_are_resolved_by_the_content_without_a_hub(volume: Volume) -> None:
    os.utime(volume.folder / WEIGHTS, ns=(1, 1))
    assert not volume.complete()
    assert isinstance(pull.hub_files(volume.settings, volume.ref), LocalFiles), "needed for planning before the pull"
    assert {progress.phase for progress in volume.pull_here()} == {"verifying"}
    assert volume.complete()


@pytest.mark.fault("Power cut during a pull", "The manifest is completed only after every file and folder is synced.")
def test_every_file_and_folder_is_synced_before_the_manifest_is_complete(volume: Volume,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    os_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        os_fsync(descriptor)

    for path in volume.folder.iterdir():
        os.utime(path, ns=(1, 1))
    monkeypatch.setattr(os, "fsync", fsync)
    volume.pull_here()
    before = synced[:next(index for index, path in enumerate(synced) if volume.manifest.name in path.name)]
    assert {*volume.folder.iterdir(), volume.folder, volume.folder.parent, volume.models} <= set(before)


@pytest.mark.fault("A stored file changes", "Detected at the next start and downloaded again.")
def test_changed_file_is_detected_and_downloaded_again(volume: Volume, model: Path) -> None:
    flip_last_byte(volume.folder / WEIGHTS)
    assert not volume.complete()
    with Hub({MODEL: model}) as hub:
        volume.environment["MODELSCOPE_ENDPOINT"] = hub.url
        assert volume.pull()[0] == 0
        assert hub.downloads("tokenizer.json") == [], "a correct file was downloaded again"
    assert (volume.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 2}', '{"version": 1, "files": []}',
                                     '{"version": 1, "model": "owner/tiny", "revision": "master", "endpoint": "",'
                                     ' "complete": true, "files": []}'])
@pytest.mark.fault("Manifest corrupt", "The model counts as incomplete, and every hash is verified again.")
def test_invalid_manifest_counts_as_missing(volume: Volume, content: str) -> None:
    volume.manifest.write_text(content)
    assert not volume.complete()
    with pytest.raises(ModelUnavailableError) as caught:
        volume.pull_here()
    assert caught.value.code == "hub_unavailable"


@pytest.mark.fault("Manifest forged", "Nothing outside the model's folder is touched.")
def test_manifest_cannot_delete_files_elsewhere(volume: Volume, model: Path) -> None:
    victim = volume.models.parent / "victim.json"
    victim.touch()
    manifest = json.loads(volume.manifest.read_text())
    manifest["files"].append({**manifest["files"][0], "path": "../../../victim.json"})
    volume.manifest.write_text(json.dumps(manifest))
    with Hub({MODEL: model}) as hub:
        volume.environment["MODELSCOPE_ENDPOINT"] = hub.url
        volume.pull_here()  # all files are complete
    assert victim.exists()


@pytest.mark.fault("Weights in the folder that are not in the manifest", "An error with their names; never served.")
def test_unlisted_weights_are_an_error(volume: Volume) -> None:
    write_weights(volume.folder / "other.safetensors")
    assert not volume.complete()
    with pytest.raises(ModelUnavailableError, match=r"other\.safetensors") as caught:
        volume.pull_here()
    assert caught.value.code == "unlisted_weights"


def test_another_revision_replaces_changed_and_deletes_obsolete_files(volume: Volume, tmp_path: Path) -> None:
    newer = write_model(tmp_path / "newer")
    other = (newer / "config.json").read_text().replace("Llama", "Qwen3")
    (newer / "config.json").write_text(other)  # of the same size, and this hub lists no checksums
    (newer / "tokenizer.json").unlink()
    with Hub({MODEL: newer}, fault="nosha") as hub:
        volume.environment |= {"MODELSCOPE_ENDPOINT": hub.url, "MODEL_REVISION": "v2"}
        assert not volume.complete()
        assert volume.pull()[0] == 0
    assert (volume.folder / "config.json").read_text() == other
    assert not (volume.folder / "tokenizer.json").exists()
    assert volume.complete()


@pytest.mark.fault("`kill -9` of a pull (ModelScope)", "An incomplete model is not served; the next pull resumes.")
def test_killed_pull_is_resumed(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}) as hub:
        hub.hold_at_bytes = 2 << 20
        volume = Volume(tmp_path, hub)
        with volume.start("--json") as process:
            stop_when_arrived(process, 1 << 20)
        assert pull.locate(volume.settings.models_dir, volume.ref) is None, "incomplete model is served"
        hub.hold_at_bytes = 0
        assert volume.pull()[0] == 0
        first, second = hub.downloads(WEIGHTS)
        assert first == ""
        assert int(second.removeprefix("bytes=").removesuffix("-")) >= 1 << 20
    assert (volume.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert not list(volume.folder.glob("*.incomplete"))


@pytest.mark.fault("The hub cuts the connection in the middle of a file", "The same pull resumes.")
def test_cut_connection_is_resumed(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, fault="cut") as hub:
        volume = Volume(tmp_path, hub)
        code, out, err = volume.pull()
        assert (code, err) == (0, "")
        assert out.count("retrying") == 1
        first, second = hub.downloads(WEIGHTS)
        assert (first, second[-1]) == ("", "-")
    assert volume.complete()


@pytest.mark.fault("The hub flips a byte", "Exit code 4; the file is deleted and never served.")
def test_wrong_bytes_are_rejected_and_deleted(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, fault="flip") as hub:
        volume = Volume(tmp_path, hub)
        code, out, err = volume.pull()
    assert code == 4
    assert f"{WEIGHTS}: SHA-256 mismatch" in err
    assert "Failed to download" not in out + err, "failures are reported once"
    assert not volume.complete()
    assert not (volume.folder / WEIGHTS).exists()


def test_checksum_in_the_response_is_verified(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, fault="flip,nosha,linked") as hub:
        code, _, err = Volume(tmp_path, hub).pull()
    assert code == 4
    assert "SHA-256 mismatch" in err


def test_missing_checksums_are_logged_and_sizes_verified(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, fault="nosha") as hub:
        volume = Volume(tmp_path, hub)
        code, out, _ = volume.pull()
        assert code == 0
        assert "verified the size only files=3 total=3" in out
        assert volume.complete()
        flip_last_byte(volume.folder / WEIGHTS)
        assert volume.pull()[0] == 0, "its checksum is known after the first pull"
    assert (volume.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


@pytest.mark.fault("The hub's library reports success wrongly",
                   "Every file is verified; one retry, then exit code 4.")
def test_files_of_the_library_are_verified(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that reports success, first with a missing and a wrong file, then with correct files."""
    rounds: list[list[str]] = []

    def download(_settings: Settings, _endpoint: str, directory: Path, _selected: Sequence[ModelFile],
                 needed: Sequence[ModelFile], _report: Report) -> None:
        rounds.append([file.path for file in needed])
        for file in needed:
            if len(rounds) == 1 and file.path == "tokenizer.json":
                continue
            shutil.copy(model / file.path, directory / file.path)
            if file.path == WEIGHTS and len(rounds) <= wrong_rounds:
                flip_last_byte(directory / file.path)

    monkeypatch.setattr(pull, "download", download)
    with Hub({MODEL: model}) as hub:
        volume = Volume(tmp_path, hub)
        wrong_rounds = 2
        with pytest.raises(ModelUnavailableError, match=WEIGHTS) as caught:
            volume.pull_here()
        assert caught.value.code == "hub_checksum_mismatch"
        assert rounds == [["config.json", WEIGHTS, "tokenizer.json"], [WEIGHTS, "tokenizer.json"]]
        assert not (volume.folder / WEIGHTS).exists()
        assert not volume.complete()
        rounds.clear()
        wrong_rounds = 1
        volume.pull_here()
    assert rounds == [[WEIGHTS], [WEIGHTS]]
    assert volume.complete()


@pytest.mark.fault("The hub lists a path with `../`", "Only the listing is requested, and nothing is written.")
def test_unsafe_path_is_rejected_before_a_download(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, fault="traversal") as hub:
        volume = Volume(tmp_path, hub)
        with pytest.raises(ModelUnavailableError, match=r"escape\.json"):
            volume.pull_here()
        assert len(hub.requests) == 1
    assert not list(tmp_path.rglob("escape.json"))
    assert not volume.folder.exists()


@pytest.mark.fault("Two containers on one volume",
                   "One downloads; the other waits with a log line and then uses the complete model.")
def test_concurrent_pulls_download_the_weights_once(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, bytes_per_second=50_000) as hub:
        volume = Volume(tmp_path, hub)
        with volume.start() as one:
            assert one.stdout is not None
            out = one.stdout.readline()  # holds the lock
            with volume.start() as two:
                assert two.stdout is not None
                out += two.stdout.readline()
                hub.bytes_per_second = 0
                out += one.stdout.read() + two.stdout.read()
        assert (one.returncode, two.returncode) == (0, 0)
        assert hub.downloads(WEIGHTS).count("") == 1
    assert out.count("Waiting for another pull") == 1


@pytest.mark.fault("The model requires remote code (`auto_map`)", "An error unless TRUST_REMOTE_CODE.")
def test_remote_code_requires_trust(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "remote"
    shutil.copytree(model, folder)
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "modeling.Model"}}')
    with Hub({MODEL: folder}) as hub:
        with pytest.raises(ModelUnavailableError) as caught:
            Volume(tmp_path, hub).pull_here()
        assert caught.value.code == "remote_code_required"
        assert "TRUST_REMOTE_CODE=yes" in caught.value.remedy
        assert "" not in hub.downloads("config.json"), "downloaded instead of inspected"
        trusting = Volume(tmp_path, hub, TRUST_REMOTE_CODE="yes")
        assert trusting.pull()[0] == 0
    assert (trusting.folder / "modeling.py").exists()
    assert not (trusting.folder / "pytorch_model.bin").exists()
    complete = settings.load({**trusting.environment, "TRUST_REMOTE_CODE": "no"})
    local = settings.load({"MODEL_SOURCE": "local", "MODEL_ID": str(trusting.folder)})
    for distrusting in (complete, local):
        with pytest.raises(ModelUnavailableError) as caught:
            pull.pull(distrusting, lambda _: None)
        assert caught.value.code == "remote_code_required"


@pytest.mark.fault("Too little free space for the model", "Reported before the first byte.")
def test_too_small_volume_is_reported_before_the_first_byte(tmp_path: Path, model: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    status = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*status[:4], 0, *status[5:])))
    with Hub({MODEL: model}) as hub, pytest.raises(ModelUnavailableError, match=r"4 MiB.*0 B") as caught:
        Volume(tmp_path, hub).pull_here()
    assert caught.value.code == "volume_too_small"
    assert hub.downloads(WEIGHTS) == []


def test_local_folder_is_used_in_place(tmp_path: Path, model: Path) -> None:
    local = settings.load({"MODEL_SOURCE": "local", "MODEL_ID": str(model), "MODELS_DIR": str(tmp_path / "none")})
    ref = model_reference(local)
    assert pull.locate(local.models_dir, ref) == pull.pull(local, lambda _: None) == model.resolve()
    assert isinstance(pull.hub_files(local, ref), LocalFiles)
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelUnavailableError, match=str(folder)) as caught:
            pull.locate(tmp_path, ModelRef(str(folder), "local", "master"))
        assert caught.value.code == "invalid_model_folder"


def test_store_does_not_import_the_hubs_library() -> None:
    code = "import sys, shoehorn.store.pull; sys.exit(any(name.startswith('modelscope') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(Path(pull.__file__).parents[2])},
                          check=False).returncode == 0
