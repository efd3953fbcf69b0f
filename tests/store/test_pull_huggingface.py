"""The store with Hugging Face: the real `huggingface_hub` against a stand-in of the hub, broken and whole."""

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
from shoehorn.hub.huggingface import HuggingFaceHub as Client
from shoehorn.model.files import LocalFiles
from shoehorn.store import inventory, manifest, pull
from support.pulling import MODEL, WEIGHTS, WEIGHTS_BYTES, Volume, stop_when_arrived, write_model

pytestmark = pytest.mark.process

TOKEN = "hf_canary-123456789"  # a canary, looked for in everything that is written


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A home whose volume holds the complete model. Copy it, do not change it."""
    home = tmp_path_factory.mktemp("pulled")
    with HuggingFaceHub({MODEL: model}) as hub:
        code, _, err = Volume(home, hub).pull()
    assert (code, err) == (0, "")
    return home


@pytest.fixture
def volume(pulled: Path, tmp_path: Path) -> Volume:
    """A volume of its own with the complete model, without a hub."""
    shutil.copytree(pulled, tmp_path / "home")
    return Volume(tmp_path / "home", MODEL_SOURCE="huggingface")


def test_the_stand_in_is_understood_by_the_real_client(model: Path) -> None:
    program = """
import sys, huggingface_hub as library
api = library.HfApi(endpoint=sys.argv[1], token=False)
info = api.model_info("owner/tiny", revision="main")
print(info.sha)
for file in api.list_repo_tree("owner/tiny", revision=info.sha, recursive=True):
    print(file.path, file.size, file.lfs.sha256 if file.lfs else file.blob_id)
told = library.get_hf_file_metadata(library.hf_hub_url("owner/tiny", "model.safetensors", endpoint=sys.argv[1]))
print(told.commit_hash, told.etag, told.size)
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


def test_a_pull_fetches_what_serving_needs_at_one_commit(pulled: Path, model: Path) -> None:
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


def test_a_complete_model_asks_no_hub(volume: Volume) -> None:
    assert volume.complete()
    assert volume.pull_here() == []
    assert isinstance(pull.hub_files(volume.settings, volume.ref), LocalFiles)


def test_a_manifest_of_before_commits_were_kept_is_still_good(volume: Volume) -> None:
    document = json.loads(volume.manifest.read_text())
    del document["commit"], document["source"]
    for file in document["files"]:
        del file["blob_id"]
    volume.manifest.write_text(json.dumps({**document, "revision": "master"}))
    assert Volume(volume.models.parent).complete(), "from ModelScope, at its branch"
    assert not volume.complete(), "not from another hub"


def test_what_both_hubs_have_is_not_fetched_twice(volume: Volume, model: Path) -> None:
    volume.manifest.unlink()
    with Hub({MODEL: model}) as hub:
        Volume(volume.models.parent, hub).pull_here()
        assert hub.downloads("tokenizer.json") == []
        assert "blob_id\": \"\"" in volume.manifest.read_text()
    with HuggingFaceHub({MODEL: model}) as hub:
        Volume(volume.models.parent, hub).pull_here()
        assert hub.downloads("tokenizer.json") == [], "whose blob id is computed from what lies there"
    assert volume.complete()


def test_planning_reads_ranges_only(tmp_path: Path, model: Path) -> None:
    with HuggingFaceHub({MODEL: model}, fault="pages") as hub:
        volume = Volume(tmp_path, hub)
        files = pull.hub_files(volume.settings, volume.ref)
        assert len(files.names()) == 6, "all pages"
        assert files.read(WEIGHTS, 8, 4) == (model / WEIGHTS).read_bytes()[8:12]
        assert hub.downloads(WEIGHTS) == ["bytes=8-11"]


@pytest.mark.fault("`kill -9` of a pull (Hugging Face)",
                   "Half a model is none; the next pull goes on where it stopped.")
