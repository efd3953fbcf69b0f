"""Pulls from a stand-in of Hugging Face with the real `huggingface_hub`: complete and interrupted ones."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.hf_hub import HuggingFaceHub
from fakes.hub import Hub, blob_id, commit_of
from shoehorn.commands import serve
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.hub import huggingface_download
from shoehorn.hub.huggingface import HuggingFaceRepository
from shoehorn.model.files import LocalFiles
from shoehorn.store import inventory, manifest, pull
from support.pulling import MODEL, WEIGHTS, WEIGHTS_BYTES, Volume, stop_when_arrived, write_model

pytestmark = pytest.mark.process

TOKEN = "hf_canary-123456789"  # a canary that must not be written anywhere


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Return a home whose volume contains the complete model; to be copied, not changed."""
    home = tmp_path_factory.mktemp("pulled")
    with HuggingFaceHub({MODEL: model}) as hub:
        code, _, err = Volume(home, hub).pull()
    assert (code, err) == (0, "")
    return home


@pytest.fixture
def volume(pulled: Path, tmp_path: Path) -> Volume:
    """Return a separate volume with the complete model, without a hub."""
    shutil.copytree(pulled, tmp_path / "home")
    return Volume(tmp_path / "home", MODEL_SOURCE="huggingface")


def test_real_client_accepts_the_fake_hub(model: Path) -> None:
    program = """
import sys, huggingface_hub as library
api = library.HfApi(endpoint=sys.argv[1], token=False)
info = api.model_info("owner/tiny", revision="main")
print(info.sha)
for file in api.list_repo_tree("owner/tiny", revision=info.sha, recursive=True):
    print(file.path, file.size, file.lfs.sha256 if file.lfs else file.blob_id)
metadata = library.get_hf_file_metadata(library.hf_hub_url("owner/tiny", "model.safetensors", endpoint=sys.argv[1]))
print(metadata.commit_hash, metadata.etag, metadata.size)
try:
    api.model_info("owner/other")
except library.errors.RepositoryNotFoundError:
    print("absent")
"""
    with HuggingFaceHub({MODEL: model}) as hub:
        out = subprocess.run([sys.executable, "-c", program, hub.url], check=True, capture_output=True, text=True,
                             timeout=60, env={**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1"}).stdout.splitlines()
    digest = hashlib.sha256((model / WEIGHTS).read_bytes()).hexdigest()
    size = (model / WEIGHTS).stat().st_size
    assert out[0] == commit_of(model)
    assert f"{WEIGHTS} {size} {digest}" in out
    assert f"tokenizer.json 2 {blob_id(b'{}')}" in out
    assert out[-2:] == [f"{commit_of(model)} {digest} {size}", "absent"]


def test_pull_downloads_the_selected_files_of_one_commit(pulled: Path, model: Path) -> None:
    volume = Volume(pulled, MODEL_SOURCE="huggingface")
    assert sorted(path.name for path in volume.folder.iterdir()) == ["config.json", WEIGHTS, "tokenizer.json"]
    assert (volume.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert not [path for path in pulled.rglob("*") if path.is_symlink()]
    document = json.loads(volume.manifest.read_text())
    assert (document["complete"], document["commit"], document["revision"], document["source"]) == (
        True, commit_of(model), "main", "huggingface")
    assert {file["path"]: (file["sha256"], file["blob_id"]) for file in document["files"]} == {
        name: (hashlib.sha256((model / name).read_bytes()).hexdigest(),
               "" if name == WEIGHTS else blob_id((model / name).read_bytes()))
        for name in ("config.json", WEIGHTS, "tokenizer.json")}
    assert [stored.commit for stored in inventory.models(volume.models)] == [commit_of(model)]
    assert (pulled / "run" / "huggingface").stat().st_mode & 0o777 == 0o700


def test_complete_model_needs_no_hub(volume: Volume) -> None:
    assert volume.complete()
    assert volume.pull_here() == []
    assert isinstance(pull.hub_files(volume.settings, volume.ref), LocalFiles)


def test_manifest_without_commits_is_still_valid(volume: Volume) -> None:
    document = json.loads(volume.manifest.read_text())
    del document["commit"], document["source"]
    for file in document["files"]:
        del file["blob_id"]
    volume.manifest.write_text(json.dumps({**document, "revision": "master"}))
    assert Volume(volume.models.parent).complete(), "valid for ModelScope at its branch"
    assert not volume.complete(), "valid for another hub"


def test_file_of_both_hubs_is_downloaded_once(volume: Volume, model: Path) -> None:
    volume.manifest.unlink()
    with Hub({MODEL: model}) as hub:
        Volume(volume.models.parent, hub).pull_here()
        assert hub.downloads("tokenizer.json") == []
        assert "blob_id\": \"\"" in volume.manifest.read_text()
    with HuggingFaceHub({MODEL: model}) as hub:
        Volume(volume.models.parent, hub).pull_here()
        assert hub.downloads("tokenizer.json") == [], "the blob id of the stored file matches"
    assert volume.complete()


def test_planning_reads_ranges_only(tmp_path: Path, model: Path) -> None:
    with HuggingFaceHub({MODEL: model}, fault="pages") as hub:
        volume = Volume(tmp_path, hub)
        files = pull.hub_files(volume.settings, volume.ref)
        assert len(files.names()) == 6, "all pages"
        assert files.read(WEIGHTS, 8, 4) == (model / WEIGHTS).read_bytes()[8:12]
        assert hub.downloads(WEIGHTS) == ["bytes=8-11"]


@pytest.mark.fault("`kill -9` of a pull (Hugging Face)",
                   "An incomplete model is not served; the next pull resumes.")
def test_killed_pull_is_resumed(tmp_path: Path, model: Path) -> None:
    with HuggingFaceHub({MODEL: model}) as hub:
        hub.hold_at_bytes = 2 << 20
        volume = Volume(tmp_path, hub)
        with volume.start("--json") as process:
            stop_when_arrived(process, 1 << 20)
        assert pull.locate(volume.settings.models_dir, volume.ref) is None, "incomplete model is served"
        received = (volume.folder / f"{WEIGHTS}.incomplete").stat().st_size
        hub.hold_at_bytes = 0
        assert volume.pull()[0] == 0
        assert hub.downloads(WEIGHTS)[-1] == f"bytes={received}-", "stored bytes were downloaded again"
        assert received >= 1 << 20
        assert hub.downloads("tokenizer.json").count("") == 1
    assert (volume.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert not list(volume.folder.glob("*.incomplete"))


@pytest.mark.parametrize("fault", ["cut", "reset", "busy", "down"])
@pytest.mark.fault("The hub returns 429 then 200, cuts, resets", "Retried with growing delays; the pull succeeds.")
def test_transient_errors_are_retried(tmp_path: Path, model: Path, fault: str) -> None:
    with HuggingFaceHub({MODEL: model}, fault=fault) as hub:
        volume = Volume(tmp_path, hub)
        code, out, err = volume.pull()
        assert (code, err) == (0, ""), out
        assert len([span for span in hub.downloads(WEIGHTS) if not span.startswith("bytes=0-")]) == 2
    assert volume.complete()


@pytest.mark.fault("Hugging Face's storage ignores Range", "Downloaded from the start; the result is the same.")
def test_hub_that_ignores_ranges_costs_only_bytes(tmp_path: Path, model: Path) -> None:
    with HuggingFaceHub({MODEL: model}, fault="norange") as hub:
        volume = Volume(tmp_path, hub)
        volume.folder.mkdir(parents=True)
        (volume.folder / f"{WEIGHTS}.incomplete").write_bytes(bytes(1000))
        assert volume.pull()[0] == 0
    assert (volume.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


@pytest.mark.parametrize("length", [1000, WEIGHTS_BYTES * 2], ids=["short", "long"])
@pytest.mark.fault("A partial file of other content", "Discarded; downloaded from the start.")
def test_partial_file_of_other_content_is_discarded(tmp_path: Path, model: Path, length: int) -> None:
    with HuggingFaceHub({MODEL: model}) as hub:
        volume = Volume(tmp_path, hub)
        volume.folder.mkdir(parents=True)
        (volume.folder / f"{WEIGHTS}.incomplete").write_bytes(b"x" * length)
        assert volume.pull()[0] == 0
    assert (volume.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


@pytest.mark.parametrize(("fault", "name"), [("flip", WEIGHTS), ("mislabelled", "tokenizer.json")])
def test_wrong_bytes_are_rejected_and_deleted(tmp_path: Path, model: Path, fault: str, name: str) -> None:
    with HuggingFaceHub({MODEL: model}, fault=fault) as hub:
        volume = Volume(tmp_path, hub)
        code, _, err = volume.pull()
    assert code == 4
    assert "mismatch in two downloads" in err
    assert name in err
    assert "HF_ENDPOINT" in err
    assert not volume.complete()
    assert not (volume.folder / name).exists()


def test_file_larger_than_one_response_is_requested_in_ranges(tmp_path: Path, model: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    step = 1_000_000
    monkeypatch.setattr(huggingface_download, "_RANGE_BYTES", step)
    with HuggingFaceHub({MODEL: model}) as hub, HuggingFaceRepository(*Volume(tmp_path, hub).hub_arguments) as client:
        settings = Volume(tmp_path, hub).settings
        size = client.names()[WEIGHTS]
        library = huggingface_download._library(settings, client)
        url = library.hf_hub_url(MODEL, WEIGHTS, revision=client.commit, endpoint=client.endpoint)
        (tmp_path / f"{WEIGHTS}.incomplete").write_bytes((model / WEIGHTS).read_bytes()[:step + 7])
        huggingface_download._fetch(library, url, {}, tmp_path / WEIGHTS, size, lambda _: None)
        assert hub.downloads(WEIGHTS) == [f"bytes={step + 7}-{2 * step - 1}", f"bytes={2 * step}-{3 * step - 1}",
                                          f"bytes={3 * step}-{4 * step - 1}", f"bytes={4 * step}-{size - 1}"]
    assert (tmp_path / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


def test_unsafe_path_is_rejected_before_a_download(tmp_path: Path, model: Path) -> None:
    with HuggingFaceHub({MODEL: model}, fault="traversal") as hub:
        volume = Volume(tmp_path, hub)
        with pytest.raises(ModelUnavailableError, match=r"escape\.json"):
            volume.pull_here()
        assert len(hub.requests) == 2
    assert not list(tmp_path.rglob("escape.json"))
    assert not volume.folder.exists()


def test_listed_but_missing_file_is_named(tmp_path: Path, model: Path) -> None:
    with HuggingFaceHub({MODEL: model}, fault="absent") as hub:
        code, _, err = Volume(tmp_path, hub).pull()
    assert code == 4
    assert f"{WEIGHTS}: listed by the hub, but not found" in err


@pytest.mark.parametrize(("fault", "code", "remedy"), [
    ("401", "hub_not_found", "HF_TOKEN"), ("403", "hub_permission_denied", "HF_TOKEN"),
    ("404", "hub_not_found", "Check MODEL_ID"), ("429", "hub_error", "later"), ("503", "hub_error", "later")])
def test_error_status_has_a_code_and_a_remedy(tmp_path: Path, model: Path, fault: str, code: str, remedy: str) -> None:
    with HuggingFaceHub({MODEL: model}, fault=fault) as hub, pytest.raises(ModelUnavailableError) as caught:
        HuggingFaceRepository(*Volume(tmp_path, hub).hub_arguments).names()
    assert caught.value.code == code
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(("fault", "code"), [
    ("401", "hub_permission_denied"), ("403", "hub_permission_denied"), ("404", "hub_file_not_found"),
    ("503", "hub_download_interrupted")])
def test_error_status_during_the_download_has_a_code(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch,
                                                     fault: str, code: str) -> None:
    monkeypatch.setattr(huggingface_download, "_MAX_ATTEMPTS", 1)
    with HuggingFaceHub({MODEL: model}) as hub, HuggingFaceRepository(*Volume(tmp_path, hub).hub_arguments) as client:
        selected = [file for file in client.listing() if file.path == WEIGHTS]
        hub.faults.add(fault)
        with pytest.raises(ModelUnavailableError, match=WEIGHTS) as caught:
            huggingface_download.download(Volume(tmp_path, hub).settings, client, tmp_path / "model", selected)
    assert caught.value.code == code


def test_token_is_sent_to_the_hub_but_not_to_redirect_targets(tmp_path: Path, model: Path) -> None:
    with HuggingFaceHub({MODEL: model}) as storage, HuggingFaceHub(
            {MODEL: model}, token=TOKEN, redirect=storage.url.replace("127.0.0.1", "localhost")) as hub:
        volume = Volume(tmp_path, hub, HF_TOKEN=TOKEN)
        with HuggingFaceRepository(*volume.hub_arguments) as client:
            assert client.read(WEIGHTS, 0, 8) == (model / WEIGHTS).read_bytes()[:8]
        code, out, err = volume.pull("--json")
        assert code == 0, err
        assert storage.downloads(WEIGHTS)[-1] == ""
        assert TOKEN not in str(storage.requests)
        assert TOKEN in str(hub.requests)
    assert TOKEN not in out + err
    assert "Signature" not in out + err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_token_is_passed_to_a_pull_as_a_file(tmp_path: Path, model: Path) -> None:
    with HuggingFaceHub({MODEL: model}, token=TOKEN) as hub:
        volume = Volume(tmp_path, hub, HF_TOKEN=TOKEN)
        (tmp_path / "run").mkdir()
        volume.environment = serve._without_secrets(volume.settings, volume.environment)
        assert TOKEN not in str(volume.environment)
        assert Path(volume.environment["HF_TOKEN_FILE"]).stat().st_mode & 0o777 == 0o600
        assert volume.pull()[0] == 0
        assert TOKEN not in repr(volume.settings)


def test_missing_token_names_the_setting(tmp_path: Path, model: Path) -> None:
    with HuggingFaceHub({MODEL: model}, token=TOKEN) as hub:
        code, _, err = Volume(tmp_path, hub).pull()
    assert code == 4
    assert "HF_TOKEN" in err


def test_manifest_matches_its_source_only(volume: Volume) -> None:
    stored = manifest.read(volume.models, volume.ref)
    assert stored is not None
    assert stored.matches(volume.ref)
    assert not stored.matches(Volume(volume.models.parent, MODEL_REVISION="main").ref)
