"""The store against a stand-in hub, with the hub's real client: whole pulls, broken ones, and what a start trusts."""

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
from shoehorn.store import pull, selection
from shoehorn.store.reference import model_reference
from support.pulling import MODEL, WEIGHTS, Volume, stop_when_arrived, write_model, write_weights

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A home whose volume holds the complete model. Copy it, do not change it."""
    home = tmp_path_factory.mktemp("pulled")
    with Hub({MODEL: model}) as hub:
        assert Volume(home, hub).pull()[0] == 0
    return home


@pytest.fixture
def volume(pulled: Path, tmp_path: Path) -> Volume:
    """A volume of its own with the complete model, without a hub."""
    shutil.copytree(pulled, tmp_path / "home")
    return Volume(tmp_path / "home")


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_pull_fetches_what_serving_needs_and_nothing_else(pulled: Path, model: Path) -> None:
    volume = Volume(pulled)
    assert sorted(path.name for path in volume.folder.iterdir()) == ["config.json", WEIGHTS, "tokenizer.json"]
    assert (volume.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert sorted(path.name for path in (volume.models / ".shoehorn").iterdir()) == ["locks", "manifests"]
    manifest = json.loads(volume.manifest.read_text())
    assert manifest["complete"] is True
    assert {file["path"]: file["sha256"] for file in manifest["files"]}[WEIGHTS] == hashlib.sha256(
        (model / WEIGHTS).read_bytes()).hexdigest()


def test_a_complete_model_asks_no_hub(volume: Volume, tmp_path: Path) -> None:
    (volume.models / ".shoehorn" / "locks").rename(tmp_path / "locks")
    (volume.models / ".shoehorn" / "locks").touch()  # nor a lock: the volume may be read-only
    assert volume.complete()
    assert volume.pull_here() == []
    assert isinstance(pull.hub_files(volume.settings, volume.ref), LocalFiles)


def test_other_times_are_settled_by_the_content_without_a_hub(volume: Volume) -> None:
    os.utime(volume.folder / WEIGHTS, ns=(1, 1))
    assert not volume.complete()
    assert isinstance(pull.hub_files(volume.settings, volume.ref), LocalFiles), "to plan, before it is settled"
    assert {progress.phase for progress in volume.pull_here()} == {"verifying"}
    assert volume.complete()


@pytest.mark.fault("Power cut during a pull", "The manifest is written only when every file and folder is on the disk.")
def test_every_file_and_folder_is_on_the_disk_before_the_manifest_says_so(volume: Volume,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    for path in volume.folder.iterdir():
        os.utime(path, ns=(1, 1))
    monkeypatch.setattr(os, "fsync", fsync)
    volume.pull_here()
    before = synced[:next(index for index, path in enumerate(synced) if volume.manifest.name in path.name)]
    assert {*volume.folder.iterdir(), volume.folder, volume.folder.parent, volume.models} <= set(before)


@pytest.mark.fault("A stored file changes", "Found at the next start, and fetched again.")
def test_a_changed_file_is_found_and_fetched_again(volume: Volume, model: Path) -> None:
    flip_last_byte(volume.folder / WEIGHTS)
    assert not volume.complete()
    with Hub({MODEL: model}) as hub:
        volume.environment["MODELSCOPE_ENDPOINT"] = hub.url
        assert volume.pull()[0] == 0
        assert hub.downloads("tokenizer.json") == [], "what is right is not fetched again"
    assert (volume.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 2}', '{"version": 1, "files": []}',
                                     '{"version": 1, "model": "owner/tiny", "revision": "master", "endpoint": "",'
                                     ' "complete": true, "files": []}'])
@pytest.mark.fault("Manifest corrupt", "The model counts as incomplete, and every hash is checked again.")
def test_a_damaged_manifest_counts_as_none(volume: Volume, content: str) -> None:
    volume.manifest.write_text(content)
    assert not volume.complete()
    with pytest.raises(ModelUnavailableError, match="cannot be reached"):
        volume.pull_here()


@pytest.mark.fault("Manifest forged", "Nothing outside the model's folder is touched.")
def test_a_manifest_cannot_have_files_removed_elsewhere(volume: Volume, model: Path) -> None:
    victim = volume.models.parent / "victim.json"
    victim.touch()
    manifest = json.loads(volume.manifest.read_text())
    manifest["files"].append({**manifest["files"][0], "path": "../../../victim.json"})
    volume.manifest.write_text(json.dumps(manifest))
    with Hub({MODEL: model}) as hub:
        volume.environment["MODELSCOPE_ENDPOINT"] = hub.url
        volume.pull_here()  # all the files are there and right
    assert victim.exists()


@pytest.mark.fault("Weights in the folder that no manifest knows", "Named, never served.")
def test_foreign_weights_in_the_folder_are_named(volume: Volume) -> None:
    write_weights(volume.folder / "other.safetensors")
    assert not volume.complete()
    with pytest.raises(ModelUnavailableError, match=r"not the model's: other\.safetensors"):
        volume.pull_here()


def test_another_revision_replaces_what_differs_and_removes_what_is_gone(volume: Volume, tmp_path: Path) -> None:
    newer = write_model(tmp_path / "newer")
    other = (newer / "config.json").read_text().replace("Llama", "Qwen3")
    (newer / "config.json").write_text(other)  # of the same size, and this hub gives no checksums
    (newer / "tokenizer.json").unlink()
    with Hub({MODEL: newer}, fault="nosha") as hub:
        volume.environment |= {"MODELSCOPE_ENDPOINT": hub.url, "MODEL_REVISION": "v2"}
        assert not volume.complete()
        assert volume.pull()[0] == 0
    assert (volume.folder / "config.json").read_text() == other
    assert not (volume.folder / "tokenizer.json").exists()
    assert volume.complete()


@pytest.mark.fault("`kill -9` of a pull (ModelScope)", "Half a model is none; the next pull goes on where it stopped.")
def test_a_killed_pull_goes_on_where_it_stopped(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}) as hub:
        hub.hold_at_bytes = 2 << 20
        volume = Volume(tmp_path, hub)
        with volume.start("--json") as process:
            stop_when_arrived(process, 1 << 20)
        assert pull.locate(volume.settings.models_dir, volume.ref) is None, "half a model is no model"
        hub.hold_at_bytes = 0
        assert volume.pull()[0] == 0
        first, second = hub.downloads(WEIGHTS)
        assert first == ""
        assert int(second.removeprefix("bytes=").removesuffix("-")) >= 1 << 20
    assert (volume.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert not list(volume.folder.glob("*.incomplete"))


@pytest.mark.fault("The hub cuts the connection in the middle of a file", "The same pull goes on where it stopped.")
def test_a_cut_connection_is_gone_on_with(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, fault="cut") as hub:
        volume = Volume(tmp_path, hub)
        code, out, err = volume.pull()
        assert (code, err) == (0, "")
        assert out.count("retrying") == 1, "in our own log"
        first, second = hub.downloads(WEIGHTS)
        assert (first, second[-1]) == ("", "-")
    assert volume.complete()


@pytest.mark.fault("The hub flips a byte", "Exit code 4; the file is not kept, let alone served.")
def test_wrong_bytes_are_refused_and_not_kept(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, fault="flip") as hub:
        volume = Volume(tmp_path, hub)
        code, out, err = volume.pull()
    assert code == 4
    assert f"wrong bytes in every try, by their SHA-256: {WEIGHTS}." in err
    assert "Failed to download" not in out + err, "failures are told once"
    assert not volume.complete()
    assert not (volume.folder / WEIGHTS).exists()


def test_a_checksum_that_comes_with_the_file_is_used_too(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, fault="flip,nosha,linked") as hub:
        code, _, err = Volume(tmp_path, hub).pull()
    assert code == 4
    assert "wrong bytes" in err


def test_without_any_checksum_the_sizes_decide_and_it_is_said(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, fault="nosha") as hub:
        volume = Volume(tmp_path, hub)
        code, out, _ = volume.pull()
        assert code == 0
        assert "no checksum for 3 of 3 files" in out
        assert volume.complete()
        flip_last_byte(volume.folder / WEIGHTS)
        assert volume.pull()[0] == 0, "what was received is known by its checksum from then on"
    assert (volume.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


@pytest.mark.fault("The hub's library says that all is well, and it is not",
                   "Every file is checked; one more try, then exit code 4.")
def test_what_the_library_leaves_is_checked(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that says that all is well: first without a file and with a wrong one, then right."""
    rounds: list[list[str]] = []

    def download(_settings: Settings, _endpoint: str, directory: Path, _wanted: Sequence[ModelFile],
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
        with pytest.raises(ModelUnavailableError, match=f"twice.*{WEIGHTS}"):
            volume.pull_here()
        assert rounds == [["config.json", WEIGHTS, "tokenizer.json"], [WEIGHTS, "tokenizer.json"]]
        assert not (volume.folder / WEIGHTS).exists()
        assert not volume.complete()
        rounds.clear()
        wrong_rounds = 1
        volume.pull_here()
    assert rounds == [[WEIGHTS], [WEIGHTS]]
    assert volume.complete()


@pytest.mark.fault("The hub lists a path with `../`", "One request, the listing, and nothing written.")
def test_a_path_that_leaves_the_folder_is_refused_before_anything_is_fetched(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, fault="traversal") as hub:
        volume = Volume(tmp_path, hub)
        with pytest.raises(ModelUnavailableError, match=r"escape\.json"):
            volume.pull_here()
        assert len(hub.requests) == 1
    assert not list(tmp_path.rglob("escape.json"))
    assert not volume.folder.exists()


@pytest.mark.fault("Two containers on one volume",
                   "One fetches; the other waits with a message and then finds it complete.")
def test_two_pulls_at_once_fetch_the_weights_once(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, bytes_per_second=50_000) as hub:
        volume = Volume(tmp_path, hub)
        with volume.start() as one:
            assert one.stdout is not None
            out = one.stdout.readline()  # it has the lock
            with volume.start() as two:
                assert two.stdout is not None
                out += two.stdout.readline()
                hub.bytes_per_second = 0
                out += one.stdout.read() + two.stdout.read()
        assert (one.returncode, two.returncode) == (0, 0)
        assert hub.downloads(WEIGHTS).count("") == 1
    assert out.count("another process pulls") == 1


@pytest.mark.fault("The model wants remote code (`auto_map`)", "Refused unless TRUST_REMOTE_CODE.")
def test_remote_code_is_refused_unless_trusted(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "remote"
    shutil.copytree(model, folder)
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "modeling.Model"}}')
    with Hub({MODEL: folder}) as hub:
        with pytest.raises(ModelUnavailableError, match="auto_map") as refusal:
            Volume(tmp_path, hub).pull_here()
        assert "TRUST_REMOTE_CODE=yes" in refusal.value.remedy
        assert "" not in hub.downloads("config.json"), "only looked at"
        trusting = Volume(tmp_path, hub, TRUST_REMOTE_CODE="yes")
        assert trusting.pull()[0] == 0
    assert (trusting.folder / "modeling.py").exists()
    assert not (trusting.folder / "pytorch_model.bin").exists()


