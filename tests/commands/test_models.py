"""`shoehorn models`, `pull --verify`, `pull --to` and OFFLINE: a volume without requests to the hub."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fakes.hub import Hub
from shoehorn import cli
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.model.files import LocalFiles
from shoehorn.model.reference import ModelRef
from shoehorn.store import inventory, manifest, pull
from support.pulling import MODEL, WEIGHTS, WEIGHTS_BYTES, Volume, write_model, write_weights

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub({MODEL: write_model(tmp_path_factory.mktemp("hub") / "model")}) as running:
        yield running


@pytest.fixture
def volume(tmp_path: Path, hub: Hub) -> Volume:
    pulled = Volume(tmp_path, hub)
    assert pulled.pull()[0] == 0
    return pulled


def shoehorn(volume: Volume, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    for name, value in volume.environment.items():
        monkeypatch.setenv(name, value)
    return cli.main(words)


def test_models_are_listed_with_size_state_and_last_use(
        volume: Volume, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert shoehorn(volume, monkeypatch, "models", "--json") == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["model"], row["revision"], row["complete"], row["last_used"], row["in_use"]) == (
        MODEL, "master", True, None, False)
    assert row["bytes"] == sum(path.stat().st_size for path in volume.folder.iterdir()) > WEIGHTS_BYTES - 1024
    with inventory.use_lock(volume.models, MODEL):
        assert shoehorn(volume, monkeypatch, "models") == 0
        assert "in use" in capsys.readouterr().out
    assert shoehorn(volume, monkeypatch, "models") == 0
    text = capsys.readouterr().out
    assert "complete" in text
    assert "last served 20" in text


def test_empty_volume_and_damaged_manifest_are_accepted(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    volume = Volume(tmp_path)
    volume.manifest.parent.mkdir(parents=True)
    volume.manifest.write_text('{"model": "../../etc", "revision": "x", "complete": true}')
    assert shoehorn(volume, monkeypatch, "models") == 0
    assert ": no models" in capsys.readouterr().out


def test_removal_frees_the_space(
        volume: Volume, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert shoehorn(volume, monkeypatch, "models", "rm", MODEL) == 0
    assert f"removed {MODEL}: 4 MiB freed" in capsys.readouterr().out
    assert not volume.folder.exists()
    assert inventory.models(volume.models) == []


@pytest.mark.fault("`shoehorn models rm` of a model in use", "Refused; nothing is removed.")
def test_model_in_use_being_pulled_or_unknown_is_not_removed(
        volume: Volume, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with inventory.use_lock(volume.models, MODEL):
        assert shoehorn(volume, monkeypatch, "models", "rm", MODEL) == 4
    assert "in use" in capsys.readouterr().err
    from shoehorn.store import locks as volumes

    with volumes.write_lock(volume.models, MODEL):
        assert shoehorn(volume, monkeypatch, "models", "rm", MODEL) == 4
    assert "being pulled" in capsys.readouterr().err
    for name in ("owner/other", "../outside", "."):
        assert shoehorn(volume, monkeypatch, "models", "rm", name) == 4
    assert f"Choose one of: {MODEL}." in capsys.readouterr().err
    assert volume.complete()


def test_use_lock_is_shared_and_optional_on_a_read_only_volume(volume: Volume, tmp_path: Path) -> None:
    with inventory.use_lock(volume.models, MODEL), inventory.use_lock(volume.models, MODEL):
        assert inventory.models(volume.models)[0].in_use
    (tmp_path / "file").write_text("")
    with inventory.use_lock(tmp_path / "file", MODEL):
        pass


@pytest.mark.fault("A bit flips on the disk", "`shoehorn pull --verify` reads every byte and names the file.")
def test_verify_reads_every_byte_and_names_changed_files(volume: Volume, hub: Hub) -> None:
    assert volume.pull("--verify")[0] == 0
    path = volume.folder / WEIGHTS
    times = path.stat()
    write_weights(path, fill=1)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert volume.complete(), "size and time are as before, which a cheap look believes"
    code, _, err = volume.pull("--verify")
    assert code == 4
    assert f"{WEIGHTS}: size or SHA-256 mismatch" in err
    assert not volume.complete()
    hub.requests.clear()
    assert volume.pull()[0] == 0
    fetched = [request.path for request in hub.requests if "FilePath=" in request.path]
    assert any(WEIGHTS in path for path in fetched)
    assert not any("tokenizer.json" in path for path in fetched), "only changed files are downloaded"
    assert volume.pull("--verify")[0] == 0


def test_verify_of_a_missing_model_has_a_remedy(tmp_path: Path) -> None:
    code, _, err = Volume(tmp_path).pull("--verify")
    assert code == 4
    assert f"shoehorn pull {MODEL}" in err


def test_offline_serves_a_copied_volume_without_requests(volume: Volume, tmp_path: Path, hub: Hub) -> None:
    carried = tmp_path / "stick"
    assert volume.pull("--to", str(carried))[0] == 0
    hub.requests.clear()
    away = Volume(tmp_path, hub, OFFLINE="yes", MODELS_DIR=str(carried))
    assert away.pull() == (0, f"{carried / MODEL}\n", "")
    (carried / MODEL / WEIGHTS).unlink()
    code, _, err = away.pull()
    assert code == 4
    assert "OFFLINE=yes" in err
    assert hub.requests == []


def test_offline_plan_for_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailableError, match="OFFLINE=yes"):
        pull.hub_files(Volume(tmp_path, OFFLINE="yes").settings, ModelRef(MODEL, "modelscope", "master"))


def test_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = Volume(tmp_path).pull("--to", str(tmp_path / "file" / "x"))
    assert code == 4
    assert str(tmp_path / "file") in err


@pytest.fixture
def carried(volume: Volume, tmp_path: Path) -> Volume:
    """The user of a folder that was pulled elsewhere and copied here."""
    stick = tmp_path / "stick"
    assert volume.pull("--to", str(stick))[0] == 0
    shutil.copytree(stick, tmp_path / "here" / "models")
    away = Volume(tmp_path / "here", OFFLINE="yes", MODEL_SOURCE="local",
                  MODEL_ID=str(tmp_path / "here" / "models" / MODEL))
    assert pull.locate(away.settings.models_dir, away.ref) == away.folder
    return away


@pytest.mark.fault("A model that was copied to another machine differs from what was pulled",
                   "Exit code 4 and the file's name; an unfinished pull counts as missing.")
@pytest.mark.parametrize("damage", ["flipped", "short", "absent", "stranger", "half", "no manifest"])
def test_copied_model_is_checked_against_its_manifest(carried: Volume, damage: str) -> None:
    weights, words = carried.folder / WEIGHTS, WEIGHTS
    if damage == "flipped":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    elif damage == "short":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "absent":
        (carried.folder / "tokenizer.json").unlink()
        words = "tokenizer.json"
    elif damage == "stranger":
        write_weights(carried.folder / "other.safetensors")
        words = "other.safetensors"
    else:
        begun = json.loads(carried.manifest.read_text()) | {"complete": False}
        carried.manifest.write_text(json.dumps(begun) if damage == "half" else "half a")
        words = "did not finish"
    code, out, err = carried.pull()
    assert code == 4
    assert words in err
    assert "Traceback" not in out + err
    with suppress(ModelUnavailableError):  # or it has to be read first
        assert pull.locate(carried.settings.models_dir, carried.ref) is None


def test_copied_model_with_other_times_is_verified_once(carried: Volume) -> None:
    for path in carried.folder.iterdir():
        os.utime(path, ns=(1, 1))
    assert pull.locate(carried.settings.models_dir, carried.ref) is None, "its content decides"
    assert isinstance(pull.hub_files(carried.settings, carried.ref), LocalFiles), "to plan, before that"
    code, out, _ = carried.pull()
    assert code == 0
    assert "verifying" in out
    assert pull.locate(carried.settings.models_dir, carried.ref) == carried.folder
    assert carried.pull("--verify")[0] == 0
    times = (carried.folder / WEIGHTS).stat().st_mtime_ns
    (carried.folder / WEIGHTS).write_bytes(bytes(len((carried.folder / WEIGHTS).read_bytes())))
    os.utime(carried.folder / WEIGHTS, ns=(times, times))
    code, _, err = carried.pull("--verify")
    assert code == 4
    assert f"{carried.folder / WEIGHTS}" in err
    carried.manifest.unlink()
    code, _, err = carried.pull("--verify")
    assert code == 4
    assert "no manifest" in err
    assert carried.pull()[0] == 0, "a folder of one's own"


def test_copied_model_on_a_read_only_folder_is_verified_each_time(carried: Volume,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_arguments: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    os.utime(carried.folder / WEIGHTS, ns=(1, 1))
    monkeypatch.setattr(manifest, "write", write)
    for _ in range(2):
        assert pull.locate(carried.settings.models_dir, carried.ref) is None
        assert carried.pull_here()[-1].phase == "verifying"
