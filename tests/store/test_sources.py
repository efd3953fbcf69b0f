"""One commit for a pull, its rate limit and free space, and fallback to the other hub."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from unittest import mock

import pytest

from fakes.hf_hub import HuggingFaceHub
from fakes.hub import Hub, commit_of
from shoehorn.common import disk
from shoehorn.common.errors import ModelUnavailableError
from shoehorn.hub.huggingface import HuggingFaceRepository
from shoehorn.hub.modelscope import ModelScopeRepository
from shoehorn.hub.repository import HubFailedError
from shoehorn.store import pull
from support.pulling import MODEL, WEIGHTS, WEIGHTS_BYTES, Volume, stop_when_arrived, write_model, write_weights

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hub") / "model")


def newer_than(model: Path, folder: Path) -> Path:
    """Copy a model, with other weights and another tokenizer."""
    shutil.copytree(model, folder)
    write_weights(folder / WEIGHTS, fill=1)
    (folder / "tokenizer.json").write_text("[]")
    return folder


def test_moving_branch_on_hugging_face_does_not_mix_versions(tmp_path: Path, model: Path) -> None:
    newer = newer_than(model, tmp_path / "newer")
    with HuggingFaceHub({MODEL: model}, then={MODEL: newer}) as hub:
        volume = Volume(tmp_path, hub)
        assert volume.pull()[0] == 0
        assert not [request for request in hub.requests if "/main/" in request.path]
    for name in (WEIGHTS, "tokenizer.json"):
        assert (volume.folder / name).read_bytes() == (model / name).read_bytes()
    assert json.loads(volume.manifest.read_text())["commit"] == commit_of(model)


def test_moving_branch_on_modelscope_does_not_mix_versions(tmp_path: Path, model: Path) -> None:
    newer = newer_than(model, tmp_path / "newer")
    with Hub({MODEL: model}, then={MODEL: newer}) as hub:
        volume = Volume(tmp_path, hub)
        with ModelScopeRepository(*volume.hub_arguments) as client:
            assert client.names()["tokenizer.json"] == 2
            assert client.read("tokenizer.json") == b"{}"
        hub.models = {MODEL: model}
        assert volume.pull()[0] == 0
    for name in (WEIGHTS, "tokenizer.json"):
        assert (volume.folder / name).read_bytes() == (model / name).read_bytes()
    assert json.loads(volume.manifest.read_text())["commit"] == commit_of(model)


@pytest.mark.parametrize("sha", ["main", "", None, 7, "A" * 40])
def test_invalid_commit_is_rejected(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, sha: object) -> None:
    monkeypatch.setattr("fakes.hf_hub.commit_of", lambda _: sha)
    with HuggingFaceHub({MODEL: model}) as running, pytest.raises(ModelUnavailableError) as caught:
        HuggingFaceRepository(*Volume(tmp_path, running).hub_arguments).names()
    assert caught.value.code == "hub_invalid_listing"


@pytest.mark.parametrize("kind", [Hub, HuggingFaceHub])
def test_pull_respects_its_rate_limit(tmp_path: Path, model: Path, kind: type[Hub]) -> None:
    with kind({MODEL: model}) as running:
        volume = Volume(tmp_path, running, PULL_RATE_LIMIT="2MB/s")
        started = time.monotonic()
        assert volume.pull()[0] == 0
        assert time.monotonic() - started > WEIGHTS_BYTES / 2_000_000
    assert volume.complete()


@pytest.mark.parametrize("kind", [Hub, HuggingFaceHub])
@pytest.mark.fault("Others fill the volume during a pull, so that the rest does not fit",
                   "The pull aborts before the volume is full; exit code 4; the next pull resumes.")
def test_pull_aborts_when_the_rest_does_not_fit(tmp_path: Path, model: Path, kind: type[Hub],
                                                monkeypatch: pytest.MonkeyPatch,
                                                caplog: pytest.LogCaptureFixture) -> None:
    def received_bytes() -> int:
        return sum(path.stat().st_size for path in pulled.folder.rglob(f"{WEIGHTS}*"))

    def statvfs(path: object) -> os.statvfs_result:
        blocks = 10 if received_bytes() else 1 << 20
        return os.statvfs_result((4096, 4096, blocks, blocks, blocks, 9, 9, 9, 0, 255))

    with kind({MODEL: model}) as running, mock.patch.dict(os.environ):
        pulled = Volume(tmp_path, running)
        with monkeypatch.context() as patch:
            patch.setattr(os, "statvfs", statvfs)
            patch.setattr(disk, "_CHECK_SECONDS", 0.0)
            with pytest.raises(ModelUnavailableError) as caught:
                pull.pull(pulled.settings, lambda _: None)
        assert caught.value.code == "disk_full"
        assert "Aborting download" in caplog.text
        assert 0 < received_bytes() < WEIGHTS_BYTES
        assert pulled.pull()[0] == 0
        assert [span for span in running.downloads(WEIGHTS) if span], "not resumed"
    assert pulled.complete()


def interrupted(home: Path, model: Path) -> Volume:
    """Return a volume with a killed pull from ModelScope."""
    with Hub({MODEL: model}) as hub:
        hub.hold_at_bytes = 2 << 20
        volume = Volume(home, hub)
        with volume.start("--json") as process:
            stop_when_arrived(process, 1 << 20)
    volume.environment["MODELSCOPE_ENDPOINT"] = "http://127.0.0.1:9"
    return volume


def test_fallback_resumes_if_the_weights_are_identical(tmp_path: Path, model: Path) -> None:
    volume = interrupted(tmp_path, model)
    with HuggingFaceHub({MODEL: model}) as hub:
        volume.environment["HF_ENDPOINT"] = hub.url
        code, _, err = volume.pull()
        assert code == 4
        assert "unavailable" in err
        assert hub.requests == [], "contacted without MODEL_FALLBACK"
        volume.environment["MODEL_FALLBACK"] = "yes"
        code, out, err = volume.pull()
        assert (code, err) == (0, "")
        assert "Falling back to the other hub" in out
        assert hub.downloads(WEIGHTS)[-1].startswith("bytes="), "not resumed"
    assert volume.complete()
    document = json.loads(volume.manifest.read_text())
    assert (document["source"], document["revision"], document["commit"]) == ("modelscope", "master", commit_of(model))
    assert document["endpoint"] == hub.url


def test_fallback_is_rejected_if_weights_differ_or_are_unknown(tmp_path: Path, model: Path) -> None:
    newer = newer_than(model, tmp_path / "newer")
    volume = interrupted(tmp_path, model)
    volume.environment["MODEL_FALLBACK"] = "yes"
    with HuggingFaceHub({MODEL: newer}) as hub:
        volume.environment["HF_ENDPOINT"] = hub.url
        with pytest.raises(ModelUnavailableError, match=WEIGHTS) as caught:
            volume.pull_here()
        assert caught.value.code == "fallback_mismatch"
        volume.manifest.unlink()
        with pytest.raises(ModelUnavailableError) as caught:
            volume.pull_here()
        assert caught.value.code == "fallback_unverified"
        assert "MODEL_SOURCE=huggingface" in caught.value.remedy
        assert hub.downloads(WEIGHTS) == []


@pytest.mark.parametrize("changed", [{"MODEL_REVISION": "v2"}, {"MODEL_SOURCE": "huggingface"}])
def test_hashes_of_another_revision_or_hub_do_not_permit_a_fallback(tmp_path: Path, model: Path, changed: dict[str,
                                                                    str]) -> None:
    volume = interrupted(tmp_path, model)
    with HuggingFaceHub({MODEL: model}) as one, Hub({MODEL: model}) as other:
        one.faults.add("503" if changed.get("MODEL_SOURCE") else "pages")
        other.faults.add("503" if not changed.get("MODEL_SOURCE") else "slow")
        volume.environment |= {"HF_ENDPOINT": one.url, "MODELSCOPE_ENDPOINT": other.url, "MODEL_FALLBACK": "yes"}
        volume.environment |= changed
        with pytest.raises(ModelUnavailableError, match="503") as caught:
            volume.pull_here()
        assert caught.value.code == "fallback_unverified"


def test_shard_that_only_the_fallback_has_is_named(tmp_path: Path, model: Path) -> None:
    more = shutil.copytree(model, tmp_path / "more")
    write_weights(more / "more.safetensors")
    volume = interrupted(tmp_path, model)
    volume.environment["MODEL_FALLBACK"] = "yes"
    with HuggingFaceHub({MODEL: more}) as hub:
        volume.environment["HF_ENDPOINT"] = hub.url
        with pytest.raises(ModelUnavailableError, match=r"more\.safetensors") as caught:
            volume.pull_here()
        assert caught.value.code == "fallback_mismatch"


def test_hub_without_a_listed_file_is_replaced_by_the_fallback(tmp_path: Path, model: Path) -> None:
    with HuggingFaceHub({MODEL: model}, fault="absent") as chosen, Hub({MODEL: model}) as other:
        volume = Volume(tmp_path, chosen, MODELSCOPE_ENDPOINT=other.url, MODEL_FALLBACK="yes", MODEL_REVISION="main")
        code, out, err = volume.pull()
        assert (code, err) == (0, "")
        assert f"endpoint={other.url}" in out
        assert f"{WEIGHTS}: listed by the hub, but not found" in out
        assert chosen.downloads("tokenizer.json")
        assert not other.downloads("tokenizer.json")
    assert volume.complete()


def test_failure_of_both_hubs_reports_both(tmp_path: Path, model: Path) -> None:
    volume = interrupted(tmp_path, model)
    volume.environment |= {"MODEL_FALLBACK": "yes", "HF_ENDPOINT": "http://127.0.0.1:7"}
    with pytest.raises(HubFailedError, match=r"127\.0\.0\.1:9.*127\.0\.0\.1:7") as caught:
        volume.pull_here()
    assert caught.value.code == "fallback_failed"