class Listing:
    """Files of which only names and sizes matter, and an index."""

    def __init__(self, *names: str, index: Sequence[str] = ()) -> None:
        self.files = tuple(ModelFile(name, 100, "") for name in names)
        self.index = json.dumps({"weight_map": {name: name for name in index}}).encode()

    def names(self) -> dict[str, int]:
        return {file.path: file.size_bytes for file in self.files}

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        assert (name, start, length) == ("model.safetensors.index.json", 0, None)
        return self.index


def choose(listing: Listing, **environment: str) -> list[str]:
    chosen = selection.choose(listing, listing.files, settings.load({"MODEL_ID": MODEL, **environment}))
    return [file.path for file in chosen]


def test_only_the_weights_that_the_engine_loads_are_chosen() -> None:
    index, shards = "model.safetensors.index.json", ["a.safetensors", "b.safetensors"]
    others = ["c.safetensors", "onnx/model.safetensors", "original/consolidated.00.pth", "model.gguf"]
    assert choose(Listing("config.json", index, *shards, *others, index=shards)) == ["config.json", index, *shards]
    assert choose(Listing("config.json", "model.safetensors", "consolidated.safetensors", "fp8/model.safetensors")) == [
        "config.json", "model.safetensors"]
    with pytest.raises(ModelUnavailableError, match=r"b\.safetensors.*index\.json"):
        choose(Listing("config.json", index, "a.safetensors", index=shards))


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool.jinja",
                                  "tokenizer.model", "tokenizer.model.v3", "qwen.tiktoken", "vocab.txt", "merges.txt",
                                  "1_Pooling/config.json"])