def test_a_killed_pull_goes_on_where_it_stopped(tmp_path: Path, model: Path) -> None:
    with HuggingFaceHub({MODEL: model}) as hub:
        hub.hold_at_bytes = 2 << 20
        volume = Volume(tmp_path, hub)
        with volume.start("--json") as process:
            stop_when_arrived(process, 1 << 20)
        assert pull.locate(volume.settings.models_dir, volume.ref) is None, "half a model is no model"
        arrived = (volume.folder / f"{WEIGHTS}.incomplete").stat().st_size
        hub.hold_at_bytes = 0
        assert volume.pull()[0] == 0
        assert hub.downloads(WEIGHTS)[-1] == f"bytes={arrived}-", "no byte that is on the disk comes twice"
        assert arrived >= 1 << 20
        assert hub.downloads("tokenizer.json").count("") == 1
    assert (volume.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert not list(volume.folder.glob("*.incomplete"))


@pytest.mark.parametrize("fault", ["cut", "reset", "busy", "down"])
@pytest.mark.fault("The hub answers 429 then 200, cuts, resets", "Tried again with growing pauses; the pull ends well.")
def test_what_passes_is_got_over(tmp_path: Path, model: Path, fault: str) -> None:
    with HuggingFaceHub({MODEL: model}, fault=fault) as hub:
        volume = Volume(tmp_path, hub)
        code, out, err = volume.pull()
        assert (code, err) == (0, ""), out
        assert len([span for span in hub.downloads(WEIGHTS) if not span.startswith("bytes=0-")]) == 2
    assert volume.complete()


@pytest.mark.fault("Hugging Face's storage ignores Range", "Fetched from the start; the result is the same.")
def test_a_hub_that_ignores_ranges_costs_bytes_only(tmp_path: Path, model: Path) -> None:
    with HuggingFaceHub({MODEL: model}, fault="norange") as hub:
        volume = Volume(tmp_path, hub)
        volume.folder.mkdir(parents=True)
        (volume.folder / f"{WEIGHTS}.incomplete").write_bytes(bytes(1000))
        assert volume.pull()[0] == 0
    assert (volume.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


@pytest.mark.parametrize("length", [1000, WEIGHTS_BYTES * 2], ids=["short", "long"])
@pytest.mark.fault("A partial file of something else", "Not trusted; fetched anew.")
def test_a_partial_file_of_something_else_is_not_kept(tmp_path: Path, model: Path, length: int) -> None:
    with HuggingFaceHub({MODEL: model}) as hub:
        volume = Volume(tmp_path, hub)
        volume.folder.mkdir(parents=True)
        (volume.folder / f"{WEIGHTS}.incomplete").write_bytes(b"x" * length)
        assert volume.pull()[0] == 0
    assert (volume.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


@pytest.mark.parametrize(("fault", "name"), [("flip", WEIGHTS), ("mislabelled", "tokenizer.json")])
def test_wrong_bytes_are_refused_and_not_kept(tmp_path: Path, model: Path, fault: str, name: str) -> None:
    with HuggingFaceHub({MODEL: model}, fault=fault) as hub:
        volume = Volume(tmp_path, hub)
        code, _, err = volume.pull()
    assert code == 4
    assert "came twice with a wrong size or checksum" in err
    assert name in err
    assert "HF_ENDPOINT" in err
    assert not volume.complete()
    assert not (volume.folder / name).exists()


def test_a_file_larger_than_one_answer_comes_in_pieces(tmp_path: Path, model: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    piece = 1_000_000
    monkeypatch.setattr(huggingface_download, "_PIECE_BYTES", piece)
    with HuggingFaceHub({MODEL: model}) as hub, Client(*Volume(tmp_path, hub).hub_arguments) as client:
        settings = Volume(tmp_path, hub).settings
        size = client.names()[WEIGHTS]
        library = huggingface_download._library(settings, client)
        url = library.hf_hub_url(MODEL, WEIGHTS, revision=client.commit, endpoint=client.endpoint)
        (tmp_path / f"{WEIGHTS}.incomplete").write_bytes((model / WEIGHTS).read_bytes()[:piece + 7])
        huggingface_download._fetch(library, url, {}, tmp_path / WEIGHTS, size, lambda _: None)
        assert hub.downloads(WEIGHTS) == [f"bytes={piece + 7}-{2 * piece - 1}", f"bytes={2 * piece}-{3 * piece - 1}",
                                          f"bytes={3 * piece}-{4 * piece - 1}", f"bytes={4 * piece}-{size - 1}"]
    assert (tmp_path / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


def test_a_path_that_leaves_the_folder_is_refused_before_anything_is_fetched(tmp_path: Path, model: Path) -> None:
    with HuggingFaceHub({MODEL: model}, fault="traversal") as hub:
        volume = Volume(tmp_path, hub)
        with pytest.raises(ModelUnavailableError, match=r"escape\.json"):
            volume.pull_here()
        assert len(hub.requests) == 2
    assert not list(tmp_path.rglob("escape.json"))
    assert not volume.folder.exists()


def test_a_file_that_is_listed_but_not_given_is_named(tmp_path: Path, model: Path) -> None:
    with HuggingFaceHub({MODEL: model}, fault="absent") as hub:
        code, _, err = Volume(tmp_path, hub).pull()
    assert code == 4
    assert f"does not have {WEIGHTS}" in err


@pytest.mark.parametrize(("fault", "cause", "remedy"), [
    ("401", "no model owner/tiny, or does not let us read it", "HF_TOKEN"), ("403", "does not let us read", "HF_TOKEN"),
    ("404", f"no model {MODEL} at revision main", "Check MODEL_ID"), ("429", "answered 429", "later"),
    ("503", "answered 503", "later")])
def test_a_refusal_says_what_to_do(tmp_path: Path, model: Path, fault: str, cause: str, remedy: str) -> None:
    with HuggingFaceHub({MODEL: model}, fault=fault) as hub, \
            pytest.raises(ModelUnavailableError, match=cause) as refusal:
        Client(*Volume(tmp_path, hub).hub_arguments).names()
    assert remedy in refusal.value.remedy


@pytest.mark.parametrize(("fault", "words"), [("401", "does not let us read"), ("403", "does not let us read"),
                                              ("404", "lists but does not have"), ("503", "the hub answered 503")])
def test_a_refusal_during_the_download_is_told_in_words(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch,
                                                        fault: str, words: str) -> None:
    monkeypatch.setattr(huggingface_download, "_MOST_TRIES", 1)
    with HuggingFaceHub({MODEL: model}) as hub, Client(*Volume(tmp_path, hub).hub_arguments) as client:
        wanted = [file for file in client.listing() if file.path == WEIGHTS]
        hub.faults.add(fault)
        with pytest.raises(ModelUnavailableError, match=words) as refusal:
            huggingface_download.download(Volume(tmp_path, hub).settings, client, tmp_path / "model", wanted)
    assert WEIGHTS in refusal.value.cause


def test_the_token_goes_to_the_hub_and_not_where_it_redirects(tmp_path: Path, model: Path) -> None:
    with HuggingFaceHub({MODEL: model}) as storage, HuggingFaceHub(
            {MODEL: model}, token=TOKEN, redirect=storage.url.replace("127.0.0.1", "localhost")) as hub:
        volume = Volume(tmp_path, hub, HF_TOKEN=TOKEN)
        with Client(*volume.hub_arguments) as client:
            assert client.read(WEIGHTS, 0, 8) == (model / WEIGHTS).read_bytes()[:8]
        code, out, err = volume.pull("--json")
        assert code == 0, err
        assert storage.downloads(WEIGHTS)[-1] == ""
        assert TOKEN not in str(storage.requests)
        assert TOKEN in str(hub.requests)
    assert TOKEN not in out + err
    assert "Signature" not in out + err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_the_token_reaches_a_pull_as_a_file(tmp_path: Path, model: Path) -> None:
    with HuggingFaceHub({MODEL: model}, token=TOKEN) as hub:
        volume = Volume(tmp_path, hub, HF_TOKEN=TOKEN)
        (tmp_path / "run").mkdir()
        volume.environment = serve._without_secrets(volume.settings, volume.environment)
        assert TOKEN not in str(volume.environment)
        assert Path(volume.environment["HF_TOKEN_FILE"]).stat().st_mode & 0o777 == 0o600
        assert volume.pull()[0] == 0
        assert TOKEN not in repr(volume.settings)


def test_without_the_token_the_setting_is_named(tmp_path: Path, model: Path) -> None:
    with HuggingFaceHub({MODEL: model}, token=TOKEN) as hub:
        code, _, err = Volume(tmp_path, hub).pull()
    assert code == 4
    assert "HF_TOKEN" in err


def test_the_manifest_tells_a_source_from_another(volume: Volume) -> None:
    found = manifest.read(volume.models, volume.ref)
    assert found is not None
    assert found.matches(volume.ref)
    assert not found.matches(Volume(volume.models.parent, MODEL_REVISION="main").ref)