def test_configuration_and_tokenizer_are_chosen(name: str) -> None:
    assert name in choose(Listing("config.json", WEIGHTS, name))


@pytest.mark.parametrize("name", ["README.md", "pytorch_model.bin", "x.pt", "x.pth", "x.pickle", "modeling.py", "x.sh",
                                  "requirements.txt", "model.safetensors.py", "LICENSE", ".gitattributes"])
def test_what_serving_does_not_need_is_not_chosen(name: str) -> None:
    assert name not in choose(Listing("config.json", WEIGHTS, name))
    trusted = choose(Listing("config.json", WEIGHTS, name), TRUST_REMOTE_CODE="yes")
    assert (name in trusted) == name.endswith(".py")


@pytest.mark.parametrize(("names", "words"), [
    (["pytorch_model.bin", "config.json"], r"only as pytorch_model\.bin; pickled files can run code"),
    (["config.json", "model.gguf"], r"no \*\.safetensors"),
    ([WEIGHTS], r"has no config\.json")])
@pytest.mark.fault("Only `.bin`, `.pt`, GGUF or no weights",
                   "Refused with the reason: pickled weights are never loaded.")
def test_what_is_no_model_to_be_served_is_refused_with_the_reason(names: list[str], words: str) -> None:
    with pytest.raises(ModelUnavailableError, match=words):
        choose(Listing(*names))


@pytest.mark.fault("Too little disk for the model", "Told before the first byte.")
def test_a_full_volume_is_told_before_the_first_byte(tmp_path: Path, model: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*real[:4], 0, *real[5:])))
    with Hub({MODEL: model}) as hub, pytest.raises(ModelUnavailableError, match="4 MiB needed, 0 B free"):
        Volume(tmp_path, hub).pull_here()
    assert hub.downloads(WEIGHTS) == []


def test_a_local_folder_is_used_where_it_lies(tmp_path: Path, model: Path) -> None:
    there = settings.load({"MODEL_SOURCE": "local", "MODEL_ID": str(model), "MODELS_DIR": str(tmp_path / "none")})
    ref = model_reference(there)
    assert pull.locate(there.models_dir, ref) == pull.pull(there, lambda _: None) == model.resolve()
    assert isinstance(pull.hub_files(there, ref), LocalFiles)
    for folder, words in ((tmp_path, "are needed"), (tmp_path / "absent", "No such file")):
        with pytest.raises(ModelUnavailableError, match=words):
            pull.locate(tmp_path, ModelRef(str(folder), "local", "master"))


def test_the_store_is_imported_without_the_hubs_library() -> None:
    code = "import sys, shoehorn.store.pull; sys.exit(any(name.startswith('modelscope') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(Path(pull.__file__).parents[2])},
                          check=False).returncode == 0
